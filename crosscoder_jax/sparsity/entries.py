"""A sparse code as its entries, and the products that need no more: the references of ``kernels``.

What BatchTopK keeps is a thousandth of ``[batch, latent]``. The entries of a code are listed row after row,
in arrays longer than they are many: what lies behind the last is zero and not looked at.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from crosscoder_jax.typing import Acts, DecoderWeights, Latents, PerLatent, Scalar

EntryFloats = Float[Array, "entry"]
EntryInts = Int[Array, "entry"]


class Entries(NamedTuple):
    """The kept activations of a batch, row after row."""

    values: EntryFloats
    latents: EntryInts
    starts: Int[Array, "batch_and_1"]
    """Where each row begins; the last is how many entries there are."""


class ByLatent(NamedTuple):
    """The same entries in the order of their latents, and of their rows within a latent."""

    order: EntryInts
    """Which of the entries in the order of rows each is."""
    rows: EntryInts
    starts: Int[Array, "latent_and_1"]
    """Where each latent begins."""


def compress(pre_acts: Latents, score_weights: PerLatent, cut: Scalar, capacity: int) -> Entries:
    """Return the entries whose score reaches a cut.

    Args:
        pre_acts: encoder outputs, normalised units.
        score_weights: what each latent's activation is multiplied by for ranking, not negative.
        cut: smallest score that is kept; positive, ``inf`` keeps nothing.
        capacity: length of the arrays, which must not be less than there are entries.
    """
    is_kept = pre_acts * score_weights >= cut
    rows, latents = jnp.nonzero(is_kept, size=capacity, fill_value=0)
    counts = jnp.sum(is_kept, axis=1, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    values = jnp.where(jnp.arange(capacity) < starts[-1], pre_acts[rows, latents], 0.0)
    return Entries(values, latents.astype(jnp.int32), starts)


def by_latent(entries: Entries, num_latents: int) -> ByLatent:
    """Return the entries in the order of their latents."""
    is_entry = _is_entry(entries)
    order = jnp.argsort(jnp.where(is_entry, entries.latents, num_latents), stable=True).astype(jnp.int32)
    counts = jax.ops.segment_sum(is_entry.astype(jnp.int32), entries.latents, num_latents)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    return ByLatent(jnp.where(is_entry, order, 0), jnp.where(is_entry, _rows(entries)[order], 0), starts)


def decode(entries: Entries, w_dec: DecoderWeights) -> Acts:
    """Return the code times the decoder, without the bias."""
    terms = entries.values[:, None] * w_dec[entries.latents]
    return jax.ops.segment_sum(terms, _rows(entries), len(entries.starts) - 1)


def value_gradient(entries: Entries, grad: Acts, w_dec: DecoderWeights) -> EntryFloats:
    """Return the gradient of the entries' values from that of what they decode to."""
    products = jnp.sum(grad[_rows(entries)] * w_dec[entries.latents], axis=1)
    return jnp.where(_is_entry(entries), products, 0.0)


def decoder_gradient(values: EntryFloats, order: ByLatent, grad: Acts) -> DecoderWeights:
    """Return the gradient of the decoder.

    Args:
        values: of the entries, row after row.
        order: of the same entries.
        grad: gradient of what they decode to.
    """
    num_latents = len(order.starts) - 1
    return jax.ops.segment_sum(values[order.order][:, None] * grad[order.rows], _latents(order), num_latents)


def encoder_gradient(
    of_values: EntryFloats, order: ByLatent, acts: Acts
) -> tuple[Float[Array, "width latent"], PerLatent]:
    """Return the gradients of the encoder and of its bias.

    Args:
        of_values: gradient of the entries' values, row after row.
        order: of the same entries.
        acts: what the encoder reads, normalised units.
    """
    num_latents = len(order.starts) - 1
    of_bias = jax.ops.segment_sum(of_values[order.order], _latents(order), num_latents)
    return decoder_gradient(of_values, order, acts).T, of_bias


def _is_entry(entries: Entries) -> Bool[Array, "entry"]:
    return jnp.arange(len(entries.values)) < entries.starts[-1]


def _rows(entries: Entries) -> EntryInts:
    """Return each entry's row; beyond the last entry the number of rows, which sums leave out."""
    return _segments(entries.starts, len(entries.values))


def _latents(order: ByLatent) -> EntryInts:
    return _segments(order.starts, len(order.order))


def _segments(starts: Int[Array, "start"], length: int) -> EntryInts:
    return jnp.searchsorted(starts, jnp.arange(length), side="right").astype(jnp.int32) - 1
