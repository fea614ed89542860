"""Measure a crosscoder on held-out tokens, and calibrate its inference threshold on them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from crosscoder_jax.activations.batches import StoredBatch, sequential_batches
from crosscoder_jax.activations.view import TokenView
from crosscoder_jax.crosscoder import Crosscoder
from crosscoder_jax.metrics import explained_variance, frequency_metrics, named_thresholds
from crosscoder_jax.sharding import check_divisible, place, to_host
from crosscoder_jax.sources import Sources
from crosscoder_jax.sparsity import BatchTopK, TopK, ranking_scores
from crosscoder_jax.training.step import EvalBatch, eval_step
from crosscoder_jax.typing import Acts, Latents, Progress

_NUM_CUTS = 64
_MAX_PASSES = 6
_L0_TOLERANCE = 1e-3
_FLOATS = np.finfo(np.float32)
_FIRST_CUTS = np.array([_FLOATS.tiny, *np.geomspace(1e-6, 1e6, _NUM_CUTS - 2), _FLOATS.max], np.float32)
"""Close together where scores of normalised activations are, and to the ends of float32 for others."""


def evaluate(
    crosscoder: Crosscoder, view: TokenView, *, batch_size: int = 1024, progress: Progress | None = None
) -> dict[str, Any]:
    """Measure variance explained, L0 and latent frequencies over all tokens of a view.

    Sums over the corpus are in float64. Only the metrics of the training rule depend on the batch
    size, and only as BatchTopK itself does. A crosscoder on a mesh is measured there; of several processes
    all call this, and each reads the whole view.

    Args:
        crosscoder: with its inference threshold.
        view: held-out tokens.
        batch_size: tokens per step.
        progress: told the tokens done.

    Returns:
        ``fve`` and ``fve/<source>`` at the inference rule, ``fve_training_rule``, both L0s, the
        fractions of latents that are ``dead``, firing on none of these tokens, and ``dense``,
        ``threshold`` (``threshold/<name>`` where sources or groups have their own) and ``num_tokens``.

    Raises:
        StoreError: if a file of the store is damaged.
        ValueError: if the view holds no token, the store lacks a source of the crosscoder, or the batch
            size does not spread over the mesh that is set.
    """
    totals: EvalBatch | None = None
    done = 0
    for batch in sequential_batches(view, _rows(crosscoder, batch_size, view.num_tokens)):
        measured = eval_step(crosscoder, *_placed(batch, crosscoder, view.store.sources))
        host = jax.tree.map(lambda value: to_host(value).astype(np.float64), measured)
        totals = host if totals is None else jax.tree.map(np.add, totals, host)
        done += int(batch.is_valid.sum())
        if progress is not None:
            progress(done, view.num_tokens, "tokens")
    if totals is None:
        raise ValueError("the view holds no token to measure")
    sources = crosscoder.config.sources
    inference = explained_variance(totals.inference, sources)
    thresholds = named_thresholds(crosscoder.threshold[...], crosscoder.config.threshold_names)
    return {
        "num_tokens": done,
        **{name: float(value) for name, value in inference.items()},
        "fve_training_rule": float(explained_variance(totals.training, sources)["fve"]),
        "l0_inference_rule": float(totals.active_inference) / done,
        "l0_training_rule": float(totals.active_training / totals.training.tokens),
        **{name: float(value) for name, value in thresholds.items()},
        **frequency_metrics(np.asarray(totals.fired), done),
    }


def calibrate(
    crosscoder: Crosscoder, view: TokenView, *, batch_size: int = 1024, progress: Progress | None = None
) -> Crosscoder:
    """Return the crosscoder with the threshold at which the mean L0 over a view is its k.

    Scores at or above each of 64 cuts are counted in one pass over the view; the bracket around
    ``k * tokens`` is refined until the L0 is within 0.1 % of k or the cuts cannot be told apart. Where
    sources, or groups of latents with a k of their own, have their own thresholds they are found one after
    the other.

    Args:
        crosscoder: trained with BatchTopK; not changed.
        view: held-out tokens.
        batch_size: tokens per step; does not change the result.
        progress: told the tokens done, over all passes.

    Raises:
        StoreError: if a file of the store is damaged.
        ValueError: if the crosscoder has no threshold to calibrate, or too few of its scores are positive
            to reach its k; as :func:`evaluate` for the store and the batch size.
    """
    sparsity = crosscoder.config.sparsity
    if not isinstance(sparsity, BatchTopK):
        is_counted = isinstance(sparsity, TopK)
        reason = "it keeps k of every token" if is_counted else "its penalty has trained what is active"
        raise ValueError(
            f"sparsity={sparsity} has no threshold to calibrate: {reason}; evaluate the crosscoder as it is"
        )
    threshold = crosscoder.threshold[...]
    search = _Search(crosscoder, view, batch_size, progress, num_cuts=threshold.size)
    own = [budget.k for budget in crosscoder.config.layout.budgets] or [None] * threshold.size
    found = [search.cut(sparsity.k if k is None else k, i) for i, k in enumerate(own)]
    search.tell(threshold.size * _MAX_PASSES, 0)
    calibrated = nnx.clone(crosscoder)
    calibrated.threshold[...] = jnp.asarray(found, jnp.float32).reshape(threshold.shape)
    return calibrated


def _rows(crosscoder: Crosscoder, batch_size: int, num_tokens: int) -> int:
    """Return the rows of a batch: few enough to fill one, as the training rule needs, on any mesh."""
    spec = crosscoder.shardings.acts_bw
    if spec is None:
        return min(batch_size, num_tokens)
    mesh, axis = jax.sharding.get_mesh(), spec[0]
    check_divisible("batch_size", batch_size, mesh, axis)
    shards = mesh.shape[axis]
    return max(min(batch_size, num_tokens // shards * shards), shards)


def _placed(batch: StoredBatch, crosscoder: Crosscoder, stored: Sources) -> tuple[Acts, Array]:
    """Return a stored batch as the crosscoder's sources, raw units, float32, and which rows are tokens."""
    shardings = crosscoder.shardings
    acts = crosscoder.config.sources.read(place(batch.acts, shardings.acts_bw), stored)
    return acts, place(batch.is_valid, shardings.per_batch_b)


