"""BatchTopK: keep the k * batch largest scores of a whole batch."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from crosscoder_jax.sparsity.selection import (
    MOST_KEPT,
    SparseCode,
    apply_threshold,
    ranking_scores,
    top_scores_cut,
)
from crosscoder_jax.typing import Latents, PerLatent, Scalar


@dataclasses.dataclass(frozen=True)
class BatchTopK:
    """Keep the ``k * batch`` largest ``relu(pre) * weight`` of the global batch.

    The selection carries no gradient, the kept values do. Ties at the cut are all kept, where the
    published code lets the sort decide, and zeros never are. There a starting k without annealing steps
    stays for ever; here one is not accepted without the other.

    Raises:
        ValueError: if k or the annealing is not positive; when called, if k of a batch is less than half a
            score or more scores than can be counted.

    References:
        Bussmann et al. 2024, arXiv 2412.06410; for crosscoders Minder et al. 2025, arXiv 2504.02922.
    """

    k: float
    """Mean number of latents kept per token; need not be whole."""
    initial_k: float | None = None
    """Where annealing starts; ``None`` trains with ``k`` from the first step."""
    anneal_steps: int = 0
    """Steps over which k goes linearly from ``initial_k`` to ``k``."""
    is_k_whole: bool = False
    """Round k to a whole number at every step of the annealing, as the published code does; otherwise
    only ``k * batch`` is rounded, and k falls in finer steps."""

    def __post_init__(self) -> None:
        if not 0 < self.k < math.inf:
            raise ValueError(f"k={self.k} must be positive and finite")
        if (self.initial_k is None) != (self.anneal_steps == 0):
            raise ValueError(
                f"initial_k={self.initial_k} and anneal_steps={self.anneal_steps} go together: "
                "give both or neither"
            )
        if self.initial_k is not None and not 0 < self.initial_k < math.inf:
            raise ValueError(f"initial_k={self.initial_k} must be positive and finite")
        if self.anneal_steps < 0:
            raise ValueError(f"anneal_steps={self.anneal_steps} must not be negative")

    def with_k(self, k: float) -> "BatchTopK":
        """Return the same rule for another k; what it is annealed from changes in proportion."""
        initial_k = None if self.initial_k is None else self.initial_k * k / self.k
        return dataclasses.replace(self, k=k, initial_k=initial_k)

    def k_at(self, step: Int[Array, ""] | int | None) -> Scalar:
        """Return k at a training step; ``None`` stands for the end of training."""
        if self.initial_k is None or step is None:
            return jnp.float32(self.k)
        if self.is_k_whole:
            return self._whole_k_at(self.initial_k, jnp.asarray(step))
        progress = jnp.clip(jnp.asarray(step, jnp.float32) / self.anneal_steps, 0.0, 1.0)
        return self.initial_k + (self.k - self.initial_k) * progress

    def _whole_k_at(self, initial_k: float, step: Int[Array, ""]) -> Scalar:
        # In double precision on the host, so that a half is rounded as the published code rounds it.
        progress = np.arange(self.anneal_steps) / self.anneal_steps
        values = np.append(np.maximum(np.rint(initial_k - (initial_k - self.k) * progress), 1), self.k)
        changes = np.flatnonzero(np.diff(values)) + 1
        passed = jnp.searchsorted(jnp.asarray(changes, jnp.int32), step.astype(jnp.int32), side="right")
        return jnp.asarray(values[np.append(0, changes)], jnp.float32)[passed]

    def _check_count(self, batch_size: int) -> None:
        for k in (self.k, self.k if self.initial_k is None else self.initial_k):
            if not 1 <= round(k * batch_size) < MOST_KEPT:
                raise ValueError(
                    f"k={k} keeps {round(k * batch_size)} scores of a batch of {batch_size}, but at least 1 "
                    f"and fewer than {MOST_KEPT} can be kept: change k or the batch size"
                )

    def _count(self, step: Int[Array, ""] | int | None, batch_size: int) -> Int[Array, ""]:
        # Without annealing the product is taken in double precision: float32 counts stop at 2^24.
        if self.initial_k is None or step is None:
            return jnp.int32(round(self.k * batch_size))
        return jnp.round(self.k_at(step) * batch_size).astype(jnp.int32)

    def __call__(
        self,
        pre_acts: Latents,
        score_weights: PerLatent,
        *,
        step: Int[Array, ""] | int | None = None,
        threshold: Scalar | None = None,
    ) -> SparseCode:
        """Return the code of a batch and its smallest kept score.

        The step anneals k. The running threshold is tried first: it saves passes and changes nothing.

        Examples:
            >>> pre = jnp.array([[3.0, 1.0, -1.0], [0.5, 2.0, 0.25]])
            >>> code, smallest = BatchTopK(k=1)(pre, jnp.array([1.0, 1.0, 20.0]))
            >>> code.tolist(), float(smallest)
            ([[3.0, 0.0, 0.0], [0.0, 0.0, 0.25]], 3.0)
        """
        cut = self.cut(pre_acts, score_weights, step=step, threshold=threshold)
        acts = jax.nn.relu(pre_acts)
        is_kept = ranking_scores(lax.stop_gradient(acts), lax.stop_gradient(score_weights)) >= cut
        return SparseCode(jnp.where(is_kept, acts, jnp.zeros_like(acts)), cut)

    def cut(
        self,
        pre_acts: Latents,
        score_weights: PerLatent,
        *,
        step: Int[Array, ""] | int | None = None,
        threshold: Scalar | None = None,
    ) -> Scalar:
        """Return the smallest score of a batch that is kept, without a gradient; ``inf`` if none is."""
        self._check_count(pre_acts.shape[0])
        score_weights = lax.stop_gradient(score_weights)

        def score(pre_acts: Latents) -> Latents:
            return ranking_scores(jax.nn.relu(pre_acts), score_weights)

        count = self._count(step, pre_acts.shape[0])
        return top_scores_cut(lax.stop_gradient(pre_acts), count, guess=threshold, score=score)

    def most_kept(self, batch_size: int) -> int:
        """Return how many scores of a batch are kept at most, ties at the cut left out."""
        return round(max(self.k, self.initial_k or self.k) * batch_size)

    def at_inference(self, pre_acts: Latents, score_weights: PerLatent, threshold: Scalar) -> Latents:
        """Return what exceeds the threshold, whatever else is in the batch."""
        return apply_threshold(pre_acts, score_weights, threshold)
