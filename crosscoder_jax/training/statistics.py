"""What a run needs to know of its data before the first step."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from crosscoder_jax.sources import Sources
from crosscoder_jax.training.config import TrainConfig

SAMPLE_TOKENS = 65_536
"""Tokens the normaliser is estimated from: the scale's standard error is far below one percent."""

_PIECE_TOKENS = 4_096
_MEDIAN_TOKENS = 8_192
_MEDIAN_ITERATIONS = 100
_MEDIAN_TOLERANCE = 1e-5
_SMALLEST_DISTANCE = 1e-12
"""A guess that hits a point would weigh it infinitely."""


class DataStatistics(NamedTuple):
    """Normaliser and initial decoder bias, in the dtype of the crosscoder's weights."""

    mean: Float[np.ndarray, "width"]
    """Raw activation units; zero if the recipe does not centre."""
    scale: Float[np.ndarray, "source"]
    """Factors by the recipe's law; one without."""
    b_dec: Float[np.ndarray, "width"]
    """Geometric median of each source, normalised units."""

    def to_bytes(self) -> bytes:
        """Return all numbers one after another, to be sent to another process."""
        return np.concatenate(self).tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, config: TrainConfig) -> "DataStatistics":
        """Return what :meth:`to_bytes` made of the statistics for a recipe."""
        width, num_sources = config.crosscoder.sources.width, len(config.crosscoder.sources)
        numbers = np.frombuffer(data, config.crosscoder.param_dtype)
        return cls(*np.split(numbers, [width, width + num_sources]))


def data_statistics(sample: Float[np.ndarray, "token width"], config: TrainConfig) -> DataStatistics:
    """Estimate the normaliser and the decoder bias from a sample spread over the data.

    Sums are in float64.

    Args:
        sample: raw activations of the crosscoder's sources.
        config: says whether to centre and how to scale.

    Raises:
        ValueError: if a source that is to be scaled does not vary.
    """
    sources = config.crosscoder.sources
    mean = sample.mean(axis=0, dtype=np.float64) if config.is_centred else np.zeros(sources.width)
    scale = np.ones(len(sources))
    if config.scaling is not None:
        parts = [_norms(sample[:, part], mean[part], name) for part, name in _parts(sources)]
        scale = config.scaling(np.stack(parts, axis=1), sources.widths)
    spread = sample[:: max(len(sample) // _MEDIAN_TOKENS, 1)] - mean
    spread *= np.repeat(scale, sources.widths)
    b_dec = np.concatenate(geometric_medians(sources.split(spread)))
    dtype = config.crosscoder.param_dtype
    return DataStatistics(mean.astype(dtype), scale.astype(dtype), b_dec.astype(dtype))


def geometric_medians(
    parts: Sequence[Float[np.ndarray, "n _"]],
) -> list[Float[np.ndarray, "_"]]:
    """Return for each array the point with the smallest mean distance to its rows.

    Weiszfeld's iteration, which stops when no median moves by 1e-5 any more: the law of the code behind
    arXiv 2504.02922, which takes it over the first batch, where :func:`data_statistics` takes a sample
    of all tokens.

    Args:
        parts: the rows of each source; computed in their dtype.
    """
    guesses = [part.mean(axis=0) for part in parts]
    for _ in range(_MEDIAN_ITERATIONS):
        moved = [_towards_median(part, guess) for part, guess in zip(parts, guesses, strict=True)]
        steps = [np.linalg.norm(new - old) for new, old in zip(moved, guesses, strict=True)]
        guesses = moved
        if max(steps) < _MEDIAN_TOLERANCE:
            break
    return guesses


def _towards_median(points: Float[np.ndarray, "n _"], guess: Float[np.ndarray, "_"]) -> np.ndarray:
    weights = 1 / np.maximum(np.linalg.norm(points - guess, axis=1), _SMALLEST_DISTANCE)
    return weights @ points / weights.sum()


def _parts(sources: Sources) -> list[tuple[slice, str]]:
    return list(zip(sources.slices(), sources.names, strict=True))


def _norms(rows: np.ndarray, mean: np.ndarray, name: str) -> Float[np.ndarray, "token"]:
    # In pieces: the whole sample in float64 would be several times its size.
    norms = [
        np.linalg.norm(rows[start : start + _PIECE_TOKENS] - mean, axis=1)
        for start in range(0, len(rows), _PIECE_TOKENS)
    ]
    mean_norm = float(np.concatenate(norms).mean())
    if not mean_norm > 0:
        raise ValueError(
            f"source {name!r} is the same for every token (mean norm {mean_norm}): it holds nothing to "
            "learn; for a difference, compare two models that differ"
        )
    return np.concatenate(norms)
