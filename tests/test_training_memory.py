"""How large a training state is, and how many are trained at once."""

import jax
import pytest
from training_cases import recipe

from crosscoder_jax.sharding import make_mesh
from crosscoder_jax.training import memory
from crosscoder_jax.training.adam import Adam
from crosscoder_jax.training.memory import runs_at_once, state_bytes
from crosscoder_jax.training.muon import Muon
from crosscoder_jax.training.state import init_state

LIGHT = Muon(first_moment="bfloat16")


@pytest.mark.parametrize(
    "optimizer",
    [Adam(), Adam(first_moment="bfloat16"), Adam(second_moment="factored"), Muon(), LIGHT],
)
def test_the_size_of_a_state_is_that_of_its_weights_and_moments(optimizer):
    config = recipe(optimizer=optimizer)
    state = init_state(config)
    held = jax.tree.leaves((state.params, state.opt_state))
    assert sum(leaf.nbytes for leaf in held) == state_bytes(config)


def test_moments_that_take_less_leave_room_for_more_runs(monkeypatch):
    """Of a state in units of the weights Adam's is 3, and Muon's with a momentum in bfloat16 1.5."""
    monkeypatch.setattr(memory, "_device_bytes", lambda mesh: 2 * state_bytes(recipe()))
    assert runs_at_once([recipe()] * 5) == 1
    # Biases keep the two moments of Adam: a little less than twice as many.
    light = recipe(optimizer=LIGHT)
    assert 1.5 < state_bytes(recipe()) / state_bytes(light) < 2
    monkeypatch.setattr(memory, "_device_bytes", lambda mesh: 4 * state_bytes(recipe()))
    assert runs_at_once([light] * 5) == 3


@pytest.mark.parametrize(("states", "expected"), [(1, 1), (2, 1), (3.9, 1), (4, 2), (9, 4), (100, 5)])
def test_half_of_the_memory_is_for_states(monkeypatch, states, expected):
    configs = [recipe()] * 4 + [recipe(num_latents=64)]
    monkeypatch.setattr(memory, "_device_bytes", lambda mesh: states * state_bytes(recipe(num_latents=64)))
    assert runs_at_once(configs) == expected


def test_shards_of_the_latents_share_the_states(monkeypatch):
    monkeypatch.setattr(memory, "_device_bytes", lambda mesh: 2 * state_bytes(recipe()))
    assert runs_at_once([recipe()] * 5) == 1
    assert runs_at_once([recipe()] * 5, make_mesh(2, 4)) == 4


def test_a_machine_tells_how_much_memory_it_has():
    whole = memory._device_bytes(None)
    assert whole > 2**28
    assert memory._device_bytes(make_mesh(2, 4)) == whole // 8
