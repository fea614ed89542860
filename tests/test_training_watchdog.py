"""A step that does not end: the process does, and says where it stood."""

import faulthandler
import subprocess
import sys

import pytest
from processes import environment

from crosscoder_jax.training.options import RunOptions
from crosscoder_jax.training.watchdog import watchdog

STUCK = """
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
    command = [sys.executable, "-c", STUCK, str(tmp_path / "store"), str(tmp_path / "run")]
    done = subprocess.run(
        command, env=environment(1), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 1
    assert "Timeout (0:00:20)!" in done.stderr
    assert "wait_for_ever" in done.stderr
    assert "in settle" in done.stderr, "the whole stack"


@pytest.fixture
def alarms(monkeypatch):
    """What is asked of faulthandler, and a clock."""
    calls, clock = [], [100.0]
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda s, exit, file: calls.append((s, exit)))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: calls.append("off"))
    monkeypatch.setattr("crosscoder_jax.training.watchdog.time.monotonic", lambda: clock[0])
    return calls, clock


def test_the_alarm_is_set_anew_by_steps_that_are_done_and_off_at_the_end(alarms):
    calls, clock = alarms
    with watchdog(50.0) as step_is_done:
        assert calls == [(50.0, True)]
        clock[0] += 4.9  # less than a tenth: not yet again
        step_is_done()
        assert len(calls) == 1
        clock[0] += 0.1
        step_is_done()
        assert calls == [(50.0, True)] * 2
    assert calls[2:] == ["off"]


def test_without_a_limit_there_is_no_alarm(alarms):
    with watchdog(None) as step_is_done:
        step_is_done()
    assert alarms[0] == []


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_an_impossible_limit_is_refused(seconds):
    with pytest.raises(
        ValueError, match=f"step_timeout={seconds} must be positive, or None to wait for ever"
    ):
        RunOptions(step_timeout=seconds)
