"""The sums over held-out tokens that a diff's table is made of: how latents fire, and Latent Scaling."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from crosscoder_jax.activations.view import TokenView
from crosscoder_jax.crosscoder import Crosscoder
from crosscoder_jax.diffing.comparison import Comparison
from crosscoder_jax.diffing.config import DiffConfig
from crosscoder_jax.diffing.documents import (
    DocumentCounts,
    init_documents,
    room_for_documents,
    update_documents,
)
from crosscoder_jax.diffing.evidence import ActivitySums, init_activity, update_activity
from crosscoder_jax.diffing.latent_scaling import (
    ScalingDecoders,
    ScalingSums,
    init_scaling,
    jackknife_groups,
    scaling_decoders,
    update_scaling,
)
from crosscoder_jax.diffing.reading import placed_column, placed_tokens, read_pass
from crosscoder_jax.sources import Sources
from crosscoder_jax.typing import Acts, Progress


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiffSums:
    """What one pass over the held-out tokens adds up."""

    activity: ActivitySums
    """How often and how strongly each latent fires on each text."""
    documents: DocumentCounts
    """On how many documents each latent fires."""
    scaling: ScalingSums | None
    """Of Latent Scaling; ``None`` where it does not apply."""


def measure(
    crosscoder: Crosscoder,
    view: TokenView,
    space: Comparison,
    delta: Float[Array, "latent"] | None,
    config: DiffConfig,
    progress: Progress | None,
) -> tuple[DiffSums, ScalingDecoders | None]:
    """Take the first pass: every sum that the table needs.

    Args:
        crosscoder: with its inference threshold.
        view: held-out tokens, in raw units.
        space: the decoders in the space where the models are compared.
        delta: decoder norm difference of each latent, which decides the direction it is tested along;
            ``None`` without two models.
        config: cut-offs and sizes.
        progress: told the tokens read.

    Returns:
        The sums, and the decoders of Latent Scaling, which are ``None`` where it does not apply.

    Raises:
        StoreError: if a file of the store is damaged.
        ValueError: if the store lacks a source of the crosscoder.
    """
    shardings, num_latents = crosscoder.shardings, crosscoder.config.num_latents
    decoders, scaling = None, None
    if delta is not None and not space.why_no_scaling:
        reference = jnp.where(delta < 0.5, 0, 1)  # NaN, two zero decoders, goes to the chat side
        decoders = scaling_decoders(
            space.w_dec, space.b_dec, space.sources, reference=reference, shardings=shardings
        )
        scaling = init_scaling(
            num_latents,
            num_groups=config.num_groups,
            dtype=crosscoder.config.param_dtype,
            shardings=shardings,
        )
    labels = view.store.manifest.labels
    sums = DiffSums(
        init_activity(num_latents, max(1, len(labels)), shardings=shardings),
        init_documents(num_latents, shardings=shardings),
        scaling,
    )
    room = 1
    for batch in read_pass(view, config, progress, earlier_passes=0):
        room = room_for_documents(batch.documents[batch.is_valid], room)
        acts, documents, is_valid = placed_tokens(batch, shardings)
        sums = _update(
            sums,
            decoders,
            crosscoder,
            acts,
            documents,
            placed_column(batch.labels, shardings),
            is_valid,
            stored=view.store.sources,
            compared=space.sources,
            room=room,
        )
    return sums, decoders


@functools.partial(jax.jit, donate_argnames="sums", static_argnames=("stored", "compared", "room"))
def _update(
    sums: DiffSums,
    decoders: ScalingDecoders | None,
    crosscoder: Crosscoder,
    stored_acts: Acts,
    documents: Int[Array, "batch"],
    labels: Int[Array, "batch"],
    is_valid: Bool[Array, "batch"],
    *,
    stored: Sources,
    compared: Sources,
    room: int,
) -> DiffSums:
    code = crosscoder.encode(crosscoder.config.sources.read(stored_acts, stored))
    shardings = crosscoder.shardings
    scaling = sums.scaling
    if scaling is not None and decoders is not None:
        scaling = update_scaling(
            scaling,
            decoders,
            compared.read(stored_acts, stored),
            code,
            jackknife_groups(documents, scaling.tokens.high.shape[0]),
            is_valid,
            sources=compared,
            shardings=shardings,
        )
    return DiffSums(
        update_activity(sums.activity, code, labels, is_valid, shardings=shardings),
        update_documents(sums.documents, code, documents, is_valid, room=room, shardings=shardings),
        scaling,
    )
