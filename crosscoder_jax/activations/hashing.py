"""Pseudo-random numbers that are the same on every machine and with every version of NumPy."""

import numpy as np
from jaxtyping import Integer, UInt64

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def hash64(seed: int, *words: int, values: Integer[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """Hash each of ``values`` to 64 bits, independently for every ``seed`` and ``words``.

    A value's hash is the SplitMix64 output number ``value + 1`` of a stream that the seed and the
    words select. NumPy's own generators promise no such stability between versions.

    References:
        Steele, Lea and Flood (2014), "Fast splittable pseudorandom number generators".
    """
    state = seed & _MASK
    for word in words:
        state = int(_finalizer(np.array([(state + (word + 1) * _GOLDEN) & _MASK], np.uint64))[0])
    return _finalizer(np.uint64(state) + (values.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))


def permutation(seed: int, *words: int, size: int) -> Integer[np.ndarray, "size"]:
    """Return the numbers below ``size`` in an order that the seed and the words determine."""
    return np.argsort(hash64(seed, *words, values=np.arange(size)), kind="stable")


def _finalizer(state: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
