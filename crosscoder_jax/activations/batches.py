"""Batches of activations: shuffled for training, in order for measuring."""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor

import numpy as np
from jaxtyping import Bool, Float, Integer

from crosscoder_jax.activations.prefetch import load_ahead, reading_thread, rebatch
from crosscoder_jax.activations.schedule import BatchSchedule, Window
from crosscoder_jax.activations.view import TokenView

_SEGMENT_CHUNKS = 4
"""Files of a source that sequential reading takes at once: enough to keep a disk busy."""


Rows = slice | Integer[np.ndarray, "rows"]
"""Some rows of a global batch: a slice, or their numbers in ascending order."""


class Batches:
    """Shuffled batches of activations: batch ``step`` is the same however one gets there.

    A host that asks for some rows reads the files of the lanes (see :class:`BatchSchedule`) that these rows
    are in, whole, and no others: of one lane every host reads everything, of as many lanes as hosts each
    reads its share, and of the files that a cut between two lanes goes through both hosts read all.

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

    def batch(self, step: int, rows: Rows | None = None) -> Float[np.ndarray, "batch width"]:
        """Return batch ``step``, in raw units and the stored type.

        The last two windows of a lane are kept, so asking for steps in order reads nothing twice; but
        nothing is read ahead: for a long run use :meth:`iterate`.

        Args:
            step: number of the batch, from 0.
            rows: which rows of the global batch this host needs; only they are kept in memory.

        Raises:
            StoreError: if a file is damaged.
        """
        shares, (start, stop) = self._shares(rows), self._span(step, step + 1)
        parts = []
        for share in shares:
            for window in self.schedule.windows(start, stop, share.lane):
                key = (window, share.is_wanted.tobytes())
                if key not in self._kept:
                    while len(self._kept) >= 2 * len(shares):
                        self._kept.popitem(last=False)
                    self._kept[key] = self._load(window, share, window.start, window.stop)
                before = share.count(window.start, max(start, window.start))
                count = share.count(max(start, window.start), min(stop, window.stop))
                parts.append(self._kept[key][before : before + count])
        return np.concatenate(parts)

    def iterate(
        self, start_step: int, stop_step: int, rows: Rows | None = None
    ) -> Iterator[Float[np.ndarray, "batch width"]]:
        """Yield batches ``start_step`` to ``stop_step``, reading a window ahead in the background.

        Memory holds at most two windows of each lane that is read, a batch and a few files being read. An
        error while reading ahead is raised when its batch is asked for.

        Args:
            start_step: first batch; beginning late costs nothing.
            stop_step: the batch before which to stop.
            rows: as in :meth:`batch`.

        Raises:
            StoreError: if a file is damaged.
        """
        shares, (start, stop) = self._shares(rows), self._span(start_step, stop_step)

        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(reading_thread()) if self.prefetch else None
            lanes = [
                stack.enter_context(contextlib.closing(self._lane(share, start, stop, pool)))
                for share in shares
            ]
            for parts in zip(*lanes, strict=True):
                yield parts[0][0] if len(parts) == 1 else np.concatenate([rows for (rows,) in parts])

    def _lane(
        self, share: "_Share", start: int, stop: int, pool: Executor | None
    ) -> Generator[tuple, None, None]:
        """Yield what a lane gives each batch of its stream from ``start`` to ``stop``."""

        def load(window: Window) -> tuple[np.ndarray]:
            return (self._load(window, share, max(start, window.start), min(stop, window.stop)),)

        windows = self.schedule.windows(start, stop, share.lane)
        return rebatch(
            map(load, windows) if pool is None else load_ahead(load, windows, pool), share.num_rows
        )

    def _span(self, start_step: int, stop_step: int) -> tuple[int, int]:
        return start_step * self.schedule.lane_rows, stop_step * self.schedule.lane_rows

    def _shares(self, rows: Rows | None) -> list["_Share"]:
        """Return what is wanted of each lane that anything is wanted of."""
        is_wanted = np.zeros(self.schedule.batch_size, bool)
        is_wanted[slice(None) if rows is None else rows] = True
        asked = np.arange(self.schedule.batch_size)[slice(None) if rows is None else rows]
        if not len(asked) or np.any(np.diff(asked) <= 0):
            raise ValueError(
                f"rows={rows} of a batch of {self.schedule.batch_size}: ask for some, in ascending order"
            )
        of_lanes = is_wanted.reshape(self.schedule.lanes, -1)
        return [_Share(lane, of_lanes[lane]) for lane in np.flatnonzero(of_lanes.any(axis=1)).tolist()]

    def _load(
        self, window: Window, share: "_Share", start: int, stop: int
    ) -> Float[np.ndarray, "token width"]:
        """Read those tokens of a window that lie in ``start`` to ``stop`` of its lane and in ``share``."""
        positions = self.schedule.window_positions(window)[start - window.start : stop - window.start]
        row = np.arange(start, stop) % self.schedule.lane_rows
        return self.view.read_positions(positions[share.is_wanted[row]])


@dataclasses.dataclass(frozen=True, eq=False)
class _Share:
    """The rows that are wanted of a lane."""

    lane: int
    is_wanted: Bool[np.ndarray, "rows"]
    """Of the rows that the lane gives every batch."""

    @property
    def num_rows(self) -> int:
        return int(self.is_wanted.sum())

    def count(self, start: int, stop: int) -> int:
        """Count the tokens of the lane's stream from ``start`` to ``stop`` that are wanted."""

        def before(token: int) -> int:
            batches, row = divmod(token, len(self.is_wanted))
            return batches * self.num_rows + int(self.is_wanted[:row].sum())

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
