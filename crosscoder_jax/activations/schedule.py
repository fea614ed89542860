"""Which token goes into which batch: a pure function of the seed and the step."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from crosscoder_jax.activations.hashing import permutation

_KEPT_EPOCHS = 2


class Window(NamedTuple):
    """Some blocks that are read and shuffled together."""

    epoch: int
    index: int
    """Number of the window in its lane and epoch."""
    start: int
    """Where its first token lies in its lane's stream of all epochs."""
    stop: int
    lane: int = 0


@dataclasses.dataclass(frozen=True)
class BatchSchedule:
    """The order in which the tokens of a view are seen, for ever.

    Every epoch the blocks are shuffled, cut into windows of ``window_blocks``, and the tokens of
    each window are shuffled: so files are read whole, memory holds a window, and a batch mixes
    the tokens of ``window_blocks`` places of the corpus. Every token is seen once in an epoch;
    epochs follow one another without a gap, so a batch may end one and begin the next. Any step
    can be computed without those before it. Neither the number of hosts nor the library versions
    change the order.

    With ``lanes`` above one, every epoch's shuffled blocks are cut into that many equal pieces, to the
    token (the epochs of two lanes differ by one at most), and each lane gives every batch as many rows,
    lane after lane, from windows of its own. Who needs the rows of some lanes reads the blocks of these
    lanes alone, and besides them at most two blocks per lane and epoch that a cut goes through. The
    number of lanes changes the order; the number of hosts that read them does not.

    Raises:
        ValueError: if a size is not positive, ``block_starts`` is not increasing from 0, or the lanes do not
            share a batch evenly.

    Examples:
        >>> schedule = BatchSchedule(num_tokens=6, batch_size=4, block_tokens=2, window_blocks=2, seed=0)
        >>> first_epoch = np.concatenate([schedule.positions(0), schedule.positions(1)])[:6]
        >>> sorted(first_epoch.tolist())
        [0, 1, 2, 3, 4, 5]
    """

    num_tokens: int
    """Tokens of the view."""
    batch_size: int
    """Tokens of a global batch."""
    block_tokens: int = 4096
    """Tokens that are read together; the last block may be shorter."""
    window_blocks: int = 32
    """Blocks that are shuffled together."""
    seed: int = 0
    """Of the order of blocks and of the tokens in a window, another one each epoch."""
    block_starts: tuple[int, ...] = dataclasses.field(default=(), repr=False)
    """Where each block begins, in place of multiples of ``block_tokens``: aligns blocks with files."""
    lanes: int = 1
    """Streams of blocks that share every batch evenly."""

    def __post_init__(self) -> None:
        for name in ("num_tokens", "batch_size", "block_tokens", "window_blocks", "lanes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.batch_size % self.lanes or self.lanes > self.num_tokens:
            raise ValueError(
                f"lanes={self.lanes} must divide the batch of {self.batch_size} tokens and be at most the "
                f"{self.num_tokens} tokens there are: choose a power of two below the batch's"
            )
        edges = (*self.block_starts, self.num_tokens)
        if self.block_starts and (edges[0] != 0 or np.any(np.diff(edges) <= 0)):
            raise ValueError("block_starts must begin with 0 and increase up to num_tokens")

    @property
    def num_windows(self) -> int:
        """Windows of an epoch of a single lane."""
        return -(-(len(self._edges) - 1) // self.window_blocks)

    @property
    def lane_rows(self) -> int:
        """Rows of every batch that a lane gives."""
        return self.batch_size // self.lanes

    def positions(self, step: int) -> Int64[np.ndarray, "batch"]:
        """Return the view's positions of the tokens of batch ``step``."""
        start, stop = step * self.lane_rows, (step + 1) * self.lane_rows
        return np.concatenate(
            [
                self.window_positions(window)[max(start - window.start, 0) : stop - window.start]
                for lane in range(self.lanes)
                for window in self.windows(start, stop, lane)
            ]
        )

    def windows(self, start: int, stop: int, lane: int = 0) -> Iterator[Window]:
        """Yield the windows that the tokens ``start`` to ``stop`` of a lane's stream lie in, in order.

        Raises:
            ValueError: if ``start`` is negative.
        """
        if start < 0:
            raise ValueError(f"start={start} must not be negative: steps count from 0")
        while start < stop:
            # Token q of a lane is token q * lanes + lane of all streams together, dealt out in turns.
            epoch = (start * self.lanes + lane) // self.num_tokens
            first, span = self._lane_start(epoch, lane), self._span(epoch, lane)
            edges = first + self._window_edges(epoch, *span) - span[0]
            index = int(np.searchsorted(edges, start, side="right")) - 1
            window = Window(epoch, index, int(edges[index]), int(edges[index + 1]), lane)
            yield window
            start = window.stop

    def window_positions(self, window: Window) -> Int64[np.ndarray, "token"]:
        """Return the view's positions of the tokens of a window, in the order of the stream."""
        offset = self._span(window.epoch, window.lane)[0] - self._lane_start(window.epoch, window.lane)
        low, high = window.start + offset, window.stop + offset
        order, edges = self._order(window.epoch)
        first, last = self._touched(window.epoch, low, high)
        # From places along the shuffled blocks to places in the view.
        moved = self._edges[order[first:last]] - edges[first:last]
        starts = np.maximum(edges[first:last], low) + moved
        stops = np.minimum(edges[first + 1 : last + 1], high) + moved
        spans = zip(starts.tolist(), stops.tolist(), strict=True)
        ordered = np.concatenate([np.arange(start, stop) for start, stop in spans])
        words = (window.epoch, window.index) if self.lanes == 1 else (window.epoch, window.index, window.lane)
        return ordered[permutation(self.seed, 1, *words, size=len(ordered))]

    @functools.cached_property
    def _edges(self) -> Int64[np.ndarray, "edges"]:
        starts = self.block_starts or range(0, self.num_tokens, self.block_tokens)
        return np.array([*starts, self.num_tokens], np.int64)

    @functools.cached_property
    def _orders(self) -> dict[int, tuple[Int64[np.ndarray, "blocks"], Int64[np.ndarray, "edges"]]]:
        return {}

    def _order(self, epoch: int) -> tuple[Int64[np.ndarray, "blocks"], Int64[np.ndarray, "edges"]]:
        """Return the blocks in the order of an epoch, and where each begins in it; two epochs are kept."""
        if epoch not in self._orders:
            order = permutation(self.seed, 0, epoch, size=len(self._edges) - 1)
            self._orders[epoch] = order, np.append(0, np.cumsum(np.diff(self._edges)[order]))
            for old in sorted(self._orders)[:-_KEPT_EPOCHS]:
                if old != epoch:
                    del self._orders[old]
        return self._orders[epoch]

    def _lane_start(self, epoch: int, lane: int) -> int:
        """Return where an epoch begins in a lane's stream."""
        return -((lane - epoch * self.num_tokens) // self.lanes)

    def _span(self, epoch: int, lane: int) -> tuple[int, int]:
        """Return which tokens of an epoch, counted along its shuffled blocks, a lane has."""
        counts = [self._lane_start(epoch + 1, i) - self._lane_start(epoch, i) for i in range(lane + 1)]
        return sum(counts[:-1]), sum(counts)

    def _touched(self, epoch: int, low: int, high: int) -> tuple[int, int]:
        """Return the first and the last but one of the shuffled blocks with tokens of ``low`` to ``high``."""
        edges = self._order(epoch)[1]
        return int(np.searchsorted(edges, low, side="right")) - 1, int(np.searchsorted(edges, high))

    def _window_edges(self, epoch: int, low: int, high: int) -> Int64[np.ndarray, "edges"]:
        """Return where the windows of a lane that has ``low`` to ``high`` of an epoch begin, and its end."""
        first, last = self._touched(epoch, low, high)
        blocks = -(-self.window_blocks // self.lanes)
        return np.array([low, *self._order(epoch)[1][first + blocks : last : blocks], high], np.int64)
