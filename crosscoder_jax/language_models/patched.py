"""How far latents carry the base model's activations to the chat model's predictions: the causal test.

Chat runs on with ``h_S = h_base + sum_{j in S} f_j (d_j^chat - d_j^base)`` in place of its residual stream,
and its predictions are compared with those that it makes by itself: ``KL(chat || patched)``.
:mod:`~crosscoder_jax.language_models.replay` says at which positions.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from crosscoder_jax.activations.split import Split
from crosscoder_jax.activations.store import ActivationStore
from crosscoder_jax.crosscoder import Crosscoder
from crosscoder_jax.diffing.interventions import before_and_after, decoder_change, patched_acts
from crosscoder_jax.language_models.config import SpliceConfig
from crosscoder_jax.language_models.document_sums import DocumentSums, patch_metrics
from crosscoder_jax.language_models.replay import IsPredicted, Replay
from crosscoder_jax.language_models.rows import bars_off
from crosscoder_jax.language_models.splicing import kl_divergence, run_model
from crosscoder_jax.typing import Progress

Latents = Bool[np.ndarray, "latent"]


def evaluate_patched(
    crosscoder: Crosscoder,
    store: ActivationStore,
    split: Split,
    sets: Mapping[str, Latents],
    config: SpliceConfig = SpliceConfig(),
    progress: Progress | None = None,
    *,
    is_predicted: IsPredicted = lambda window: np.ones(len(window.input_ids), bool),
) -> dict[str, float | None]:
    """Measure how much of the gap between the models' predictions each set of latents closes.

    Args:
        crosscoder: of base and chat, of a basis of them, or of their difference; with its threshold.
        store: of one layer of base and chat, and perhaps of others, written by a harvest.
        split: of the run.
        sets: which latents are patched in, by name; :func:`~crosscoder_jax.diffing.patched_acts` adds
            ``none``, ``bias`` and ``all``.
        config: other texts, and how much of them.
        progress: told the ``models`` loaded, then the ``tokens`` of the texts read.
        is_predicted: tells of each sequence the tokens whose predictions are measured; all by default.

    Returns:
        ``kl/<set>``, nats per prediction, and ``kl_closed/<set>``, ``1 - kl/<set> / kl/none``: 0 for base's
        activations, 1 for chat's; each with its standard error over documents (jackknife) as
        ``se_<name>``; ``patched_tokens`` and ``patched_documents``. ``None`` where there is no gap to close.

    Raises:
        ValueError: as :func:`~crosscoder_jax.language_models.evaluate_spliced`, or the crosscoder does not
            say what chat has beyond base, or fewer than two documents have a prediction to measure.

    References:
        Minder et al. 2025, arXiv 2504.02922.
    """
    stored = store.sources
    decoder_change(crosscoder, stored)  # refuses before anything is loaded
    _, after = before_and_after(crosscoder, stored)
    chosen = {name: jnp.asarray(which) for name, which in sets.items()}
    patch = jax.jit(functools.partial(patched_acts, sets=chosen, stored=stored))
    sums = DocumentSums()
    with bars_off():
        replay = Replay(store, split, config, progress)
        (model,) = {planned.model for planned in replay.plan.sources if planned.stored.name == after.name}
        for batch in replay:
            wanted = batch.restricted(is_predicted)
            clean = run_model(replay.pair.model(model), wanted.ids, wanted.mask)
            losses = {}
            for name, acts in patch(crosscoder, jnp.asarray(wanted.rows(stored))).items():
                logits = replay.run(model, after.name, wanted, wanted.as_residual(np.asarray(acts)))
                divergence = kl_divergence(clean, logits, wanted.is_counted)
                losses[f"kl/{name}"] = divergence.double().cpu().numpy()
            sums.add(wanted.documents(), losses)
    return patch_metrics(sums.by_document())
