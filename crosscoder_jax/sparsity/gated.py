"""Gated: whether a latent is active is told apart from how strong it is."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from crosscoder_jax.sparsity.selection import SparseCode
from crosscoder_jax.typing import Latents, PerLatent


class Gate(NamedTuple):
    """How strong an active latent is: ``relu(exp(log_gain) * pre + shift)``."""

    log_gain: PerLatent
    shift: PerLatent
    """In units of activations."""


@dataclasses.dataclass(frozen=True)
class Gated:
    """Keep a latent where its pre-activation is positive, with a magnitude of its own.

    ``f = 1[pre > 0] * relu(exp(r) * pre + m)``, the paper's gates and magnitudes with their encoders tied.
    The step has no gradient: gates learn from :func:`~crosscoder_jax.objectives.gate_loss` and an L1
    penalty on ``relu(pre)`` times decoder norms that are held, which shrinks neither magnitude nor decoder.

    References:
        Rajamanoharan et al. 2024, arXiv 2404.16014.
    """

    def __call__(
        self,
        pre_acts: Latents,
        score_weights: PerLatent,
        *,
        step: Int[Array, ""] | int | None = None,
        threshold: Gate | None = None,
    ) -> SparseCode:
        """Return the code; ``threshold`` is the gate, by default one that leaves ``relu(pre)`` as it is.

        Examples:
            >>> gate = Gate(jnp.log(jnp.array([2.0, 1.0])), jnp.array([0.5, -1.0]))
            >>> Gated()(jnp.array([[3.0, 0.25], [-1.0, 4.0]]), jnp.ones(2), threshold=gate).code.tolist()
            [[6.5, 0.0], [0.0, 3.0]]
        """
        del step
        if threshold is None:
            threshold = Gate(jnp.zeros_like(score_weights), jnp.zeros_like(score_weights))
        return SparseCode(self.at_inference(pre_acts, score_weights, threshold), jnp.zeros((), jnp.float32))

    def at_inference(self, pre_acts: Latents, score_weights: PerLatent, threshold: Gate) -> Latents:
        """Return the same code as in training."""
        del score_weights
        gain, shift = jnp.exp(threshold.log_gain), threshold.shift
        magnitude = jax.nn.relu(gain.astype(pre_acts.dtype) * pre_acts + shift.astype(pre_acts.dtype))
        return jnp.where(pre_acts > 0, magnitude, jnp.zeros_like(magnitude))
