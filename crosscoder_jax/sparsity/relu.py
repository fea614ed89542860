"""ReLU: the code of crosscoders that are made sparse by a penalty."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from crosscoder_jax.sparsity.selection import SparseCode, apply_threshold
from crosscoder_jax.typing import Latents, PerLatent, Scalar


@dataclasses.dataclass(frozen=True)
class ReLU:
    """Keep every positive pre-activation; sparsity comes from the loss (L1 of norms).

    References:
        Lindsey et al. 2024, transformer-circuits.pub/2024/crosscoders.
    """

    def __call__(
        self,
        pre_acts: Latents,
        score_weights: PerLatent,
        *,
        step: Int[Array, ""] | int | None = None,
        threshold: Scalar | None = None,
    ) -> SparseCode:
        """Return the code; score weights, step and threshold play no part.

        Examples:
            >>> ReLU()(jnp.array([[3.0, -1.0]]), jnp.ones(2)).code.tolist()
            [[3.0, 0.0]]
        """
        del score_weights, step, threshold
        return SparseCode(jax.nn.relu(pre_acts), jnp.zeros((), jnp.float32))

    def at_inference(self, pre_acts: Latents, score_weights: PerLatent, threshold: Scalar) -> Latents:
        """Return what exceeds the threshold, which is 0 unless somebody set one."""
        return apply_threshold(pre_acts, score_weights, threshold)
