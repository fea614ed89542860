"""Checkpoints: everything comes back bit for bit, and damage has a name."""

import dataclasses
import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import activations, files, recipe, to_numpy

from crosscoder_jax.sharding import Shardings, make_mesh
from crosscoder_jax.training.checkpoint import KEPT, Checkpoints
from crosscoder_jax.training.state import init_state
from crosscoder_jax.training.step import train_step

CONFIG = recipe()


@pytest.fixture(autouse=True)
def collect():
    """What a test left unfinished is heard of in that test, not in a later one."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def trained():
    """A state in which every leaf has moved."""
    state = init_state(CONFIG)
    for batch in activations(3 * 32).reshape(3, 32, -1):
        state, _ = train_step(state, jnp.asarray(batch), config=CONFIG)
    return dataclasses.replace(state, tokens_since_fired=jnp.arange(16, dtype=jnp.int32))


def abstract(config=CONFIG, mesh=None):
    return jax.eval_shape(lambda: init_state(config, shardings=Shardings.for_mesh(mesh)))


def saved(folder, state, *steps):
    checkpoints = Checkpoints(folder)
    for step in steps:
        checkpoints.save(step, state)
    checkpoints.close()


def restored(folder, config=CONFIG, mesh=None):
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore(abstract(config, mesh))
    finally:
        checkpoints.close()


def test_everything_comes_back_bit_for_bit(tmp_path, trained):
    saved(tmp_path / "c", trained, 3)
    again = restored(tmp_path / "c")
    assert jax.tree.structure(again) == jax.tree.structure(trained)
    expected = to_numpy(trained)
    assert any(np.any(v != 0) for name, v in expected.items() if ".nu" in name)
    for name, value in to_numpy(again).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
        assert value.dtype == expected[name].dtype


def test_a_restored_state_trains_on(tmp_path, trained):
    saved(tmp_path / "c", trained, 3)
    acts = jnp.asarray(activations(32, seed=5))
    ours, _ = train_step(restored(tmp_path / "c"), acts, config=CONFIG)
    theirs, _ = train_step(jax.tree.map(jnp.copy, trained), acts, config=CONFIG)
    expected = to_numpy(theirs)
    for name, value in to_numpy(ours).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.parametrize("shape", [(2, 4), (8, 1)])
def test_another_mesh_gets_the_same_values_where_it_wants_them(tmp_path, trained, shape):
    saved(tmp_path / "c", trained, 3)
    mesh = make_mesh(*shape)
    with jax.set_mesh(mesh):
        again = restored(tmp_path / "c", mesh=mesh)
        fresh = init_state(CONFIG, shardings=Shardings.for_mesh(mesh))
        for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(fresh), strict=True):
            assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
    expected = to_numpy(trained)
    for name, value in to_numpy(again).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_from_a_mesh_back_to_one_device(tmp_path, trained):
    mesh = make_mesh(2, 4)
    with jax.set_mesh(mesh):
        state = init_state(CONFIG, shardings=Shardings.for_mesh(mesh))
        saved(tmp_path / "c", state, 1)
        expected = to_numpy(state)
    again = restored(tmp_path / "c")
    assert len(again.params["w_dec"][...].sharding.device_set) == 1
    for name, value in to_numpy(again).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_the_newest_ones_are_kept(tmp_path, trained):
    saved(tmp_path / "c", trained, 1, 2, 3, 7)
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.latest_step == 7
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "c").iterdir() if p.name.isdigit()) == ["3", "7"]
    assert KEPT == 2


def test_an_empty_folder_has_no_step(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.latest_step is None
    checkpoints.close()


def largest_file(folder):
    """The numbers themselves are in ``state/d``; what lies beside is about them."""
    return max((folder / "state" / "d").iterdir(), key=lambda p: p.stat().st_size)


def truncate(folder):
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_byte(folder):
    path = largest_file(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


def remove_the_largest(folder):
    largest_file(folder).unlink()


@pytest.mark.parametrize("damage", [truncate, remove_the_largest, flip_a_byte])
def test_damage_is_named_with_the_folder_to_delete(tmp_path, trained, damage):
    saved(tmp_path / "c", trained, 3, 5)
    damage(tmp_path / "c" / "5")
    with pytest.raises(ValueError, match=r"/c: the checkpoint of step 5 cannot be read: delete the folder 5"):
        restored(tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "5")
    expected = to_numpy(trained)
    for name, value in to_numpy(restored(tmp_path / "c")).items():
        np.testing.assert_array_equal(value, expected[name])


def test_a_checkpoint_of_another_crosscoder_is_refused(tmp_path, trained):
    saved(tmp_path / "c", trained, 3)
    with pytest.raises(ValueError, match="step 3 cannot be read"):
        restored(tmp_path / "c", recipe(num_latents=24))


def test_what_a_killed_process_left_is_ignored_and_removed(tmp_path, trained):
    saved(tmp_path / "c", trained, 3)
    before = files(tmp_path / "c" / "3")
    half = tmp_path / "c" / "5.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "c" / "3", half)
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.latest_step == 3
    assert not half.exists()
    checkpoints.save(5, trained)
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["3", "5"]
    assert files(tmp_path / "c" / "3") == before
