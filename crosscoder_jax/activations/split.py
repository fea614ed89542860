"""Which documents are held out from training."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int64, Integer

from crosscoder_jax.activations.hashing import hash64
from crosscoder_jax.activations.store import ActivationStore

_SCAN_TOKENS = 1 << 20


@dataclasses.dataclass(frozen=True)
class Split:
    """Holds out whole documents, by a hash of the document's index and a seed.

    Never single tokens: neighbours in a document are so alike that held-out tokens would measure
    nothing. A document stays on its side when the store grows.

    Raises:
        ValueError: if ``fraction`` is not at least 0 and below 1.

    Examples:
        >>> Split(fraction=0.5, seed=0).is_held_out(np.arange(6)).tolist()
        [False, True, True, False, True, True]
    """

    fraction: float = 0.1
    """Share of the documents that is held out, on average."""
    seed: int = 0
    """Of the hash: another seed holds out other documents."""

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise ValueError(f"fraction={self.fraction} of held-out documents must be at least 0 and below 1")

    def is_held_out(self, documents: Integer[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
        """Tell of each document index whether it is held out."""
        # 53 bits: what a float64 holds exactly.
        uniform = (hash64(self.seed, values=documents) >> np.uint64(11)) * 2.0**-53
        return uniform < self.fraction

    def token_ranges(self, store: ActivationStore, *, held_out: bool) -> Int64[np.ndarray, "ranges 2"]:
        """Return the token ranges ``[start, stop)`` of one side, in order, neighbours joined."""
        return token_ranges(store, lambda documents: self.is_held_out(documents) == held_out)


def token_ranges(
    store: ActivationStore, is_wanted: Callable[[np.ndarray], np.ndarray]
) -> Int64[np.ndarray, "ranges 2"]:
    """Return the token ranges ``[start, stop)`` of some documents, in order, neighbours joined.

    Args:
        store: whose documents.
        is_wanted: tells of each document index in an array whether its tokens are meant.
    """
    edges, previous = [np.zeros(0, np.int64)], False
    for start in range(0, store.num_tokens, _SCAN_TOKENS):
        wanted = is_wanted(store.documents(start, min(start + _SCAN_TOKENS, store.num_tokens)))
        edges.append(start + np.flatnonzero(np.diff(wanted, prepend=previous)))
        previous = bool(wanted[-1])
    closing = [np.array([store.num_tokens])] if previous else []
    return np.concatenate(edges + closing).astype(np.int64).reshape(-1, 2)
