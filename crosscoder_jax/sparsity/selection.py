"""Exact selection of the largest scores by counting, without a sort and without a gather.

The k-th largest of many numbers is the largest cut that at least k of them reach. Counting how many
reach a cut needs one pass over the scores and one integer from each device, so the search is exact
on any mesh. Cuts are proposed by interpolating the logarithm of the count, which is nearly linear
in the score for the tails met here, and every third cut halves the bracket in the ordering of the
floats, which bounds the number of passes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from crosscoder_jax.typing import Code, Latents, Mask, PerLatent, Scalar, Threshold

SMALLEST_SCORE = float(jnp.finfo(jnp.float32).tiny)
"""Scores below the smallest normal float32 count as zero: hardware may flush them."""

INT32_SCORES = 2**31 - 1
"""More scores than this are counted row by row."""

MOST_KEPT = 2**30
"""No more scores than this can be asked for; a count that reaches it stops there."""


class SparseCode(NamedTuple):
    """What a sparsity makes of pre-activations."""

    code: Code
    """Activations of the kept latents, zero elsewhere."""
    smallest_score: Threshold
    """The smallest kept score; ``inf`` if nothing is kept. One per source that has its own code."""


def ranking_scores(acts: Latents, score_weights: PerLatent) -> Latents:
    """Return ``acts * weights``, by which latents are ranked.

    In float32, which tells bfloat16 activations apart, and in float64 for float64 activations.
    """
    return acts.astype(jnp.promote_types(acts.dtype, jnp.float32)) * score_weights


def apply_threshold(pre_acts: Latents, score_weights: PerLatent, threshold: Scalar | PerLatent) -> Latents:
    """Return the inference code: ``relu(pre)`` where ``relu(pre) * weight > threshold``.

    The code of a token does not depend on what else is in the batch.

    Args:
        pre_acts: encoder outputs in normalised units.
        score_weights: what each latent's activation is multiplied by for ranking.
        threshold: the cut on scores, float32, same units as the scores; one, or one per latent.
    """
    acts = jax.nn.relu(pre_acts)
    scores = ranking_scores(acts, score_weights)
    return jnp.where(scores > threshold, acts, jnp.zeros_like(acts))


def top_scores_cut(
    values: Float[Array, "*shape"],
    count: Int[Array, ""],
    *,
    guess: Scalar | None = None,
    score: Callable[[Array], Array] = lambda values: values,
) -> Scalar:
    """Return the ``count``-th largest of non-negative scores.

    ``scores >= cut`` then keeps exactly ``count`` entries, or more if several are tied with the
    last of them: **all entries tied at the cut are kept**, so the selection does not depend on the
    order of tokens or latents, nor on the mesh. Zero scores are never kept: with fewer than
    ``count`` positive scores the cut is the smallest positive one.

    Args:
        values: the scores, or what they are made of.
        count: how many to keep, below :data:`MOST_KEPT`, which the caller must see to.
        guess: a cut to try first, such as the running threshold; saves passes, changes nothing.
        score: makes the scores (float32 or float64, not negative, no NaN) of the values, anew in every pass,
            so that they take no memory; elementwise.

    Returns:
        The cut; ``inf`` if ``count`` is 0 or no score is positive.
    """
    scores = score(values)
    first = jnp.asarray(0.0 if guess is None else guess, scores.dtype)
    found = _search(values, count, first, score)
    kept = scores >= _from_ordered(found.low)
    cut = jnp.min(jnp.where(kept, scores, jnp.inf))
    return jnp.where(count > 0, cut, jnp.inf)


def _search(
    values: Float[Array, "*shape"], count: Int[Array, ""], first: Scalar, score: Callable[[Array], Array]
) -> "_Bracket":
    """Narrow a bracket until its lower cut keeps what the ``count``-th largest score would keep."""
    scores = score(values)
    smallest = jnp.asarray(SMALLEST_SCORE, scores.dtype)
    positive = _count_reaching(scores, smallest)
    count = count.astype(jnp.int32)
    bracket = _Bracket(
        low=_to_ordered(smallest),
        high=_to_ordered(jnp.max(scores)) + 1,
        count_low=positive,
        count_high=jnp.int32(0),
        passes=jnp.int32(0),
    )

    def narrow(bracket: _Bracket) -> _Bracket:
        cut = _propose(bracket, count, first)
        # Tied to the cut: otherwise XLA takes the scores for the same in every pass, and keeps them.
        tied, cut = lax.optimization_barrier((values, cut))
        return bracket.split_at(cut, _count_reaching(score(tied), _from_ordered(cut)), count)

    return lax.while_loop(lambda bracket: bracket.is_open(count), narrow, bracket)


def top_scores_per_row(scores: Latents, count: Int[Array, ""]) -> Mask:
    """Mark the ``count`` largest positive scores of each row, by bisection over all rows at once.

    Ties at a row's cut are all kept, as in :func:`top_scores_cut`.

    Args:
        scores: float32 or float64, not negative.
        count: how many to keep in each row.
    """
    row_max = jnp.max(scores, axis=1)
    low = _to_ordered(jnp.full_like(row_max, SMALLEST_SCORE))
    high = jnp.maximum(_to_ordered(row_max) + 1, low)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        reaching = jnp.sum(scores >= _from_ordered(middle)[:, None], axis=1, dtype=jnp.int32)
        is_enough = reaching >= count
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle)

    low, _ = lax.fori_loop(0, jnp.iinfo(low.dtype).bits - 1, halve, (low, high))
    return (scores >= _from_ordered(low)[:, None]) & (count > 0)


class _Bracket(NamedTuple):
    """Cuts as ordered integers: at least ``count`` scores reach ``low``, fewer reach ``high``."""

    low: Int[Array, ""]
    high: Int[Array, ""]
    count_low: Int[Array, ""]
    count_high: Int[Array, ""]
    passes: Int[Array, ""]

    def is_open(self, count: Int[Array, ""]) -> Bool[Array, ""]:
        return (self.count_low > count) & (self.high - self.low > 1)

    def split_at(self, cut: Int[Array, ""], reaching: Int[Array, ""], count: Int[Array, ""]) -> "_Bracket":
        is_enough = reaching >= count
        return _Bracket(
            low=jnp.where(is_enough, cut, self.low),
            high=jnp.where(is_enough, self.high, cut),
            count_low=jnp.where(is_enough, reaching, self.count_low),
            count_high=jnp.where(is_enough, self.count_high, reaching),
            passes=self.passes + 1,
        )


def _propose(bracket: _Bracket, count: Int[Array, ""], first: Scalar) -> Int[Array, ""]:
    low, high = _from_ordered(bracket.low), _from_ordered(bracket.high)
    # 0.5 keeps the logarithm finite at the top of the bracket, which nothing reaches.
    log_low = jnp.log(bracket.count_low.astype(low.dtype) + 0.5)
    log_high = jnp.log(bracket.count_high.astype(low.dtype) + 0.5)
    fraction = (log_low - jnp.log(count.astype(low.dtype))) / (log_low - log_high)
    interpolated = _to_ordered(low + fraction * (high - low))
    middle = bracket.low + (bracket.high - bracket.low) // 2
    cut = jnp.where(bracket.passes % 3 == 2, middle, interpolated)
    cut = jnp.where((bracket.passes == 0) & (first > 0), _to_ordered(first), cut)
    return jnp.clip(cut, bracket.low + 1, bracket.high - 1)


def _count_reaching(scores: Array, cut: Scalar) -> Int[Array, ""]:
    reaching = scores >= cut
    if scores.size <= INT32_SCORES:
        return jnp.sum(reaching, dtype=jnp.int32)
    # A pod's batch can hold more scores than an int32 counts, but no row does. The float sum of the
    # rows is right to a thousandth, which tells whether the exact sum overflows.
    rows = jnp.sum(reaching, axis=-1, dtype=jnp.int32)
    is_countable = jnp.sum(rows.astype(jnp.float32)) < MOST_KEPT
    return jnp.where(is_countable, jnp.sum(rows, dtype=jnp.int32), MOST_KEPT)


def _to_ordered(value: Array) -> Array:
    """Return the bit pattern, which for non-negative floats is in the order of the floats."""
    return lax.bitcast_convert_type(value, jnp.int64 if value.dtype == jnp.float64 else jnp.int32)


def _from_ordered(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float64 if bits.dtype == jnp.int64 else jnp.float32)
