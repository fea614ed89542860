"""What the models' predictions lose when a residual stream is replaced by its reconstruction.

Both models run on the same sequences and the paired activations go through the crosscoder. Then,
one source after the other, that source's model runs again with its residual stream replaced by the
reconstruction, by the source's mean, and by zero.

**Which positions.** Replaced are the positions that the harvest stores: no padding, none of the first
``skip_positions`` of a sequence (BOS, or whatever token is the attention sink), and no norm outlier
of any source. All others keep what the model itself computed. Counted is the prediction made *at* each
replaced position whose next token is in the same sequence, so neither BOS nor padding is ever predicted.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Array, Bool, Float, Int

from crosscoder_jax.activations.split import Split
from crosscoder_jax.activations.store import ActivationStore
from crosscoder_jax.crosscoder import Crosscoder
from crosscoder_jax.language_models.batches import OutlierLimits, kept_positions
from crosscoder_jax.language_models.config import SpliceConfig
from crosscoder_jax.language_models.document_sums import REPLACEMENTS, DocumentSums, splice_metrics
from crosscoder_jax.language_models.documents import Window
from crosscoder_jax.language_models.harvested import harvest_config, refuse_changes, with_changes
from crosscoder_jax.language_models.pair import ModelPair
from crosscoder_jax.language_models.plan import Plan, plan_harvest
from crosscoder_jax.language_models.rows import bars_off
from crosscoder_jax.language_models.splicing import cross_entropy, kl_divergence, run_model, run_spliced
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
    fraction is that of the *difference*, not comparable with a crosscoder's.

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
    with bars_off():
        harvest = with_changes(harvest_config(store), config)
        plan = plan_harvest(harvest)
        refuse_changes(store, harvest, plan, is_own_texts=config.texts is None)
        pair = ModelPair(harvest, plan, progress, uses_head=True)
        splicer = _Splicer(crosscoder, store, harvest.skip_positions, pair, plan)
        held_out = split if config.texts is None else None
        windows = _chosen_windows(pair.open_stream(), held_out, config.max_tokens, harvest.skip_positions)
        sums = DocumentSums()
        for batch in iter(lambda: list(itertools.islice(windows, harvest.batch_size)), []):
            sums.add(*splicer.losses(batch))
            if progress is not None:
                progress(min(sums.num_tokens, config.max_tokens), config.max_tokens, "tokens")
    if progress is not None:
        progress(sums.num_tokens, sums.num_tokens, "tokens")
    return splice_metrics(sums.by_document())


def _chosen_windows(
    stream: Iterable[Window], held_out: Split | None, max_tokens: int, skip_positions: int
) -> Iterator[Window]:
    """Yield whole sequences of held-out documents until there are ``max_tokens`` predictions."""
    num_tokens = 0
    for window in stream:
        if num_tokens >= max_tokens:
            return
        if held_out is None or held_out.is_held_out(np.array([window.document]))[0]:
            num_tokens += len(window.input_ids) - skip_positions - 1
            yield window


@dataclasses.dataclass(frozen=True)
class _Sequences:
    """A padded batch on the device of the models; every field is ``[batch, context]``."""

    ids: torch.Tensor
    mask: torch.Tensor
    is_spliced: torch.Tensor
    is_counted: torch.Tensor


class _Splicer:
    """Measures batch after batch."""

    def __init__(
        self, crosscoder: Crosscoder, store: ActivationStore, skip_positions: int, pair: ModelPair, plan: Plan
    ):
        self._crosscoder, self._stored = crosscoder, store.sources
        self._skip, self._pair, self._plan = skip_positions, pair, plan
        self._limits: OutlierLimits | None = store.manifest.provenance["outliers"]["norm_limits"]
        means = [store.manifest.statistics[name].mean for name in self._stored.names]
        self._mean = jnp.asarray(np.concatenate(means), jnp.float32)

    def losses(
        self, windows: Sequence[Window]
    ) -> tuple[Int[np.ndarray, "token"], dict[str, Float[np.ndarray, "token"]]]:
        """Return the document of each counted prediction and its losses, in nats, by name."""
        ids, mask = self._pair.pad(windows)
        acts = self._pair.capture(ids, mask)
        is_spliced = kept_positions(acts, windows, self._skip, self._limits)
        is_counted = _with_next_token(is_spliced, windows)
        places = (torch.from_numpy(array).to(self._pair.device) for array in (is_spliced, is_counted))
        sequences, replacements = _Sequences(ids, mask, *places), self._replacements(acts)
        losses: dict[str, np.ndarray] = {}
        for model in self._plan.facts:
            losses |= self._losses_of_model(model, sequences, replacements)
        documents = np.array([window.document for window in windows], np.int64)
        return documents[np.nonzero(is_counted)[0]], losses

    def _losses_of_model(
        self, name: str, batch: _Sequences, replacements: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> dict[str, np.ndarray]:
        own = [s for s in self._plan.sources if s.model == name]
        layers = {s.stored.name: s.layer for s in own if s.stored.name in replacements["spliced"]}
        if not layers:
            return {}
        model, losses = self._pair.model(name), {}
        clean = run_model(model, batch.ids, batch.mask)
        for source, layer in layers.items():
            losses[f"ce/{source}/clean"] = cross_entropy(clean, batch.ids, batch.is_counted)
            for kind, of_kind in replacements.items():
                logits = run_spliced(model, batch.ids, batch.mask, layer, of_kind[source], batch.is_spliced)
                losses[f"ce/{source}/{kind}"] = cross_entropy(logits, batch.ids, batch.is_counted)
                losses[f"kl/{source}/{kind}"] = kl_divergence(clean, logits, batch.is_counted)
        return {key: value.double().cpu().numpy() for key, value in losses.items()}

    def _replacements(self, acts: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """Return ``[batch, context, width]`` by kind of replacement and by stored source."""
        parts = [acts[name].float().cpu().numpy() for name in self._stored.names]
        batch, context = parts[0].shape[:2]
        rows = np.concatenate(parts, axis=-1).reshape(batch * context, -1)
        computed = _replace(self._crosscoder, jnp.asarray(rows), self._mean, self._stored)
        return {
            kind: {
                name: torch.from_numpy(np.array(value)).view(batch, context, -1).to(self._pair.device)
                for name, value in computed[kind].items()
            }
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


def _with_next_token(
    is_spliced: Bool[np.ndarray, "batch context"], windows: Sequence[Window]
) -> Bool[np.ndarray, "batch context"]:
    """Leave out the last token of each sequence, whose next one is not known."""
    is_counted = is_spliced.copy()
    for row, window in enumerate(windows):
        is_counted[row, len(window.input_ids) - 1] = False
    return is_counted
