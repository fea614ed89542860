"""Ending on an order in one process: the step under way is finished and saved."""

import signal
import threading

import pytest
from training_cases import files, small_run, write_store

from crosscoder_jax.training.checkpoint import Checkpoints
from crosscoder_jax.training.preemption import PreemptedError, watched_for_preemption


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("preemption") / "store")


def terminate_at(step):
    def progress(done, total, unit):
        if done == step:
            signal.raise_signal(signal.SIGTERM)

    return progress


def test_a_run_told_to_end_saves_and_goes_on_bit_for_bit(store, tmp_path):
    """Metrics are told one step late: at 7, step 8 is taken, and so saved."""
    with pytest.raises(PreemptedError, match=r"told to end \(SIGTERM\): step 8 is saved"):
        small_run(store, tmp_path / "run", progress=terminate_at(7))
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.latest_step == 8
    checkpoints.close()
    assert not list((tmp_path / "run" / "crosscoder").iterdir())
    small_run(store, tmp_path / "run")
    small_run(store, tmp_path / "whole")
    assert files(tmp_path / "run" / "crosscoder") == files(tmp_path / "whole" / "crosscoder")


def test_a_step_that_is_saved_anyway_is_saved_once(store, tmp_path):
    with pytest.raises(PreemptedError, match="step 10 is saved"):
        small_run(store, tmp_path, progress=terminate_at(10))
    small_run(store, tmp_path)


def test_an_order_at_the_last_step_lets_the_run_finish(store, tmp_path):
    small_run(store, tmp_path, progress=terminate_at(23))
    assert (tmp_path / "crosscoder" / "config.json").is_file()


def test_the_signal_is_given_back():
    before = signal.getsignal(signal.SIGTERM)
    assert before is signal.SIG_DFL
    with watched_for_preemption() as is_due:
        assert signal.getsignal(signal.SIGTERM) is not before
        assert not is_due(1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_program_that_handles_the_signal_keeps_it():
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append(True))
    try:
        with watched_for_preemption() as is_due:
            signal.raise_signal(signal.SIGTERM)
            assert not is_due(1)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert heard == [True]


def test_off_the_main_thread_there_is_no_signal_to_handle():
    due = []

    def work():
        with watched_for_preemption() as is_due:
            due.append(is_due(1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert due == [False]
