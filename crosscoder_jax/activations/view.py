"""Token ranges of a store as one dense sequence: what training and measuring read."""

import numpy as np
from jaxtyping import Float, Int64, Integer

from crosscoder_jax.activations.schedule import BatchSchedule
from crosscoder_jax.activations.split import Split
from crosscoder_jax.activations.store import ActivationStore

_SAMPLE_PIECES = 64


class TokenView:
    """Some token ranges of a store, seen as one dense sequence of positions from 0."""

    def __init__(self, store: ActivationStore, ranges: Integer[np.ndarray, "ranges 2"] | None = None):
        if ranges is None:
            ranges = np.array([[0, store.num_tokens]])
        lengths = ranges[:, 1] - ranges[:, 0]
        if not len(ranges) or np.any(lengths <= 0) or np.any(ranges[1:, 0] < ranges[:-1, 1]):
            raise ValueError(
                f"{store.path}: {len(ranges)} token ranges: a view needs at least one, none empty, in order"
            )
        if ranges[0, 0] < 0 or ranges[-1, 1] > store.num_tokens:
            raise ValueError(f"{store.path}: token ranges reach beyond the store's {store.num_tokens} tokens")
        self.store = store
        self.ranges = ranges.astype(np.int64)
        self._starts = np.append(0, np.cumsum(lengths))

    @classmethod
    def of_split(cls, store: ActivationStore, split: Split, *, held_out: bool) -> "TokenView":
        """Return the view of one side of ``split``.

        Raises:
            ValueError: if that side has no document.
        """
        ranges = split.token_ranges(store, held_out=held_out)
        if not len(ranges):
            side = "holds out none" if held_out else "leaves none to train on"
            raise ValueError(
                f"{store.path}: a held-out share of {split.fraction} {side} of its "
                f"{store.manifest.num_documents} documents: change the share, or write more documents"
            )
        return cls(store, ranges)

    @property
    def num_tokens(self) -> int:
        """Number of positions."""
        return int(self._starts[-1])

    def __len__(self) -> int:
        return self.num_tokens

    def token_index(self, positions: Integer[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
        """Return the store's token index of each of the view's ``positions``."""
        part = np.searchsorted(self._starts, positions, side="right") - 1
        return self.ranges[part, 0] + (positions - self._starts[part])

    def read_positions(self, positions: Integer[np.ndarray, "n"]) -> Float[np.ndarray, "n width"]:
        """Read the activations at any positions, each file that holds one of them once.

        Raises:
            StoreError: if a file is damaged.
            ValueError: if a position is outside the view.
        """
        if len(positions) and not 0 <= positions.min() <= positions.max() < self.num_tokens:
            raise ValueError(
                f"positions {positions.min()} to {positions.max()} are not within 0 to {self.num_tokens}"
            )
        return self.store.read_rows(self.token_index(positions))

    def block_starts(self, block_tokens: int) -> Int64[np.ndarray, "blocks"]:
        """Return the first position in every ``block_tokens`` tokens of the store that has one."""
        edges = np.arange(0, self.store.num_tokens, block_tokens)
        part = np.searchsorted(self.ranges[:, 0], edges, side="right") - 1
        inside = np.clip(edges - self.ranges[part, 0], 0, np.diff(self._starts)[part])
        positions = np.where(part < 0, 0, self._starts[part] + inside)
        return np.unique(positions[positions < self.num_tokens])

    def schedule(
        self, batch_size: int, *, window_tokens: int = 1 << 17, seed: int = 0, lanes: int = 1
    ) -> BatchSchedule:
        """Return a schedule whose blocks are the store's files, so that none is read twice an epoch.

        Args:
            batch_size: tokens of a global batch.
            window_tokens: about how many tokens are shuffled together. Memory holds two windows.
            seed: of the order.
            lanes: streams of files that share every batch, so that each can be read on a host of its own.
        """
        starts = self.block_starts(self.store.manifest.chunk_tokens)
        window_blocks = max(1, round(window_tokens * len(starts) / self.num_tokens))
        return BatchSchedule(
            num_tokens=self.num_tokens,
            batch_size=batch_size,
            block_tokens=self.store.manifest.chunk_tokens,
            window_blocks=window_blocks,
            seed=seed,
            block_starts=tuple(starts.tolist()),
            lanes=lanes,
        )


def spread_sample(view: TokenView, num_tokens: int) -> Float[np.ndarray, "token width"]:
    """Read a sample in a few dozen runs spread evenly over the view, always the same.

    Args:
        view: the tokens.
        num_tokens: how many; all of them if the view has fewer.

    Raises:
        StoreError: if a file is damaged.
        ValueError: if ``num_tokens`` is not positive.
    """
    if num_tokens <= 0:
        raise ValueError(f"num_tokens={num_tokens} of a sample must be positive")
    num_tokens = min(num_tokens, view.num_tokens)
    pieces = min(_SAMPLE_PIECES, num_tokens)
    # Piece i takes the middle of the i-th of equal parts of the view.
    sample_edges = np.arange(pieces + 1) * num_tokens // pieces
    view_edges = np.arange(pieces + 1) * view.num_tokens // pieces
    lengths, rooms = np.diff(sample_edges), np.diff(view_edges)
    starts = view_edges[:-1] + (rooms - lengths) // 2
    runs = [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    return view.read_positions(np.concatenate(runs))
