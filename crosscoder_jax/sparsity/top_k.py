"""TopK: keep the k largest scores of each token."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from crosscoder_jax.sparsity.selection import SparseCode, ranking_scores, top_scores_per_row
from crosscoder_jax.typing import Latents, PerLatent, Scalar


@dataclasses.dataclass(frozen=True)
class TopK:
    """Keep the ``k`` largest ``relu(pre) * weight`` of every token, in training and at inference.

    The selection carries no gradient, the kept values do. Ties at the cut are all kept. There is no
    threshold: a token's code depends on the token alone as it is.

    Raises:
        ValueError: if k is not positive.

    References:
        Gao et al. 2024, arXiv 2406.04093.
    """

    k: int
    """Latents kept per token."""

    def __post_init__(self) -> None:
        if self.k <= 0:
            raise ValueError(f"k={self.k} must be positive")

    def with_k(self, k: float) -> "TopK":
        """Return the same rule for another k.

        Raises:
            ValueError: if k is not whole: every token has as many.
        """
        if k != int(k):
            raise ValueError(
                f"k={k} must be whole for TopK, which keeps as many of every token: use BatchTopK"
            )
        return TopK(int(k))

    def __call__(
        self,
        pre_acts: Latents,
        score_weights: PerLatent,
        *,
        step: Int[Array, ""] | int | None = None,
        threshold: Scalar | None = None,
    ) -> SparseCode:
        """Return the code of a batch; step and threshold play no part.

        Examples:
            >>> pre = jnp.array([[3.0, 1.0, -1.0], [0.5, 2.0, 0.25]])
            >>> TopK(k=1)(pre, jnp.array([1.0, 1.0, 20.0])).code.tolist()
            [[3.0, 0.0, 0.0], [0.0, 0.0, 0.25]]
        """
        del step, threshold
        acts = jax.nn.relu(pre_acts)
        scores = lax.stop_gradient(ranking_scores(acts, score_weights))
        kept = top_scores_per_row(scores, jnp.int32(self.k))
        return SparseCode(jnp.where(kept, acts, jnp.zeros_like(acts)), jnp.zeros((), jnp.float32))

    def at_inference(self, pre_acts: Latents, score_weights: PerLatent, threshold: Scalar) -> Latents:
        """Return the same code as in training."""
        return self(pre_acts, score_weights, threshold=threshold).code
