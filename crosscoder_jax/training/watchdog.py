"""A run that is stuck ends, and tells where."""

import contextlib
import datetime
import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator

STUCK = 76
"""The exit code of a process whose step did not end: a scheduler is to start it again."""
_STANDARD_ERROR = 2
_SHARE_BETWEEN_RENEWALS = 0.1
"""Renewing the last resort starts a thread: not after every step of a millisecond."""
_LAST_RESORT = 1.2
"""Of the time for a step, after which the process is ended without Python."""


@contextlib.contextmanager
def watchdog(seconds: float | None) -> Iterator[Callable[[], None]]:
    """Give a function to be called with every step done, or else the process ends with :data:`STUCK`.

    Before it ends, it prints where each thread stands to standard error. A collective that waits for another
    process for ever holds no Python exception, so nothing gentler would be heard. If the interpreter itself
    is held, which would keep it from telling, the process ends with 1 a little later.

    Args:
        seconds: about how long a step may take; ``None`` waits for ever.
    """
    if seconds is None:
        yield lambda: None
        return
    alarm = _Alarm(seconds)
    try:
        yield alarm.put_off
    finally:
        alarm.cancel()


class _Alarm:
    """Ends the process unless it is put off in time."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._is_cancelled = threading.Event()
        self._last_renewal = -float("inf")
        self.put_off()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def put_off(self) -> None:
        now = time.monotonic()
        self._deadline = now + self._seconds
        if now - self._last_renewal >= _SHARE_BETWEEN_RENEWALS * self._seconds:
            faulthandler.dump_traceback_later(_LAST_RESORT * self._seconds, exit=True, file=_STANDARD_ERROR)
            self._last_renewal = now

    def cancel(self) -> None:
        self._is_cancelled.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_cancelled.wait(max(self._deadline - time.monotonic(), 0.0)):
            if time.monotonic() >= self._deadline:
                _end(self._seconds)


def _end(seconds: float) -> None:
    says = f"Timeout ({datetime.timedelta(seconds=seconds)})! No step was done for so long; every thread:\n"
    os.write(_STANDARD_ERROR, says.encode())
    faulthandler.dump_traceback(file=_STANDARD_ERROR, all_threads=True)
    os._exit(STUCK)
