"""The real step compiled for TPUs, which need not be here; libtpu must."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from crosscoder_jax.planning import PlanConfig, Topology, compiling, make_plan
from crosscoder_jax.planning.compiling import compiled_steps

pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'crosscoder-jax[tpu]'")

WIDTH, LATENTS = 512, 4096
CONFIG = PlanConfig(
    Topology.parse("v5e:2x2"),
    (256, 256),
    LATENTS,
    k=32.0,
    batch_size=1024,
    precision="default",
    aux_k_weight=0.0,
    meshes=((1, 4), (2, 2)),
)


@pytest.fixture(scope="module")
def programs():
    answers = compiled_steps(CONFIG.recipe(), CONFIG.topology, CONFIG.meshes)
    return {tuple(answer["mesh"]): answer["text"] for answer in answers}


def test_a_plan_has_every_number():
    made = make_plan(CONFIG)
    for mesh in made.meshes:
        assert mesh.is_fitting
        assert mesh.xla_seconds is not None
        assert mesh.cycle_seconds is not None
        # No estimate is better than the chips' peak, nor as bad as a thousandth of it.
        assert 0.001 < mesh.utilization < 1
        assert 0 < mesh.cycle_shares["selection"] < 1
        assert mesh.cycle_shares["dot_general"] > 0.05
        assert mesh.hosts == 1
    assert made.cheapest is not None


def test_no_array_of_latents_is_gathered(programs):
    for text in programs.values():
        assert not re.search(r" (all-gather|all-to-all|reduce-scatter)(-start)?\(", text)


def test_the_update_stays_in_the_layout_of_the_weights(programs):
    """Were it not for the layout of the gradients, weights and moments would all be copied there and back."""
    shard = LATENTS // 2
    assert f"f32[{WIDTH},{shard}]{{1,0" in programs[2, 2]
    assert not re.findall(rf"f32\[(?:{shard},{WIDTH}|{WIDTH},{shard})\]\S* copy\(", programs[2, 2])


def test_what_does_not_fit_is_told_by_the_compiler():
    # 2^18 latents of width 512 are 3 GiB of state on the chip of 16, their codes of 2^14 tokens 16 GiB each.
    large = dataclasses.replace(CONFIG, num_latents=2**18, batch_size=2**14, meshes=((1, 1),))
    made = make_plan(large)
    assert not made.meshes[0].is_fitting
    assert re.fullmatch(r"temporaries of [\d.]+G, 15\.\d+G there", made.meshes[0].reason)
    assert made.cheapest is None


_MESHES = """
import json, sys
from crosscoder_jax.planning import worker
from crosscoder_jax.sharding import mesh_of

topology, *meshes = sys.argv[1:]
devices = worker._devices("tpu", topology)
for mesh in meshes:
    data, latent = (int(shards) for shards in mesh.split("x"))
    print(json.dumps([device.id for device in mesh_of(devices, data, latent).devices.flat]))
"""


@pytest.mark.parametrize("name", ["v5p:4x4x4", "v6e:4x4", "v5e:4x4", "v4:2x2x4"])
def test_every_mesh_that_a_plan_tries_can_be_made(name):
    """Of 4x4x4 chips ``jax.make_mesh`` makes no 2x32, 8x8 or 32x2, of 4x4 of v6e no 2x8 or 8x2."""
    topology = Topology.parse(name)
    splits = dataclasses.replace(CONFIG, topology=topology, meshes=()).splits()
    assert len(splits) == topology.num_chips.bit_length()  # every power of two
    # In a process of its own, as whatever the compiler does to its process it would do to this one.
    done = subprocess.run(
        [sys.executable, "-c", _MESHES, name, *(f"{data}x{latent}" for data, latent in splits)],
        env=compiling._environment(topology),
        capture_output=True,
        text=True,
        check=True,
    )
    made = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(made) == len(splits)
    assert {tuple(sorted(ids)) for ids in made} == {tuple(sorted(made[0]))}
    assert len(set(made[0])) == topology.num_chips


def test_a_dimension_of_the_wiring_is_divided_and_collectives_go_over_its_axes():
    """Compiled in the order of devices in which training has them."""
    config = dataclasses.replace(CONFIG, topology=Topology.parse("v6e:4x4"), meshes=((2, 8),))
    (mesh,) = make_plan(config).meshes
    assert mesh.is_fitting
    assert {one.axes for one in mesh.collectives} == {("data",), ("latent",), ("data", "latent")}
    # Eight chips with latents are two whole hosts, so that each host has rows of one shard of the data.
    assert (mesh.hosts, mesh.data_shards_per_host, mesh.lanes) == (4, 1, 2)
    assert mesh.store_bytes_per_s == pytest.approx(mesh.tokens_per_s * WIDTH * 2 / 2)


def test_chips_that_are_no_block_are_told_with_meshes_that_are():
    config = dataclasses.replace(CONFIG, num_latents=4095, meshes=((1, 3),))
    (mesh,) = make_plan(config).meshes
    assert not mesh.is_fitting
    assert mesh.reason.endswith("use 1x4, 2x2, 4x1")


def test_a_shape_that_no_tpu_has_is_refused():
    with pytest.raises(ValueError, match=r"topology='v5e:3x5' could not be compiled for: .*check the shape"):
        make_plan(dataclasses.replace(CONFIG, topology=Topology.parse("v5e:3x5"), meshes=((1, 1),)))
