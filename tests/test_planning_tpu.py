"""The real step compiled for TPUs, which need not be here; libtpu must."""

import dataclasses
import re

import pytest

from crosscoder_jax.planning import PlanConfig, Topology, make_plan
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


def test_a_shape_that_no_tpu_has_is_refused():
    with pytest.raises(ValueError, match=r"topology='v5e:3x5' could not be compiled for: .*check the shape"):
        make_plan(dataclasses.replace(CONFIG, topology=Topology.parse("v5e:3x5"), meshes=((1, 1),)))
