"""Sums in floating point that keep what rounding drops: a running sum and its running error."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from crosscoder_jax.sharding import to_host


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompensatedSum:
    """A sum of arrays as ``high + low``, exact to about twice the bits of its dtype: 48 in float32.

    A plain float32 sum over the batches of a corpus stops growing once a term is 2^-24 of the total,
    and float64 is slow or absent on accelerators. Counts stay exact far beyond 2^24 as well.
    Adding two sums field by field, as a ``psum`` does, gives a valid sum with one float32 rounding;
    :meth:`merge` loses nothing.

    References:
        Knuth, The Art of Computer Programming 2, 4.2.2 (two-sum); Neumaier 1974.
    """

    high: Float[Array | np.ndarray, "..."]
    low: Float[Array | np.ndarray, "..."]

    @classmethod
    def zeros(
        cls, shape: tuple[int, ...], sharding: jax.P | None = None, dtype: str = "float32"
    ) -> "CompensatedSum":
        """Return an empty sum of arrays of ``shape``."""

        def empty() -> Array:
            return jnp.zeros(shape, dtype, out_sharding=sharding)

        # Two buffers: a donated accumulator must not hold one buffer twice.
        return cls(empty(), empty())

    def add(self, values: Float[Array, "..."]) -> "CompensatedSum":
        """Return the sum with ``values`` added."""
        high, error = two_sum(self.high, values)
        return CompensatedSum(high, self.low + error)

    def merge(self, other: "CompensatedSum") -> "CompensatedSum":
        """Return the sum of both, whatever order they were added up in."""
        high, error = two_sum(self.high, other.high)
        return CompensatedSum(high, self.low + other.low + error)

    def to_float64(self) -> np.ndarray:
        """Return the value on the host; of several processes all call this."""
        return to_host(self.high).astype(np.float64) + to_host(self.low).astype(np.float64)


def two_sum(
    a: Float[Array | np.ndarray, "..."], b: Float[Array | np.ndarray, "..."]
) -> tuple[Float[Array | np.ndarray, "..."], Float[Array | np.ndarray, "..."]]:
    """Return the rounded sum of ``a`` and ``b`` and, exactly, what the rounding dropped."""
    # XLA keeps the order of float operations, so none of these cancel algebraically.
    total = a + b
    b_rounded = total - a
    return total, (a - (total - b_rounded)) + (b - b_rounded)
