"""Muon: a momentum whose singular values are made equal, in half of Adam's memory."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax import P
from jaxtyping import Array, Float, Int

from crosscoder_jax.training.adam import Adam, Moments, correction, init_each, moment_dtype, move_each

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5
_EPSILON = 1e-8


@dataclasses.dataclass(frozen=True)
class Muon:
    """``-rate * update_rms * sqrt(n) * orthogonalised(momentum)`` for encoder and decoder, Adam for all else.

    ``n`` is the longer side, and the root of the mean square of an update then ``update_rms`` whatever its
    shape: with 1 that of Adam's first updates, so that a rate that suits Adam does here. No second moment of
    encoder and decoder is kept: the state takes half the memory. Five Newton-Schulz iterations multiply each
    of the two matrices by itself and by ``[width, width]``: ``40 width^2 latents`` FLOPs beside a step's ``10
    batch width latents``, as much where the batch is four times the width. Over a mesh, partial sums
    ``[width, width]`` are added up over ``latent``.

    ``optax.contrib.muon``, with which it agrees, cannot take a matrix that is spread over an explicit mesh.

    Raises:
        ValueError: if a value is out of range.

    References:
        Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the scale: Liu et al. 2025,
        arXiv 2502.16982.
    """

    decay: float = 0.95
    """Of the momentum (Nesterov's)."""
    update_rms: float = 1.0
    """Root of the mean square of an update, for a rate of 1. Liu et al. take the 0.2 that Adam's fall to in
    language models; dictionaries then learned more slowly than with Adam at the same rate."""
    first_moment: Literal["full", "bfloat16"] = "full"
    """What the momentum is kept in: the weights' dtype, or bfloat16, rounded at every step."""
    others: Adam = Adam()
    """For biases and thresholds."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay} of Muon must lie in [0, 1)")
        if not 0 < self.update_rms < math.inf:
            raise ValueError(f"update_rms={self.update_rms} of Muon must be positive and finite")

    def transformation(self) -> optax.GradientTransformation:
        """Return the scaling of gradients, without the rate."""
        return optax.GradientTransformation(self._init, self._update)

    def _init(self, params: optax.Params) -> optax.OptState:
        return init_each(self._begin, params)

    def _update(
        self, updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        return move_each(self._move, updates, state)

    def _begin(self, weight: Array) -> Moments:
        if weight.ndim != 2:
            return self.others.begin(weight)
        dtype = moment_dtype(self.first_moment, weight)
        return Moments(jnp.zeros_like(weight, dtype=dtype), optax.EmptyState())

    def _move(self, grad: Array, moments: Moments, count: Int[Array, ""]) -> tuple[Array, Moments]:
        if grad.ndim != 2:
            return self.others.move(grad, moments, count)
        mu = self.decay * moments.mu.astype(grad.dtype) + (1 - self.decay) * grad
        ahead = self.decay * mu / correction(self.decay, count + 1, mu.dtype)
        ahead += (1 - self.decay) * grad / correction(self.decay, count, mu.dtype)
        update = self.update_rms * math.sqrt(max(grad.shape)) * orthogonalized(ahead)
        return update, moments._replace(mu=mu.astype(moments.mu.dtype))


def orthogonalized(matrix: Float[Array, "row column"]) -> Float[Array, "row column"]:
    """Return a matrix of the same singular vectors, its singular values about 1 (0.7 to 1.2) but near zero.

    A matrix of zeros stays one. Over a mesh the products along the longer side are partial sums.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalized(matrix.T).T
    spec = jax.typeof(matrix).sharding.spec
    is_spread = not jax.typeof(matrix).sharding.mesh.empty
    whole, laid_out = (P(None, None), P(*spec)) if is_spread else (None, None)
    first, second, third = _COEFFICIENTS
    x = matrix / (jnp.sqrt(jnp.sum(jnp.square(matrix))) + _EPSILON)
    for _ in range(_NUM_ITERATIONS):
        gram = jnp.einsum("ik,jk->ij", x, x, out_sharding=whole)
        mixing = second * gram + third * gram @ gram
        x = first * x + jnp.einsum("ij,jk->ik", mixing, x, out_sharding=laid_out)
    return x
