"""Batches of activations: shuffled for training, in order for measuring."""

import collections
import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Float, Integer

from crosscoder_jax.activations.prefetch import load_ahead, rebatch
from crosscoder_jax.activations.schedule import BatchSchedule, Window
from crosscoder_jax.activations.view import TokenView

_SEGMENT_CHUNKS = 4
"""Files of a source that sequential reading takes at once: enough to keep a disk busy."""


class Batches:
    """Shuffled batches of activations: batch ``step`` is the same however one gets there.

    Args:
        view: the tokens.
        schedule: their order; ``view.schedule(...)`` makes one that reads no file twice an epoch.
        prefetch: whether :meth:`iterate` reads the next window in a background thread.

    Raises:
        ValueError: if the schedule was made for another number of tokens.
    """

    def __init__(self, view: TokenView, schedule: BatchSchedule, *, prefetch: bool = True):
        if schedule.num_tokens != view.num_tokens:
            raise ValueError(
                f"the schedule is for {schedule.num_tokens} tokens, the view has {view.num_tokens}: "
                "make it with view.schedule(...)"
            )
        self.view = view
        self.schedule = schedule
        self.prefetch = prefetch
        self._kept: collections.OrderedDict[tuple, np.ndarray] = collections.OrderedDict()

    def batch(self, step: int, rows: slice | None = None) -> Float[np.ndarray, "batch width"]:
        """Return batch ``step``, in raw units and the stored type.

        The last two windows are kept, so asking for steps in order reads nothing twice; but
        nothing is read ahead: for a long run use :meth:`iterate`.

        Args:
            step: number of the batch, from 0.
            rows: which rows of the global batch this host needs; only they are kept in memory.

        Raises:
            StoreError: if a file is damaged.
        """
        share, (start, stop) = self._share(rows), self._span(step, step + 1)
        parts = []
        for window in self.schedule.windows(start, stop):
            key = (window, share.start, share.stop)
            if key not in self._kept:
                while len(self._kept) > 1:
                    self._kept.popitem(last=False)
                self._kept[key] = self._load(window, share, window.start, window.stop)
            before = self._count(share, window.start, max(start, window.start))
            count = self._count(share, max(start, window.start), min(stop, window.stop))
            parts.append(self._kept[key][before : before + count])
        return np.concatenate(parts)

    def iterate(
        self, start_step: int, stop_step: int, rows: slice | None = None
    ) -> Iterator[Float[np.ndarray, "batch width"]]:
        """Yield batches ``start_step`` to ``stop_step``, reading a window ahead in the background.

        Memory holds at most two windows, a batch and a few files being read. An error while
        reading ahead is raised when its batch is asked for.

        Args:
            start_step: first batch; beginning late costs nothing.
            stop_step: the batch before which to stop.
            rows: as in :meth:`batch`.

        Raises:
            StoreError: if a file is damaged.
        """
        share, (start, stop) = self._share(rows), self._span(start_step, stop_step)

        def load(window: Window) -> tuple[np.ndarray]:
            return (self._load(window, share, max(start, window.start), min(stop, window.stop)),)

        windows = self.schedule.windows(start, stop)
        loaded = load_ahead(load, windows) if self.prefetch else map(load, windows)
        for (batch,) in rebatch(loaded, len(share)):
            yield batch

    def _span(self, start_step: int, stop_step: int) -> tuple[int, int]:
        return start_step * self.schedule.batch_size, stop_step * self.schedule.batch_size

    def _share(self, rows: slice | None) -> range:
        share = range(self.schedule.batch_size)[rows or slice(None)]
        if share.step != 1 or not len(share):
            raise ValueError(
                f"rows={rows} of a batch of {self.schedule.batch_size} must be a slice of step 1, not empty"
            )
        return share

    def _load(self, window: Window, share: range, start: int, stop: int) -> Float[np.ndarray, "token width"]:
        """Read those tokens of a window that lie in ``start`` to ``stop`` of the stream and in ``share``."""
        positions = self.schedule.window_positions(window)[start - window.start : stop - window.start]
        row = np.arange(start, stop) % self.schedule.batch_size
        return self.view.read_positions(positions[(row >= share.start) & (row < share.stop)])

    def _count(self, share: range, start: int, stop: int) -> int:
        """Count the tokens of the stream from ``start`` to ``stop`` whose row is in ``share``."""

        def before(token: int) -> int:
            batches, row = divmod(token, self.schedule.batch_size)
            return batches * len(share) + min(max(row - share.start, 0), len(share))

        return before(stop) - before(start)


@dataclasses.dataclass(frozen=True, eq=False)
class StoredBatch:
    """Tokens in the order of the store, with everything that is known of them.

    The rows that fill up the last batch have activations of zero and -1 everywhere else.
    """

    acts: Float[np.ndarray, "batch width"]
    """Raw activations."""
    tokens: Integer[np.ndarray, "batch"]
    """Number of the token in the tokenizer's vocabulary."""
    documents: Integer[np.ndarray, "batch"]
    """Index of the token's document in the store."""
    positions: Integer[np.ndarray, "batch"]
    """Position in the document."""
    labels: Integer[np.ndarray, "batch"]
    """Which of the manifest's ``labels`` the document carries."""
    token_index: Integer[np.ndarray, "batch"]
    """Index of the token in the store."""
    is_valid: Bool[np.ndarray, "batch"]
    """False for rows that only fill up the batch."""


def sequential_batches(view: TokenView, batch_size: int, *, prefetch: bool = True) -> Iterator[StoredBatch]:
    """Yield all tokens of the view once, in order, in batches of one size, the last one padded.

    Args:
        view: the tokens.
        batch_size: rows of every batch.
        prefetch: whether to read ahead in a background thread.

    Raises:
        StoreError: if a file is damaged.
        ValueError: if ``batch_size`` is not positive.
    """
    if batch_size <= 0:
        raise ValueError(f"batch_size={batch_size} must be positive")

    def load(span: tuple[int, int]) -> tuple[np.ndarray, ...]:
        return _read_segment(view, *span)

    starts = view.block_starts(_SEGMENT_CHUNKS * view.store.manifest.chunk_tokens).tolist()
    spans = zip(starts, [*starts[1:], view.num_tokens], strict=True)
    loaded = load_ahead(load, spans) if prefetch else map(load, spans)
    for arrays in rebatch(loaded, batch_size):
        yield _padded(arrays, batch_size)


def _read_segment(view: TokenView, start: int, stop: int) -> tuple[np.ndarray, ...]:
    """Read positions ``start`` to ``stop`` of a view: activations, the columns, the token index."""
    store, index = view.store, view.token_index(np.arange(start, stop))
    low, high = int(index[0]), int(index[-1]) + 1

    def column(read: Callable[[int, int], np.ndarray]) -> np.ndarray:
        return read(low, high)[index - low]

    columns = (column(read) for read in (store.tokens, store.documents, store.positions, store.labels))
    return (store.read_rows(index), *columns, index)


def _padded(arrays: tuple[np.ndarray, ...], batch_size: int) -> StoredBatch:
    count = len(arrays[0])
    is_valid = np.arange(batch_size) < count
    if count == batch_size:
        return StoredBatch(*arrays, is_valid=is_valid)
    acts, *columns = arrays
    padded = np.zeros((batch_size, acts.shape[1]), acts.dtype)
    padded[:count] = acts
    fill = (0, batch_size - count)
    return StoredBatch(padded, *(np.pad(c, fill, constant_values=-1) for c in columns), is_valid=is_valid)
