"""An order to end, which a scheduler gives as SIGTERM, obeyed by all processes after the same step."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

PREEMPTED = 75
"""The exit code of a command that was told to end and saved: what sysexits.h calls EX_TEMPFAIL, try again."""


class PreemptedError(RuntimeError):
    """The process was told to end and has saved where it is; the same call goes on from there."""


@contextlib.contextmanager
def watched_for_preemption() -> Iterator[Callable[[int], bool]]:
    """Give a function that tells, after each step, whether to save and end now.

    In one process a SIGTERM is remembered until the next step is done, unless the program handles it in a
    way of its own or the run is not on the main thread. In several, a SIGTERM to any of them is handed on,
    and all are told to end after the same step; every one must ask after every step.

    Examples:
        >>> with watched_for_preemption() as is_due:
        ...     before = is_due(1)
        ...     signal.raise_signal(signal.SIGTERM)
        ...     before, is_due(2)
        (False, True)
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    told = threading.Event()
    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if is_ours:
        signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield lambda _: told.is_set()
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
