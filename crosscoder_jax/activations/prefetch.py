"""Read ahead in the background, in bounded memory."""

import concurrent.futures
import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
Result = TypeVar("Result")


def reading_thread() -> concurrent.futures.ThreadPoolExecutor:
    """Return one background thread for what is read ahead; leaving its context waits for it."""
    return concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="load-ahead")


def load_ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    pool: concurrent.futures.Executor | None = None,
) -> Iterator[Result]:
    """Yield ``function(item)`` for each item, computing one ahead in a background thread.

    At most two results exist at a time, if the caller drops one before asking for the next. What
    ``function`` raises is raised when its result is asked for. Closing the generator waits for
    the call that is under way.

    Args:
        function: called once per item.
        items: read as they are needed.
        pool: of the thread, to share it with others, who then wait for the call; one of its own without.
    """
    queue = iter(items)
    with reading_thread() if pool is None else contextlib.nullcontext(pool) as worker:
        ahead = [worker.submit(function, item) for item in itertools.islice(queue, 1)]
        try:
            while ahead:
                result = ahead.pop().result()
                ahead = [worker.submit(function, item) for item in itertools.islice(queue, 1)]
                yield result
                # Nothing here may keep it alive while the next one is awaited.
                del result
        finally:
            for unread in ahead:
                unread.cancel()


def rebatch(
    pieces: Iterable[tuple[np.ndarray, ...]], batch_size: int
) -> Generator[tuple[np.ndarray, ...], None, None]:
    """Cut pieces, tuples of arrays with a common first axis, into batches; the last may be short.

    Batches are copies, so holding one keeps no piece alive; of a piece that is used up only the
    rows that did not fill a batch are kept.
    """
    carry: list[tuple[np.ndarray, ...]] = []
    filled = 0
    for piece in pieces:
        count, low = len(piece[0]), 0
        while count - low >= batch_size - filled:
            high = low + batch_size - filled
            yield _joined([*carry, tuple(part[low:high] for part in piece)])
            carry, filled, low = [], 0, high
        if low < count:
            carry.append(tuple(part[low:].copy() for part in piece))
            filled += count - low
        del piece
    if filled:
        yield _joined(carry)


def _joined(parts: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))
