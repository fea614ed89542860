"""JumpReLU: a learned threshold for every latent."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from crosscoder_jax.sparsity.selection import SparseCode, apply_threshold, ranking_scores
from crosscoder_jax.typing import Latents, PerLatent


@dataclasses.dataclass(frozen=True)
class JumpReLU:
    """Keep what exceeds a threshold of its latent, learned with straight-through gradients.

    ``f = relu(pre) * H(score - theta)`` with ``score = relu(pre) * weight``. The step H has no useful
    gradient; in its place the thresholds get the one of a rectangle of width ``bandwidth``. A step
    counts for nothing by itself: train with :class:`~crosscoder_jax.objectives.L0Penalty`.

    The thresholds are parameters in units of scores, not their logarithms. Scores are about
    sqrt(width) times larger than weights, and Adam moves every parameter by about the learning rate:
    thresholds move sqrt(width) times the learning rate per step, or they would not arrive.

    Raises:
        ValueError: if a value is not positive.

    References:
        Rajamanoharan et al. 2024, arXiv 2407.14435.
    """

    initial_threshold: float = 0.1
    """What every latent's threshold starts with, in units of scores."""
    bandwidth: float = 0.5
    """Width of the rectangle, in units of scores: tokens whose score is within half of it of a
    threshold tell the threshold where to go. The paper's 0.001 belongs to millions of tokens a step."""

    def __post_init__(self) -> None:
        for name in ("initial_threshold", "bandwidth"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite")

    def __call__(
        self,
        pre_acts: Latents,
        score_weights: PerLatent,
        *,
        step: Int[Array, ""] | int | None = None,
        threshold: PerLatent | None = None,
    ) -> SparseCode:
        """Return the code of a batch by the threshold of each latent, ``initial_threshold`` by default.

        Examples:
            >>> pre = jnp.array([[3.0, 1.0, -1.0], [0.5, 2.0, 0.25]])
            >>> JumpReLU()(pre, jnp.ones(3), threshold=jnp.array([1.0, 1.0, 0.2])).code.tolist()
            [[3.0, 0.0, 0.0], [0.0, 2.0, 0.25]]
        """
        del step
        acts = jax.nn.relu(pre_acts)
        if threshold is None:
            threshold = jnp.full_like(score_weights, self.initial_threshold)
        code = _jump(acts, jax.lax.stop_gradient(score_weights), threshold, self.bandwidth)
        return SparseCode(jnp.asarray(code), jnp.zeros((), jnp.float32))

    def num_active(
        self, pre_acts: Latents, score_weights: PerLatent, threshold: PerLatent
    ) -> Float[Array, "batch"]:
        """Count each token's active latents, with a straight-through gradient for the thresholds.

        Args:
            pre_acts: encoder outputs in normalised units.
            score_weights: as in :meth:`__call__`.
            threshold: of each latent, in units of scores.
        """
        scores = jax.lax.stop_gradient(ranking_scores(jax.nn.relu(pre_acts), score_weights))
        return jnp.sum(_step(scores, threshold, self.bandwidth), axis=-1)

    def at_inference(self, pre_acts: Latents, score_weights: PerLatent, threshold: PerLatent) -> Latents:
        """Return the same code as in training."""
        return apply_threshold(pre_acts, score_weights, threshold)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _jump(acts: Latents, score_weights: PerLatent, threshold: PerLatent, bandwidth: float) -> Latents:
    return jnp.where(ranking_scores(acts, score_weights) > threshold, acts, jnp.zeros_like(acts))


def _jump_forward(
    acts: Latents, score_weights: PerLatent, threshold: PerLatent, bandwidth: float
) -> tuple[Latents, tuple[Latents, PerLatent, PerLatent]]:
    return _jump(acts, score_weights, threshold, bandwidth), (acts, score_weights, threshold)


def _jump_backward(
    bandwidth: float, saved: tuple[Latents, PerLatent, PerLatent], cotangent: Latents
) -> tuple[Latents, PerLatent, PerLatent]:
    acts, score_weights, threshold = saved
    scores = ranking_scores(acts, score_weights)
    to_acts = jnp.where(scores > threshold, cotangent, 0.0)
    # df/dtheta = -acts * delta(score - theta); where nothing is active there is no jump to move.
    near = _rectangle(scores - threshold, bandwidth)
    return to_acts, jnp.zeros_like(score_weights), -jnp.sum(cotangent * acts * near, axis=0)


_jump.defvjp(_jump_forward, _jump_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _step(scores: Latents, threshold: PerLatent, bandwidth: float) -> Latents:
    return ((scores > threshold) & (scores > 0)).astype(scores.dtype)


def _step_forward(
    scores: Latents, threshold: PerLatent, bandwidth: float
) -> tuple[Latents, tuple[Latents, PerLatent]]:
    return _step(scores, threshold, bandwidth), (scores, threshold)


def _step_backward(
    bandwidth: float, saved: tuple[Latents, PerLatent], cotangent: Latents
) -> tuple[Latents, PerLatent]:
    scores, threshold = saved
    near = _rectangle(scores - threshold, bandwidth) * (scores > 0)
    return jnp.zeros_like(scores), -jnp.sum(cotangent * near, axis=0)


_step.defvjp(_step_forward, _step_backward)


def _rectangle(distance: Latents, bandwidth: float) -> Latents:
    """Return the kernel's density: 1 / bandwidth within half of it, else 0."""
    return (jnp.abs(distance) < bandwidth / 2) / bandwidth