@dataclasses.dataclass(frozen=True)
class _Search:
    """The search for the cuts on scores that leave k latents per token."""

    crosscoder: Crosscoder
    view: TokenView
    batch_size: int
    progress: Progress | None
    num_cuts: int
    """How many are searched for: one, or one per source or budget of latents."""

    def cut(self, k: float, index: int) -> np.float32:
        """Return the cut with this index."""
        wanted = k * self.view.num_tokens
        cuts, best = _FIRST_CUTS, 0
        for done_passes in range(_MAX_PASSES):
            counts = self._count_above(cuts, index, index * _MAX_PASSES + done_passes)
            if counts[0] < wanted * (1 - _L0_TOLERANCE):
                raise ValueError(
                    f"k={k} cannot be reached: only {counts[0] / self.view.num_tokens:.2f} latents per token "
                    "have a positive score: calibrate on text like that of the training, or lower k"
                )
            best = int(np.argmin(np.abs(counts - wanted)))
            above = int(np.flatnonzero(counts >= wanted * (1 - _L0_TOLERANCE))[-1])
            low, high = cuts[above], cuts[min(above + 1, _NUM_CUTS - 1)]
            if abs(counts[best] / wanted - 1) <= _L0_TOLERANCE or high <= np.nextafter(low, high):
                break
            cuts = np.geomspace(float(low), float(high), _NUM_CUTS).astype(np.float32)
        return cuts[best]

    def tell(self, done_passes: int, done_tokens: int) -> None:
        """Report the tokens read."""
        if self.progress is not None:
            passes, tokens = self.num_cuts * _MAX_PASSES, self.view.num_tokens
            self.progress(done_passes * tokens + done_tokens, passes * tokens, "tokens")

    def _count_above(self, cuts: Float[np.ndarray, "cuts"], index: int, done_passes: int) -> np.ndarray:
        """Count over the view how many scores are above each cut, as the inference rule compares them."""
        counts, done = np.zeros(len(cuts), np.int64), 0
        for batch in sequential_batches(self.view, self.batch_size):
            acts, is_valid = _placed(batch, self.crosscoder, self.view.store.sources)
            scores = _scores(self.crosscoder, acts, is_valid, jnp.int32(index))
            counts += _from_digits(np.asarray(_counts_above(scores, jnp.asarray(cuts))), len(scores))
            done += int(batch.is_valid.sum())
            self.tell(done_passes, done)
        return counts


@jax.jit
def _scores(
    crosscoder: Crosscoder, acts: Acts, is_valid: Bool[Array, "batch"], index: Int[Array, ""]
) -> Latents:
    pre_acts = crosscoder.pre_acts(crosscoder.normalize(acts))
    weights = crosscoder.score_weights()
    weights = weights[index] if crosscoder.config.is_decoupled else weights
    if crosscoder.config.layout.budgets:
        pre_acts = jnp.where(crosscoder.config.layout.budget_of(crosscoder.shardings) == index, pre_acts, 0.0)
    return jnp.where(is_valid[:, None], ranking_scores(jax.nn.relu(pre_acts), weights), 0.0)


@jax.jit
def _counts_above(scores: Latents, cuts: Float[Array, "cuts"]) -> Int[Array, "cuts digit"]:
    """Count the scores above each cut, which may be more than an int32 holds; no row has so many."""
    return jax.lax.map(lambda cut: _sum_of_digits(jnp.sum(scores > cut, axis=1, dtype=jnp.int32)), cuts)


def _sum_of_digits(numbers: Int[Array, "number"]) -> Int[Array, "digit"]:
    """Return the sum of non-negative int32s as sums of their digits, none of which overflows."""
    bits = _digit_bits(numbers.size)
    digits = [(numbers >> shift) & ((1 << bits) - 1) for shift in range(0, 31, bits)]
    return jnp.stack([jnp.sum(digit, dtype=jnp.int32) for digit in digits])


def _from_digits(sums: Int[np.ndarray, "sums digit"], summed: int) -> Int[np.ndarray, "sums"]:
    """Return sums of so many numbers each from the sums of their digits."""
    shifts = _digit_bits(summed) * np.arange(sums.shape[-1], dtype=np.int64)
    return np.sum(sums.astype(np.int64) << shifts, axis=-1)


def _digit_bits(summed: int) -> int:
    """Return the bits that digits have whose sum over so many numbers stays below 2**31."""
    return 31 - summed.bit_length()
