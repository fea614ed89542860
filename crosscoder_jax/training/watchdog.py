"""A run that is stuck ends, and tells where."""

import contextlib
import faulthandler
import time
from collections.abc import Callable, Iterator

_STANDARD_ERROR = 2
_SHARE_BETWEEN_ALARMS = 0.1
"""Setting the alarm starts a thread: not after every step of a millisecond."""


@contextlib.contextmanager
def watchdog(seconds: float | None) -> Iterator[Callable[[], None]]:
    """Give a function to be called with every step done, or else the process ends with 1.

    Before it ends, it prints where each thread stands to standard error. A collective that waits for another
    process for ever holds no Python exception, so nothing gentler would be heard.

    Args:
        seconds: about how long a step may take; ``None`` waits for ever.
    """
    if seconds is None:
        yield lambda: None
        return
    last_set = -float("inf")

    def set_alarm() -> None:
        nonlocal last_set
        now = time.monotonic()
        if now - last_set >= _SHARE_BETWEEN_ALARMS * seconds:
            faulthandler.dump_traceback_later(seconds, exit=True, file=_STANDARD_ERROR)
            last_set = now

    set_alarm()
    try:
        yield set_alarm
    finally:
        faulthandler.cancel_dump_traceback_later()
