"""Adam, each of its moments as exact as its dtype allows, or in less memory."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Num


@dataclasses.dataclass(frozen=True)
class Adam:
    """``-rate * mhat / (sqrt(vhat) + eps)`` with the bias corrections, as the published runs used it.

    The two moments take twice the memory of the weights. ``first_moment="bfloat16"`` saves a quarter of
    that, ``second_moment="factored"`` half, and neither changes what a gradient is.

    Raises:
        ValueError: if a value is out of range.

    References:
        Kingma & Ba 2014, arXiv 1412.6980; factored moments: Shazeer & Stern 2018, arXiv 1804.04235.
    """

    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    first_moment: Literal["full", "bfloat16"] = "full"
    """What the first moment is kept in: the weights' dtype, or bfloat16, rounded at every step."""
    second_moment: Literal["full", "factored"] = "full"
    """Keep the second moment of each weight, or of encoder and decoder only its means over rows and over
    columns, whose product over their mean stands for it: one number per latent and one per coordinate."""

    def __post_init__(self) -> None:
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} of Adam must lie in [0, 1)")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps={self.eps} of Adam must be positive and finite")

    def transformation(self) -> optax.GradientTransformation:
        """Return the scaling of gradients, without the rate.

        Optax computes the correction ``1 - b2**t`` in float32 from a rounded ``b2``: for 0.999 it is wrong
        by 1.3e-5 at every step, and with it every update by 6e-6, always in one direction.
        """
        return optax.GradientTransformation(self._init, self._update)

    def _init(self, params: optax.Params) -> optax.OptState:
        return optax.ScaleByAdamState(
            count=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=self._first_dtype(leaf)), params),
            nu=jax.tree.map(self._no_second_moment, params),
        )

    def _update(
        self, updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        state = cast(optax.ScaleByAdamState, state)
        count = jnp.asarray(state.count) + 1
        mu = jax.tree.map(self._first_moment, state.mu, updates)
        nu = jax.tree.map(self._second_moment, updates, state.nu)

        def scaled(m: Array, v: "Array | Factors") -> Array:
            v = v.product() if isinstance(v, Factors) else v
            root = jnp.sqrt(v / _correction(self.b2, count, v.dtype)) + self.eps
            return m / _correction(self.b1, count, m.dtype) / root

        kept = jax.tree.map(lambda m: m.astype(self._first_dtype(m)), mu)
        return jax.tree.map(scaled, mu, nu), optax.ScaleByAdamState(count=count, mu=kept, nu=nu)

    def _first_dtype(self, weight: Any) -> jnp.dtype:
        return jnp.dtype(jnp.bfloat16) if self.first_moment == "bfloat16" else weight.dtype

    def _first_moment(self, m: Array, g: Array) -> Array:
        return self.b1 * m.astype(g.dtype) + (1 - self.b1) * g

    def _no_second_moment(self, weight: Array) -> "Array | Factors":
        if self.second_moment == "factored" and weight.ndim == 2:
            return Factors.of(jnp.zeros_like(weight))
        return jnp.zeros_like(weight)

    def _second_moment(self, g: Array, v: "Array | Factors") -> "Array | Factors":
        square = g * g
        if isinstance(v, Factors):
            return jax.tree.map(self._decayed, v, Factors.of(square))
        return self._decayed(v, square)

    def _decayed(self, v: Array, square: Array) -> Array:
        return self.b2 * v + (1 - self.b2) * square


class Factors(NamedTuple):
    """A non-negative matrix as its means over columns and over rows."""

    rows: Float[Array, "row"]
    columns: Float[Array, "column"]

    @classmethod
    def of(cls, matrix: Num[Array, "row column"]) -> "Factors":
        """Return the factors of a matrix."""
        return cls(jnp.mean(matrix, axis=1), jnp.mean(matrix, axis=0))

    def product(self) -> Float[Array, "row column"]:
        """Return the matrix of rank one that has these means, zero where there is none."""
        mean = jnp.mean(self.rows)
        share = self.rows / jnp.where(mean > 0, mean, 1.0)
        return share[:, None] * self.columns


def _correction(decay: float, count: Int[Array, ""], dtype: jnp.dtype) -> Float[Array, ""]:
    """Return ``1 - decay**count`` without cancellation."""
    if decay == 0:
        return jnp.ones((), dtype)
    return -jnp.expm1(count.astype(dtype) * math.log(decay))
