"""The soak in small: two kills, the end of the uninterrupted run; and what it would take for a failure."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest

from crosscoder_jax.activations.schedule import BatchSchedule
from crosscoder_jax.activations.view import TokenView
from experiments.soak.__main__ import described, holds
from experiments.soak.config import BATCH_SIZE, LANES, SPLIT, Soak, num_steps
from experiments.soak.rounds import Outcome, _epochs, _is_covered, _Processes, play_round, write_store


@pytest.mark.parametrize("tokens", [24, 36, 97, 1200, 1203])
@pytest.mark.parametrize("epochs", [1, 5, 24])
def test_the_steps_see_every_token_equally_often(tokens, epochs):
    seen = num_steps(Soak(epochs=epochs), tokens) * BATCH_SIZE
    assert seen % tokens == 0
    assert seen // tokens >= epochs
    # No fewer would do: the largest common divisor of batch and tokens sets the grain.
    assert seen // tokens - epochs < BATCH_SIZE


def test_a_round_ends_as_if_it_had_not_been_killed(tmp_path):
    jax.config.update("jax_enable_x64", True)
    try:
        config = Soak(output=tmp_path, kills=2, epochs=5, num_tokens=300)
        outcome = play_round(config, 0)
    finally:
        jax.config.update("jax_enable_x64", False)
    logs = "\n".join(path.read_text(errors="replace") for path in tmp_path.rglob("*.log"))
    assert holds(outcome, config), (outcome, logs)
    assert sum(outcome.kills.values()) == 2
    assert outcome.starts == 3


@pytest.fixture
def notes(tmp_path):
    """Notes of two epochs of batches, as they would be of one process."""
    view = TokenView.of_split(write_store(tmp_path / "store", 300), SPLIT, held_out=False)
    steps = num_steps(Soak(epochs=2), view.num_tokens)
    assert steps * BATCH_SIZE == 2 * view.num_tokens
    tokens = view.token_index(np.arange(view.num_tokens))
    rng, folder = np.random.default_rng(0), tmp_path / "seen"
    folder.mkdir()
    order = np.concatenate([rng.permutation(tokens), rng.permutation(tokens)])
    for step, batch in enumerate(order.reshape(steps, BATCH_SIZE)):
        np.save(folder / f"{step}-0.npy", np.stack([np.arange(BATCH_SIZE), batch]))
    return folder, view, steps


def test_even_notes_are_even(notes):
    assert _is_covered(*notes)


def test_a_token_seen_twice_in_an_epoch_and_not_in_the_next_is_seen(notes):
    """Both are seen twice, all in all."""
    folder, _, steps = notes
    places = [folder / "0-0.npy", folder / f"{steps - 1}-0.npy"]
    first, last = (np.load(place) for place in places)
    row = int(np.flatnonzero(last[1] != first[1][0])[0])
    first[1][0], last[1][row] = last[1][row], first[1][0]
    for place, note in zip(places, (first, last), strict=True):
        np.save(place, note)
    assert not _is_covered(*notes)


@pytest.mark.parametrize("tokens", [36, 97, 1203])
def test_epochs_are_those_of_the_schedule(tokens):
    """Also where an epoch ends within a batch, and its lanes are not equally long."""
    schedule = BatchSchedule(tokens, BATCH_SIZE, block_tokens=8, window_blocks=2, lanes=LANES)
    steps = num_steps(Soak(epochs=3), tokens)
    seen = np.stack([schedule.positions(step) for step in range(steps)])
    epochs = _epochs(steps, tokens)
    for epoch in range(steps * BATCH_SIZE // tokens):
        np.testing.assert_array_equal(np.sort(seen[epochs == epoch]), np.arange(tokens))


def test_a_token_in_the_place_of_another_is_seen(notes):
    folder, *_ = notes
    rows, tokens = np.load(folder / "1-0.npy")
    tokens[3] = tokens[4]
    np.save(folder / "1-0.npy", np.stack([rows, tokens]))
    assert not _is_covered(*notes)


def test_a_batch_that_no_one_had_is_seen(notes):
    (notes[0] / "2-0.npy").unlink()
    assert not _is_covered(*notes)


def test_processes_that_were_given_different_rows_are_seen(notes):
    folder, *_ = notes
    rows, tokens = np.load(folder / "0-0.npy")
    np.save(folder / "0-12.npy", np.stack([rows[12:], np.roll(tokens[12:], 1)]))
    assert not _is_covered(*notes)


GOOD = Outcome(3, {"all killed": 1, "one killed": 0, "told to end": 1}, ("8x1 in 2",), 1e-13, True, True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"difference": 1e-6},
        {"is_covered": False},
        {"is_logged": False},
        {"kills": {"all killed": 1, "one killed": 0, "told to end": 0}},
    ],
)
def test_what_does_not_hold_fails_the_soak(wrong):
    assert holds(GOOD, Soak(kills=2))
    assert not holds(dataclasses.replace(GOOD, **wrong), Soak(kills=2))


def test_a_kill_that_comes_too_late_does_not_count(tmp_path):
    """Processes that ended by themselves before it."""
    processes = object.__new__(_Processes)
    processes._log = tmp_path / "log"
    for way in ("all killed", "one killed", "told to end"):
        processes._processes = [subprocess.Popen([sys.executable, "-c", "pass"])]
        processes._processes[0].wait()
        assert not processes.end(way, 0)
        processes._processes = [subprocess.Popen(["sleep", "60"])]
        if way != "told to end":  # which sleep does not do with 75
            assert processes.end(way, 0)
        processes.__exit__()


def test_more_kills_than_steps_are_refused(tmp_path):
    with pytest.raises(ValueError, match="kills=61 do not fit into 100 steps, at the last 40 of which"):
        play_round(Soak(output=tmp_path, kills=61, epochs=10, num_tokens=300), 0)


def test_a_round_is_described_in_a_row():
    assert described(GOOD) == ("3", "1", "0", "1", "1", "each once an epoch", "1.0e-13")


@pytest.mark.parametrize("options", [{"kills": 0}, {"epochs": 0}, {"minutes": -1.0}])
def test_impossible_soaks_are_refused(options):
    with pytest.raises(ValueError, match="must be positive"):
        Soak(**options)
