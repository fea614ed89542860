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
    """Number of the window in its epoch."""
    start: int
    """Where its first token lies in the stream of all epochs."""
    stop: int


@dataclasses.dataclass(frozen=True)
class BatchSchedule:
    """The order in which the tokens of a view are seen, for ever.

    Every epoch the blocks are shuffled, cut into windows of ``window_blocks``, and the tokens of
    each window are shuffled: so files are read whole, memory holds a window, and a batch mixes
    the tokens of ``window_blocks`` places of the corpus. Every token is seen once in an epoch;
    epochs follow one another without a gap, so a batch may end one and begin the next. Any step
    can be computed without those before it. Neither the number of hosts nor the library versions
    change the order.

    Raises:
        ValueError: if a size is not positive or ``block_starts`` is not increasing from 0.

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

    def __post_init__(self) -> None:
        for name in ("num_tokens", "batch_size", "block_tokens", "window_blocks"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        edges = (*self.block_starts, self.num_tokens)
        if self.block_starts and (edges[0] != 0 or np.any(np.diff(edges) <= 0)):
            raise ValueError("block_starts must begin with 0 and increase up to num_tokens")

    @property
    def num_windows(self) -> int:
        """Windows of an epoch."""
        return -(-(len(self._edges) - 1) // self.window_blocks)

    def positions(self, step: int) -> Int64[np.ndarray, "batch"]:
        """Return the view's positions of the tokens of batch ``step``."""
        start, stop = step * self.batch_size, (step + 1) * self.batch_size
        return np.concatenate(
            [
                self.window_positions(window)[max(start - window.start, 0) : stop - window.start]
                for window in self.windows(start, stop)
            ]
        )

    def windows(self, start: int, stop: int) -> Iterator[Window]:
        """Yield the windows that the tokens ``start`` to ``stop`` of the stream lie in, in order.

        Raises:
            ValueError: if ``start`` is negative.
        """
        if start < 0:
            raise ValueError(f"start={start} must not be negative: steps count from 0")
        while start < stop:
            epoch, offset = divmod(start, self.num_tokens)
            edges = self._window_edges(epoch)
            index = int(np.searchsorted(edges, offset, side="right")) - 1
            first = epoch * self.num_tokens
            window = Window(epoch, index, first + int(edges[index]), first + int(edges[index + 1]))
            yield window
            start = window.stop

    def window_positions(self, window: Window) -> Int64[np.ndarray, "token"]:
        """Return the view's positions of the tokens of a window, in the order of the stream."""
        low = window.index * self.window_blocks
        blocks = self._order(window.epoch)[low : low + self.window_blocks]
        spans = zip(self._edges[blocks].tolist(), self._edges[blocks + 1].tolist(), strict=True)
        ordered = np.concatenate([np.arange(start, stop) for start, stop in spans])
        return ordered[permutation(self.seed, 1, window.epoch, window.index, size=len(ordered))]

    @functools.cached_property
    def _edges(self) -> Int64[np.ndarray, "edges"]:
        starts = self.block_starts or range(0, self.num_tokens, self.block_tokens)
        return np.array([*starts, self.num_tokens], np.int64)

    @functools.cached_property
    def _orders(self) -> dict[int, Int64[np.ndarray, "blocks"]]:
        return {}

    def _order(self, epoch: int) -> Int64[np.ndarray, "blocks"]:
        """Return the blocks in the order of an epoch; the last epochs asked for are kept."""
        if epoch not in self._orders:
            order = permutation(self.seed, 0, epoch, size=len(self._edges) - 1)
            self._orders[epoch] = order
            for old in sorted(self._orders)[:-_KEPT_EPOCHS]:
                if old != epoch:
                    del self._orders[old]
        return self._orders[epoch]

    def _window_edges(self, epoch: int) -> Int64[np.ndarray, "edges"]:
        """Return where in the epoch each window begins, and the epoch's end."""
        sizes = np.diff(self._edges)[self._order(epoch)]
        starts = np.arange(0, len(sizes), self.window_blocks)
        return np.append(0, np.cumsum(np.add.reduceat(sizes, starts)))
