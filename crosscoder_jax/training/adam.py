"""Adam, each of its moments as exact as its dtype allows, or in less memory."""

import dataclasses
import math
from collections.abc import Callable
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
        return init_each(self.begin, params)

    def _update(
        self, updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        return move_each(self.move, updates, state)

    def begin(self, weight: Array) -> "Moments":
        """Return the moments of a weight before the first step."""
        is_factored = self.second_moment == "factored" and weight.ndim == 2
        nothing = jnp.zeros_like(weight)
        return Moments(
            jnp.zeros_like(weight, dtype=moment_dtype(self.first_moment, weight)),
            Factors.of(nothing) if is_factored else nothing,
        )

    def move(self, grad: Array, moments: "Moments", count: Int[Array, ""]) -> tuple[Array, "Moments"]:
        """Return the update of a weight at step ``count``, from 1, and its moments then."""
        mu = self.b1 * moments.mu.astype(grad.dtype) + (1 - self.b1) * grad
        nu = self._second_moment(grad * grad, cast("Array | Factors", moments.nu))
        v = nu.product() if isinstance(nu, Factors) else nu
        root = jnp.sqrt(v / correction(self.b2, count, v.dtype)) + self.eps
        update = mu / correction(self.b1, count, mu.dtype) / root
        return update, Moments(mu.astype(moment_dtype(self.first_moment, mu)), nu)

    def _second_moment(self, square: Array, v: "Array | Factors") -> "Array | Factors":
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


class Moments(NamedTuple):
    """What an optimiser keeps of one weight."""

    mu: Array
    nu: "Array | Factors | optax.EmptyState"


def init_each(begin: Callable[[Array], Moments], params: optax.Params) -> optax.ScaleByAdamState:
    """Return the state before the first step, of what ``begin`` says of each weight."""
    return _state(jnp.zeros((), jnp.int32), jax.tree.map(begin, params))


def move_each(
    move: Callable[[Array, Moments, Array], tuple[Array, Moments]],
    grads: optax.Updates,
    state: optax.OptState,
) -> tuple[optax.Updates, optax.ScaleByAdamState]:
    """Return updates and the next state, of what ``move`` says of each weight's gradient and moments."""
    state = cast(optax.ScaleByAdamState, state)
    count = jnp.asarray(state.count) + 1

    def one(grad: Array, mu: Array, nu: Any) -> "_Moved":
        return _Moved(*move(grad, Moments(mu, nu), count))

    moved = jax.tree.map(one, grads, state.mu, state.nu)
    updates = jax.tree.map(lambda one: one.update, moved, is_leaf=_is(_Moved))
    return updates, _state(count, jax.tree.map(lambda one: one.moments, moved, is_leaf=_is(_Moved)))


class _Moved(NamedTuple):
    update: Array
    moments: Moments


def _state(count: Array, moments: Any) -> optax.ScaleByAdamState:
    """Return moments, a pair for each weight, as one tree of each."""
    mu = jax.tree.map(lambda pair: pair.mu, moments, is_leaf=_is(Moments))
    nu = jax.tree.map(lambda pair: pair.nu, moments, is_leaf=_is(Moments))
    return optax.ScaleByAdamState(count=count, mu=mu, nu=nu)


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda node: isinstance(node, kind)


def moment_dtype(kept: str, weight: Array) -> jnp.dtype:
    """Return the dtype that a first moment is kept in."""
    return jnp.dtype(jnp.bfloat16) if kept == "bfloat16" else weight.dtype


def correction(decay: float, count: Int[Array, ""], dtype: jnp.dtype) -> Float[Array, ""]:
    """Return ``1 - decay**count`` without cancellation."""
    if decay == 0:
        return jnp.ones((), dtype)
    return -jnp.expm1(count.astype(dtype) * math.log(decay))
