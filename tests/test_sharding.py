"""Meshes and layouts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_chips import block
from jax import P
from jax.sharding import AxisType

from crosscoder_jax import sharding
from crosscoder_jax.sharding import (
    BatchShare,
    Shardings,
    check_divisible,
    device_array,
    from_first,
    make_mesh,
    place,
    start_processes,
    to_host,
)


def test_a_mesh_is_explicit_with_data_before_latent():
    mesh = make_mesh(2, 4)
    assert mesh.axis_names == ("data", "latent")
    assert mesh.devices.shape == (2, 4)
    assert set(mesh.axis_types) == {AxisType.Explicit}


def test_a_mesh_may_leave_devices_idle():
    assert make_mesh(1, 3).devices.ravel().tolist() == jax.devices()[:3]


@pytest.mark.parametrize(("data", "latent"), [(3, 3), (0, 1), (1, -1)])
def test_a_mesh_that_the_devices_do_not_fill_is_refused(data, latent):
    with pytest.raises(ValueError, match=rf"data={data} x latent={latent} needs .* there are 8"):
        make_mesh(data, latent)


def test_devices_that_are_no_tpu_keep_their_order():
    assert make_mesh(2, 4).devices.ravel().tolist() == jax.devices()


@pytest.mark.parametrize("shape", [(4, 4, 4), (2, 4, 4), (4, 4, 1), (2, 2, 1)])
def test_every_split_of_a_block_of_chips_makes_a_mesh(shape):
    """``jax.make_mesh`` divides no dimension of the wiring: of 4x4x4 chips it makes no 2x32, 8x8 and 32x2."""
    chips = block(*shape)
    for data in (2**i for i in range(7) if 2**i <= len(chips)):
        placed = device_array(chips, data, len(chips) // data)
        assert placed.shape == (data, len(chips) // data)
        assert set(placed.flat) == set(chips)


def test_shards_of_the_latents_are_neighbours():
    # Of 4x4 chips as 2x8 each row is two whole dimensions of four: half of the block.
    for row in device_array(block(4, 4, 1), 2, 8):
        spans = [len({chip.coords[axis] for chip in row}) for axis in range(2)]
        assert sorted(spans) == [2, 4]


def test_chips_that_are_no_block_are_refused_with_the_meshes_that_all_make():
    with pytest.raises(ValueError, match=r"data=1 x latent=3: the first 3 of 4 .*: use 1x4, 2x2, 4x1$"):
        device_array(block(2, 2, 1), 1, 3)


def test_chips_of_two_slices_are_refused():
    with pytest.raises(ValueError, match=r"data=2 x latent=4: .*: start on the chips of one slice$"):
        device_array([*block(2, 2, 1), *block(2, 2, 1, slice_index=1)], 2, 4)


def test_gpus_of_several_hosts_make_a_mesh_by_their_numbers():
    """JAX calls each host of them a slice."""
    gpus = [
        dataclasses.replace(chip, platform="gpu", device_kind="H100", slice_index=chip.id // 2)
        for chip in block(2, 2, 1)
    ]
    assert [gpu.id for gpu in device_array(gpus[::-1], 2, 2).flat] == [0, 1, 2, 3]


def test_without_a_mesh_nothing_is_constrained():
    assert Shardings.for_mesh(None) == Shardings()
    assert all(value is None for value in dataclasses.asdict(Shardings()).values())


def test_with_a_mesh_every_tensor_has_a_place_that_its_letters_name():
    # b is spread over data, l over latent, every other axis is whole on each device.
    axes = {"b": "data", "l": "latent"}
    layout = Shardings.for_mesh(make_mesh(2, 4))
    for field in dataclasses.fields(layout):
        letters = "" if field.name == "replicated" else field.name.rsplit("_", 1)[1]
        assert getattr(layout, field.name) == P(*(axes.get(letter) for letter in letters)), field.name


def test_layouts_work_for_meshes_with_other_axis_names():
    assert Shardings.data_latent("rows", "columns").code_bl == P("rows", "columns")


def test_arrays_made_with_a_layout_are_spread_over_the_devices():
    mesh = make_mesh(2, 4)
    with jax.set_mesh(mesh):
        code = jnp.zeros((4, 8), out_sharding=Shardings.for_mesh(mesh).code_bl)
    assert {shard.data.shape for shard in code.addressable_shards} == {(2, 2)}


@pytest.mark.parametrize(("value", "fits"), [(1001, "use 1000 or 1004"), (7, "use 4 or 8"), (3, "use 4")])
def test_sizes_that_do_not_spread_evenly_are_refused_with_the_nearest_that_do(value, fits):
    with pytest.raises(ValueError, match=rf"num_latents={value} .* 'latent' mesh axis \(size 4\): {fits}$"):
        check_divisible("num_latents", value, make_mesh(2, 4), "latent")


@pytest.mark.parametrize("value", [4, 1000])
def test_sizes_that_spread_evenly_are_accepted(value):
    check_divisible("num_latents", value, make_mesh(2, 4), "latent")


def test_any_size_fits_without_a_mesh():
    check_divisible("num_latents", 7, None, "latent")


def test_each_axis_has_its_own_size():
    check_divisible("batch_size", 6, make_mesh(2, 4), "data")
    with pytest.raises(ValueError, match="batch_size=6"):
        check_divisible("batch_size", 6, make_mesh(4, 2), "data")


def test_a_mesh_without_a_device_of_each_process_is_refused(monkeypatch):
    """All eight devices here are of process 0, so that process 1 of two has none."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(
        ValueError, match=r"data=2 x latent=4 leaves the processes \[1\] of 2 without a device"
    ):
        make_mesh(2, 4)


@pytest.fixture
def started(monkeypatch):
    """What JAX is told to start with, in an environment that says nothing."""
    told = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: told.append((args, kwargs)))
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    return told


def test_processes_are_found_by_jax_by_default(started):
    start_processes()
    ((places, settings),) = started
    assert places == (None, None, None)
    assert settings["heartbeat_timeout_seconds"] == sharding.HEARTBEAT_SECONDS < 30


def test_what_is_given_goes_before_the_environment(started, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "first:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    start_processes()
    start_processes("other:2", 2, 0)
    assert [places for places, _ in started] == [("first:1", 4, 3), ("other:2", 2, 0)]


def test_a_number_of_processes_that_is_none_is_refused(started, monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(
        ValueError, match="JAX_PROCESS_ID='first' must be a number: set it to one, or unset it"
    ):
        start_processes()
    assert not started


def test_a_process_alone_makes_what_the_first_makes():
    assert from_first(lambda: b"made") == b"made"


@pytest.mark.parametrize("spec", [P("data", "latent"), P("latent", None), P(None, None)])
def test_arrays_come_back_whole_whatever_their_layout(spec):
    values = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    with jax.set_mesh(make_mesh(2, 4)):
        np.testing.assert_array_equal(to_host(place(values, spec)), values)


@pytest.mark.parametrize("mesh", [None, (8, 1), (2, 4), (1, 8)])
def test_a_process_that_has_all_devices_has_all_rows(mesh):
    share = BatchShare(16, None if mesh is None else make_mesh(*mesh))
    assert share.rows.tolist() == list(range(16))
    acts = np.arange(48.0, dtype=np.float32).reshape(16, 3)
    placed = share.place(acts)
    np.testing.assert_array_equal(placed, acts)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(16 // (mesh or (1,))[0], 3)}
