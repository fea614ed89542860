"""The soak in small: two kills, the end of the uninterrupted run; and what it would take for a failure."""

import dataclasses

import jax
import numpy as np
import pytest

from crosscoder_jax.activations.view import TokenView
from experiments.soak.__main__ import described, holds
from experiments.soak.config import BATCH_SIZE, SPLIT, Soak, num_steps
from experiments.soak.rounds import Outcome, _is_covered, play_round, write_store


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
        config = Soak(output=tmp_path, kills=2, epochs=1, num_tokens=300)
        outcome = play_round(config, 0)
    finally:
        jax.config.update("jax_enable_x64", False)
    logs = "\n".join(path.read_text(errors="replace") for path in tmp_path.rglob("*.log"))
    assert holds(outcome, config), (outcome, logs)
    assert sum(outcome.kills.values()) == 2
    assert outcome.starts == 3


@pytest.fixture
def notes(tmp_path):
    """Notes of batches that hold each token once, as they would be of one process."""
    view = TokenView.of_split(write_store(tmp_path / "store", 300), SPLIT, held_out=False)
    steps = num_steps(Soak(epochs=1), view.num_tokens)
    tokens = np.tile(view.token_index(np.arange(view.num_tokens)), steps * BATCH_SIZE // view.num_tokens)
    folder = tmp_path / "seen"
    folder.mkdir()
    for step, batch in enumerate(np.random.default_rng(0).permutation(tokens).reshape(steps, BATCH_SIZE)):
        np.save(folder / f"{step}-0.npy", np.stack([np.arange(BATCH_SIZE), batch]))
    return folder, view, steps


def test_even_notes_are_even(notes):
    assert _is_covered(*notes)


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


@pytest.mark.parametrize("wrong", [{"difference": 1e-6}, {"is_covered": False}, {"is_logged": False}])
def test_what_does_not_hold_fails_the_soak(wrong):
    assert holds(GOOD, Soak())
    assert not holds(dataclasses.replace(GOOD, **wrong), Soak())


def test_a_round_is_described_in_a_row():
    assert described(GOOD) == ("3", "1", "0", "1", "1", "each equally often", "1.0e-13")


@pytest.mark.parametrize("options", [{"kills": 0}, {"epochs": 0}, {"minutes": -1.0}])
def test_impossible_soaks_are_refused(options):
    with pytest.raises(ValueError, match="must be positive"):
        Soak(**options)
