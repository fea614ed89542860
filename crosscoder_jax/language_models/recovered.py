"""What the models' predictions lose when a residual stream is replaced by its reconstruction.

Both models run on the same sequences and the paired activations go through the crosscoder. Then,
one source after the other, that source's model runs again with its residual stream replaced by the
reconstruction, by the source's mean, and by zero. :mod:`~crosscoder_jax.language_models.replay` says at
which positions.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Array, Float

from crosscoder_jax.activations.split import Split
from crosscoder_jax.activations.store import ActivationStore
from crosscoder_jax.crosscoder import Crosscoder
from crosscoder_jax.language_models.config import SpliceConfig
from crosscoder_jax.language_models.document_sums import REPLACEMENTS, DocumentSums, splice_metrics
from crosscoder_jax.language_models.replay import Replay, Replayed
from crosscoder_jax.language_models.rows import bars_off
from crosscoder_jax.language_models.splicing import cross_entropy, kl_divergence, run_model
from crosscoder_jax.sources import Sources
from crosscoder_jax.typing import Acts, PerWidth, Progress


def evaluate_spliced(
    crosscoder: Crosscoder,
    store: ActivationStore,
    split: Split,
    config: SpliceConfig = SpliceConfig(),
    progress: Progress | None = None,
) -> dict[str, float | None]:
    """Measure cross-entropy and KL with the reconstruction of each source spliced into its model.

    Models, layers, texts and token policy are those of the harvest that wrote the store, checked to
    be the same models and texts still. Only documents that ``split`` holds out are read, unless
    ``config`` names other texts. The code is the inference code, so the numbers depend on no batch.

    A crosscoder of derived sources is spliced in as :meth:`Sources.to_stored_acts` says: a
    difference SAE's reconstruction (or mean, or zero) is added to what ``before`` has on the token,
    for the model ``after``; ``before`` itself is left as it is and not measured. Its recovered
    fraction is that of the *difference*, not comparable with a crosscoder's. Of a store that holds more than
    the crosscoder is made of, the others are not measured.

    Args:
        crosscoder: with its inference threshold.
        store: written by a harvest.
        split: of the run.
        config: other texts, and how much of them.
        progress: told the ``models`` loaded, then the predictions counted, in ``tokens``.

    Returns:
        In nats per counted prediction and per stored source: ``ce/<source>/clean``,
        ``ce/<source>/<replacement>`` and ``kl/<source>/<replacement>`` for the replacements
        ``spliced``, ``mean_ablated`` and ``zero_ablated``; ``ce_recovered/<source>/<ablation>`` and
        ``kl_recovered/<source>/<ablation>`` for the ablations ``mean`` and ``zero``, see
        :func:`~crosscoder_jax.metrics.recovered_fraction`; each with its standard error over
        documents (jackknife) as ``se_<name>``; ``spliced_tokens`` and ``spliced_documents``. ``None``
        where a ratio does not exist, because the ablation changes nothing.

    Raises:
        ValueError: if the store was not written by a harvest, models or texts are no longer those of
            the harvest, a model lacks its head, or there are fewer than two documents to measure.
    """
    means = [store.manifest.statistics[name].mean for name in store.sources.names]
    mean = jnp.asarray(np.concatenate(means), jnp.float32)
    sums = DocumentSums()
    with bars_off():
        replay = Replay(store, split, config, progress)
        for batch in replay:
            replacements = _replacements(crosscoder, batch, mean, store.sources)
            losses: dict[str, np.ndarray] = {}
            for model in replay.plan.facts:
                losses |= _losses_of_model(model, replay, batch, replacements)
            sums.add(batch.documents(), losses)
    return splice_metrics(sums.by_document())


def _losses_of_model(
    name: str, replay: Replay, batch: Replayed, replacements: Mapping[str, Mapping[str, torch.Tensor]]
) -> dict[str, Float[np.ndarray, "token"]]:
    """Return the losses of a model's counted predictions, nats, by name."""
    sources = [s.stored.name for s in replay.plan.sources if s.model == name]
    replaced = [source for source in sources if source in replacements["spliced"]]
    if not replaced:
        return {}
    losses = {}
    clean = run_model(replay.pair.model(name), batch.ids, batch.mask)
    for source in replaced:
        losses[f"ce/{source}/clean"] = cross_entropy(clean, batch.ids, batch.is_counted)
        for kind, of_kind in replacements.items():
            logits = replay.run(name, source, batch, of_kind[source])
            losses[f"ce/{source}/{kind}"] = cross_entropy(logits, batch.ids, batch.is_counted)
            losses[f"kl/{source}/{kind}"] = kl_divergence(clean, logits, batch.is_counted)
    return {key: value.double().cpu().numpy() for key, value in losses.items()}


def _replacements(
    crosscoder: Crosscoder, batch: Replayed, stored_mean: PerWidth, stored: Sources
) -> dict[str, dict[str, torch.Tensor]]:
    """Return ``[batch, context, width]`` by kind of replacement and by stored source."""
    computed = _replace(crosscoder, jnp.asarray(batch.rows(stored)), stored_mean, stored)
    return {
        kind: {name: batch.as_residual(np.asarray(value)) for name, value in computed[kind].items()}
        for kind in REPLACEMENTS
    }


@functools.partial(jax.jit, static_argnames="stored")
def _replace(
    crosscoder: Crosscoder, acts: Acts, stored_mean: PerWidth, stored: Sources
) -> dict[str, dict[str, Array]]:
    own = crosscoder.config.sources
    own_acts = own.derive(acts, stored)
    mean = own.derive(stored_mean, stored)
    instead = (crosscoder(own_acts), jnp.broadcast_to(mean, own_acts.shape), jnp.zeros_like(own_acts))
    return {
        kind: own.to_stored_acts(value, acts, stored)
        for kind, value in zip(REPLACEMENTS, instead, strict=True)
    }
