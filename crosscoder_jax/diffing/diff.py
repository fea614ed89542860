"""The whole diff of a crosscoder on held-out tokens: norms, classes, Latent Scaling, evidence, text."""

import numpy as np
from jaxtyping import Array, Bool, Integer

from crosscoder_jax.activations.view import TokenView
from crosscoder_jax.crosscoder import Crosscoder, require_one_code
from crosscoder_jax.diffing.comparison import comparison
from crosscoder_jax.diffing.config import DiffConfig
from crosscoder_jax.diffing.decoder_norms import classify_latents, decoder_cosine, decoder_norms, delta_norm
from crosscoder_jax.diffing.evidence import Activity, finalize_activity
from crosscoder_jax.diffing.intervals import is_beyond_interval
from crosscoder_jax.diffing.latent_scaling import LatentScaling, finalize_scaling
from crosscoder_jax.diffing.peaks import find_snippets
from crosscoder_jax.diffing.summary import diff_summary
from crosscoder_jax.diffing.sums import measure
from crosscoder_jax.diffing.table import (
    Columns,
    DiffResult,
    activity_columns,
    class_columns,
    group_columns,
    norm_columns,
    scaling_columns,
    strongest_latents,
    trajectory_columns,
)
from crosscoder_jax.diffing.trajectories import are_snapshots
from crosscoder_jax.diffing.verdicts import verdicts, why_not_confirmed
from crosscoder_jax.sharding import place, to_host
from crosscoder_jax.sources import Sources
from crosscoder_jax.typing import Progress


def diff_run(
    crosscoder: Crosscoder,
    view: TokenView,
    config: DiffConfig = DiffConfig(),
    progress: Progress | None = None,
) -> DiffResult:
    """Measure every latent on the tokens of ``view``, which training has not seen.

    Each latent is tested by Latent Scaling on the side its ``delta_norm`` points to: from 0.5 up with
    the chat decoder as the direction, below with the base decoder, so that ``nu`` is always the
    other model's share. A crosscoder of one source, such as a difference SAE, has no columns that
    compare two models; of sources with different widths only norms are compared. Of one layer of three
    models or more it tells in which each latent appears, and how it turns. Everything is in raw activation
    units; a crosscoder that reads a basis of stored sources is compared in their space. Of latents that a
    group makes exclusive ``delta_norm`` says nothing, Latent Scaling all.
    A crosscoder on a mesh is measured there; of several processes all call this, and each reads the whole
    view.

    Args:
        crosscoder: with its inference threshold; source 0 is the base, source 1 the chat model.
        view: held-out tokens, in raw units.
        config: cut-offs and sizes.
        progress: told the tokens read, over both passes.

    Raises:
        StoreError: if a file of the store is damaged.
        ValueError: if the store lacks a source of the crosscoder, two sources are combinations that do
            not determine the stored ones, a mesh axis does not divide the batch size, each source has its
            own code, or snippets are asked for of a store of 2^31 tokens or more.
    """
    require_one_code(crosscoder, "diff_run")
    store, stored = view.store, view.store.sources
    space = comparison(crosscoder, stored)
    norms = decoder_norms(space.w_dec, space.sources)
    delta = delta_norm(norms) if space.is_pair else None
    sums, decoders = measure(crosscoder, view, space, delta, config, progress)
    activity = finalize_activity(sums.activity)
    host_norms, labels = to_host(norms).astype(np.float64), store.manifest.labels

    columns = norm_columns(host_norms, space.sources) | group_columns(crosscoder.config.layout, host_norms)
    if are_snapshots(space.sources, store.manifest.sources):
        columns |= trajectory_columns(host_norms, space.w_dec, space.sources)
    scaled: Columns = {}
    if delta is not None:
        classes = to_host(classify_latents(delta, config.cutoffs, is_dead=_dead(activity, crosscoder)))
        columns |= class_columns(to_host(delta).astype(np.float64), classes)
        if sums.scaling is not None and decoders is not None:
            scaling = finalize_scaling(sums.scaling, decoders, min_active_tokens=config.min_active_tokens)
            columns["cosine"] = to_host(decoder_cosine(space.w_dec, space.sources)).astype(np.float64)
            scaled = _scaling_columns(scaling, classes, space.sources, config)
    active_documents = to_host(sums.documents.active)
    columns |= activity_columns(activity, active_documents, host_norms, labels) | scaled
    selected = strongest_latents(columns, labels, config.num_snippet_latents, config.min_active_tokens)
    snippets = find_snippets(crosscoder, view, selected, config, progress)
    return DiffResult(columns, diff_summary(columns, activity, sums, store, space, config), snippets)


def _scaling_columns(
    scaling: LatentScaling, classes: Integer[np.ndarray, "latent"], sources: Sources, config: DiffConfig
) -> Columns:
    found = verdicts(classes, scaling, **config.limits)
    reasons = why_not_confirmed(found, scaling, **config.limits, min_active_tokens=config.min_active_tokens)
    is_beyond = is_beyond_interval(found, scaling, **config.limits)
    return scaling_columns(scaling, found, reasons, is_beyond, sources)


def _dead(activity: Activity, crosscoder: Crosscoder) -> Bool[Array, "latent"]:
    return place(activity.active_tokens == 0, crosscoder.shardings.per_latent_l)
