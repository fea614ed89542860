"""Mean, standard deviation and mean norm of a source over a whole corpus, in float64."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Bool, Float


@dataclasses.dataclass(frozen=True, eq=False)
class SourceStatistics:
    """What is known of one source's activations over all tokens of a store, in raw units."""

    mean: Float[np.ndarray, "width"]
    """Mean of each coordinate."""
    std: Float[np.ndarray, "width"]
    """Standard deviation of each coordinate about its mean, divided by the number of tokens."""
    mean_norm: float
    """Mean over the tokens of the activation's L2 norm."""

    @property
    def root_mean_square_norm(self) -> float:
        """Square root of the mean over the tokens of the activation's squared L2 norm."""
        return float(np.sqrt(np.sum(np.square(self.mean) + np.square(self.std))))

    @property
    def outlier_share(self) -> float:
        """Return the least share of the summed squared norm that tokens of outlying norm can hold, nearly.

        It is 1 - (mean norm / root mean square norm)²: 0 where all norms are equal, and never more than the
        share of a few tokens that stand out of others of equal norm.

        Examples:
            >>> both = MomentAccumulator.empty(1).update(np.array([[1.0]] * 999 + [[300.0]])).finalize()
            >>> round(both.outlier_share, 3), round(300**2 / (999 + 300**2), 3)
            (0.981, 0.989)
        """
        return 1.0 - (self.mean_norm / self.root_mean_square_norm) ** 2 if self.mean_norm else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return plain data; floats read back exactly."""
        return {"mean_norm": self.mean_norm, "mean": self.mean.tolist(), "std": self.std.tolist()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "SourceStatistics":
        """Rebuild from :meth:`to_json`."""
        mean, std = (np.asarray(data[key], np.float64) for key in ("mean", "std"))
        if mean.ndim != 1 or mean.shape != std.shape:
            raise ValueError(f"mean has shape {mean.shape} and std {std.shape}: both must be [width]")
        return cls(mean, std, float(data["mean_norm"]))


@dataclasses.dataclass(frozen=True, eq=False)
class MomentAccumulator:
    """Running moments of one source, to be merged block by block.

    Blocks are merged pairwise about their own means, so nothing cancels however far the mean lies
    from zero. The result depends on how the tokens are cut into blocks only in the last bits; who
    needs the same bits must cut at the same places.

    References:
        Chan, Golub and LeVeque (1983), "Algorithms for computing the sample variance".

    Examples:
        >>> moments = MomentAccumulator.empty(1)
        >>> for block in ([[1.0], [3.0]], [[5.0]]):
        ...     moments = moments.update(np.array(block))
        >>> result = moments.finalize()
        >>> result.mean.tolist(), float(result.std[0] ** 2).__round__(6), result.mean_norm
        ([3.0], 2.666667, 3.0)
    """

    count: int
    mean: Float[np.ndarray, "width"]
    squares: Float[np.ndarray, "width"]
    """Sum of squared deviations from the mean."""
    mean_norm: float

    @classmethod
    def empty(cls, width: int) -> "MomentAccumulator":
        """Return the accumulator of no tokens."""
        return cls(0, np.zeros(width), np.zeros(width), 0.0)

    def update(self, block: Float[np.ndarray, "token width"]) -> "MomentAccumulator":
        """Merge a block of activations of any float type."""
        if not len(block):
            return self
        rows = block.astype(np.float64)
        norms = np.sqrt(np.einsum("tw,tw->t", rows, rows))
        mean = rows.mean(axis=0)
        rows -= mean
        squares = np.einsum("tw,tw->w", rows, rows)
        return self.merge(MomentAccumulator(len(rows), mean, squares, float(norms.mean())))

    def merge(self, other: "MomentAccumulator") -> "MomentAccumulator":
        """Return the accumulator of the tokens of both."""
        count = self.count + other.count
        if count == 0:
            return self
        share = other.count / count
        delta = other.mean - self.mean
        return MomentAccumulator(
            count,
            self.mean + delta * share,
            self.squares + other.squares + np.square(delta) * (self.count * share),
            self.mean_norm + (other.mean_norm - self.mean_norm) * share,
        )

    def finalize(self) -> SourceStatistics:
        """Return the statistics of all tokens seen.

        Raises:
            ValueError: if there were none.
        """
        if self.count == 0:
            raise ValueError("statistics of no tokens are undefined: append some first")
        return SourceStatistics(self.mean, np.sqrt(self.squares / self.count), self.mean_norm)

    def to_json(self) -> dict[str, Any]:
        """Return plain data; floats read back exactly, so a resumed sum goes on bit for bit."""
        arrays = {"mean": self.mean.tolist(), "squares": self.squares.tolist()}
        return {"count": self.count, "mean_norm": self.mean_norm, **arrays}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "MomentAccumulator":
        """Rebuild from :meth:`to_json`."""
        mean, squares = (np.asarray(data[key], np.float64) for key in ("mean", "squares"))
        return cls(int(data["count"]), mean, squares, float(data["mean_norm"]))


def finite_rows(rows: Float[np.ndarray, "token width"]) -> Bool[np.ndarray, "token"]:
    """Tell of each row, bfloat16 or float32, whether all of it is finite."""
    if rows.dtype == ml_dtypes.bfloat16:
        # An exponent of all ones is an infinity or a NaN; ten times faster than ml_dtypes' isfinite.
        return np.asarray(((rows.view(np.uint16) & 0x7F80) != 0x7F80).all(axis=1))
    return np.asarray(np.isfinite(rows).all(axis=1))
