"""A step that does not end: the process does, and says where it stood."""

import faulthandler
import subprocess
import sys
import threading
import time

import pytest
from processes import environment

from crosscoder_jax.training import watchdog as module
from crosscoder_jax.training.options import RunOptions
from crosscoder_jax.training.watchdog import STUCK, watchdog

STUCK_RUN = """
import sys, threading
from training_cases import small_run, OPTIONS
from crosscoder_jax.activations import ActivationStore
import dataclasses

def wait_for_ever(done, total, unit):
    if done == 3:
        threading.Event().wait()

options = dataclasses.replace(OPTIONS, step_timeout=20)
small_run(ActivationStore.open(sys.argv[1]), sys.argv[2], options=options, progress=wait_for_ever)
"""


def test_a_stuck_step_ends_the_process_and_tells_where(tmp_path):
    from training_cases import write_store

    write_store(tmp_path / "store")
    command = [sys.executable, "-c", STUCK_RUN, str(tmp_path / "store"), str(tmp_path / "run")]
    done = subprocess.run(
        command, env=environment(1), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == STUCK == 76
    assert "Timeout (0:00:20)!" in done.stderr
    assert "wait_for_ever" in done.stderr
    assert "in settle" in done.stderr, "the whole stack"


HELD = """
import ctypes
from crosscoder_jax.training.watchdog import watchdog

with watchdog(1.0):
    ctypes.PyDLL(None).sleep(60)  # which, unlike CDLL, does not let go of the interpreter
"""


def test_a_process_whose_interpreter_is_held_ends_without_it():
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HELD],
        env=environment(1),
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 1
    assert "Timeout (0:00:01.200000)!" in done.stderr
    assert time.monotonic() - began < 40


@pytest.fixture
def alarms(monkeypatch):
    """What is asked of faulthandler, how often the process would have ended, and a clock."""
    calls, ends = [], []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda s, exit, file: calls.append((s, exit)))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: calls.append("off"))
    monkeypatch.setattr(module, "_end", ends.append)
    return calls, ends


def test_the_last_resort_is_set_anew_by_steps_that_are_done_and_off_at_the_end(alarms, monkeypatch):
    calls, ends = alarms
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with watchdog(50.0) as step_is_done:
        assert calls == [(60.0, True)]
        clock[0] += 4.9  # less than a tenth: not yet again
        step_is_done()
        assert len(calls) == 1
        clock[0] += 0.1
        step_is_done()
        assert calls == [(60.0, True)] * 2
    assert calls[2:] == ["off"]
    assert ends == []
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]


def test_steps_put_the_end_off_for_as_long_as_they_come(alarms):
    _, ends = alarms
    with watchdog(1.0) as step_is_done:
        for _ in range(15):
            time.sleep(0.1)
            step_is_done()
        assert ends == []
        time.sleep(1.5)
        assert ends[0] == 1.0


def test_without_a_limit_there_is_no_alarm(alarms):
    with watchdog(None) as step_is_done:
        step_is_done()
    assert alarms == ([], [])


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_an_impossible_limit_is_refused(seconds):
    with pytest.raises(
        ValueError, match=f"step_timeout={seconds} must be positive, or None to wait for ever"
    ):
        RunOptions(step_timeout=seconds)
