"""Exact selection of the largest scores by counting, without a sort and without a gather.

The k-th largest of many numbers is the largest cut that at least k of them reach. Counting how many
reach some cuts needs one pass over the scores and as many integers from each device, so the search is
exact on any mesh. Cuts are proposed about the one at which the logarithm of the count, interpolated, is
right: it is nearly linear in the score for the tails met here. One of each pass halves the bracket in the
ordering of the floats, which bounds the number of passes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import P, lax
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
    ordered = _to_ordered(score(values))
    first = jnp.asarray(0.0 if guess is None else guess, score(values).dtype)
    found = _search(values, count, first, score)
    cut = _from_ordered(_smallest_reaching(ordered, found.low))
    return jnp.where(count > 0, cut, jnp.inf)


def _search(
    values: Float[Array, "*shape"], count: Int[Array, ""], first: Scalar, score: Callable[[Array], Array]
) -> "_Bracket":
    """Narrow a bracket until its lower cut keeps what the ``count``-th largest score would keep."""
    smallest = _to_ordered(jnp.asarray(SMALLEST_SCORE, first.dtype))
    count = count.astype(jnp.int32)
    cuts = jnp.stack([smallest, *_about(_to_ordered(first), smallest)])
    largest, reaching = _largest_and_reaching(_to_ordered(score(values)), cuts)
    bracket = _Bracket(
        low=smallest, high=largest + 1, count_low=reaching[0], count_high=jnp.int32(0), passes=jnp.int32(1)
    )
    bracket = bracket.split_at(cuts, reaching, count)

    def narrow(bracket: _Bracket) -> _Bracket:
        cuts = _propose(bracket, count, first.dtype)
        # Tied to the cuts: otherwise XLA takes the scores for the same in every pass, and keeps them.
        tied, cuts = lax.optimization_barrier((values, cuts))
        reaching = _largest_and_reaching(_to_ordered(score(tied)), cuts)[1]
        return bracket.split_at(cuts, reaching, count)._replace(passes=bracket.passes + 1)

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

    def split_at(
        self, cuts: Int[Array, "cut"], reaching: Int[Array, "cut"], count: Int[Array, ""]
    ) -> "_Bracket":
        is_enough = reaching >= count
        return self._replace(
            low=jnp.max(jnp.where(is_enough, cuts, self.low)),
            high=jnp.minimum(self.high, jnp.min(jnp.where(is_enough, self.high, cuts))),
            count_low=jnp.min(jnp.where(is_enough, reaching, self.count_low)),
            count_high=jnp.max(jnp.where(is_enough, self.count_high, reaching)),
        )


def _about(guess: Int[Array, ""], smallest: Int[Array, ""]) -> list[Int[Array, ""]]:
    """Return a guess and cuts about 0.2 % and 1.6 % to either side of it, by its exponent and mantissa."""
    mantissa = jnp.finfo(_float_of(guess)).nmant
    steps = [sign * (1 << (mantissa - power)) for power in (9, 6) for sign in (1, -1)]
    return [jnp.maximum(guess + step, smallest) for step in (0, *steps)]


def _propose(bracket: _Bracket, count: Int[Array, ""], dtype: jnp.dtype) -> Int[Array, "cut"]:
    """Return the cut at which the count is expected, two on either side, and the middle of the bracket."""
    low, high = _from_ordered(bracket.low), _from_ordered(bracket.high)
    # 0.5 keeps the logarithm finite at the top of the bracket, which nothing reaches.
    log_low = jnp.log(bracket.count_low.astype(dtype) + 0.5)
    log_high = jnp.log(bracket.count_high.astype(dtype) + 0.5)
    fraction = (log_low - jnp.log(count.astype(dtype))) / (log_low - log_high)
    first, last = bracket.low + 1, bracket.high - 1
    expected = jnp.clip(_to_ordered(low + fraction * (high - low)), first, last)
    # Of n scores in a bracket the one that is sought lies within about sqrt(n) of where it is expected.
    between = (bracket.count_low - bracket.count_high).astype(dtype)
    step = (bracket.high - bracket.low).astype(dtype) / jnp.sqrt(between)
    cuts = [bracket.low + (bracket.high - bracket.low) // 2, expected]
    for share in (0.25, 1):
        off = jnp.maximum((share * step).astype(expected.dtype), 1)
        cuts += [expected - jnp.minimum(off, expected - first), expected + jnp.minimum(off, last - expected)]
    return jnp.stack(cuts)


def _largest_and_reaching(
    ordered: Int[Array, "*shape"], cuts: Int[Array, "cut"]
) -> tuple[Int[Array, ""], Int[Array, "cut"]]:
    """Return the largest of many numbers and how many reach each cut, in one pass over them."""
    is_countable = ordered.size <= INT32_SCORES

    def of_shard(shard: Array, cuts: Array, names: tuple[str, ...]) -> tuple[Array, Array]:
        reaching = [(shard >= cut).astype(jnp.int32) for cut in cuts]
        axes = tuple(range(shard.ndim)) if is_countable else (shard.ndim - 1,)
        largest, *counts = _reduced(shard, reaching, jnp.maximum, axes)
        largest, counts = jnp.max(largest), jnp.stack(counts)
        if names:
            largest = lax.pmax(largest, names)
        return largest, _total(counts, names) if is_countable else _total_of_rows(counts, names)

    return _over_shards(of_shard, ordered, cuts)


def _smallest_reaching(ordered: Int[Array, "*shape"], cut: Int[Array, ""]) -> Int[Array, ""]:
    """Return the smallest number that reaches a cut, that of infinity if none does."""
    nothing = _to_ordered(jnp.asarray(jnp.inf, _float_of(cut)))

    def of_shard(shard: Array, cut: Array, names: tuple[str, ...]) -> Array:
        is_reaching, largest = shard >= cut, jnp.iinfo(shard.dtype).max
        kept, mask = jnp.where(is_reaching, shard, largest), is_reaching.astype(jnp.int32)
        smallest, number = _reduced(kept, [mask], jnp.minimum, tuple(range(shard.ndim)))
        # The number may wrap around; it is asked for so that it is part of the reduction.
        smallest = jnp.where((number == 0) & (smallest == largest), nothing, smallest)
        return lax.pmin(smallest, names) if names else smallest

    return _over_shards(of_shard, ordered, cut)


def _reduced(
    values: Array, masks: list[Array], extreme: Callable[[Array, Array], Array], axes: tuple[int, ...]
) -> list[Array]:
    """Return the largest or smallest of values, and the sums of masks, in one pass.

    As one reduction of several operands: XLA for CPU writes the comparison of a single one to memory first,
    and then takes fifteen times as long.
    """

    def combine(left: list[Array], right: list[Array]) -> list[Array]:
        sums = [one + other for one, other in zip(left[1:], right[1:], strict=True)]
        return [extreme(left[0], right[0]), *sums]

    info = jnp.iinfo(values.dtype)
    first = info.min if extreme is jnp.maximum else info.max
    starts = [jnp.asarray(first, values.dtype), *[jnp.int32(0)] * len(masks)]
    return lax.reduce([values, *masks], starts, combine, axes)


def _total(counts: Array, names: tuple[str, ...]) -> Array:
    return lax.psum(counts, names) if names else counts


def _total_of_rows(counts: Int[Array, "cut *rows"], names: tuple[str, ...]) -> Int[Array, "cut"]:
    """Return sums that may be more than an int32 holds, though no row is: at most :data:`MOST_KEPT`.

    The float sum of the rows is right to a thousandth, which tells whether the exact one overflows.
    """
    rows = tuple(range(1, counts.ndim))
    is_countable = _total(jnp.sum(counts.astype(jnp.float32), axis=rows), names) < MOST_KEPT
    exact = jnp.where(is_countable, jnp.sum(counts, axis=rows, dtype=jnp.int32), 0)
    return jnp.where(is_countable, _total(exact, names), MOST_KEPT)


def _over_shards(of_shard: Callable[..., Any], ordered: Array, cuts: Array) -> Any:
    """Call a function of an array, cuts and the mesh axes it is spread over on each shard of the array."""
    sharding = jax.typeof(ordered).sharding
    if sharding.mesh.empty:
        return of_shard(ordered, cuts, ())
    names = tuple(jax.tree.leaves([entry for entry in sharding.spec if entry is not None]))
    spread = jax.shard_map(
        lambda shard, cuts: of_shard(shard, cuts, names), in_specs=(sharding.spec, P()), out_specs=P()
    )
    return spread(ordered, cuts)


def _to_ordered(value: Array) -> Array:
    """Return the bit pattern, which for non-negative floats is in the order of the floats."""
    return lax.bitcast_convert_type(value, jnp.int64 if value.dtype == jnp.float64 else jnp.int32)


def _from_ordered(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float64 if bits.dtype == jnp.int64 else jnp.float32)


def _float_of(bits: Array) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if bits.dtype == jnp.int64 else jnp.float32)
