"""What a plan looks like in a terminal and as JSON."""

import dataclasses
import json

import pytest

from crosscoder_jax.planning import MeshPlan, Plan, PlanConfig, Topology, wording
from crosscoder_jax.planning.plan import ChipBytes
from crosscoder_jax.planning.program import Collective

GIB = 2**30
CONFIG = PlanConfig(Topology.parse("v5e:2x2"), (8, 24), 1024, k=4.0, batch_size=512)
FITTING = MeshPlan(
    2,
    2,
    basis="compiled",
    is_fitting=True,
    reason="",
    bytes_per_chip=ChipBytes(GIB, 2 * GIB, GIB // 2, GIB // 4, 3 * GIB, 0),
    hosts=1,
    collectives=(
        Collective("all-reduce", 3_000_000, "f32[8]", ("data",), 1, 2),
        Collective("all-reduce", 2_000_000, "f32[8]", ("latent",), 1, 2),
        Collective("all-reduce", 500_000, "f32[8]", ("data", "latent"), 1, 4),
    ),
    flops=5e12,
    model_flops=4e12,
    xla_seconds=0.010,
    left_out_seconds=0.0025,
    cycle_seconds=0.020,
    cycle_shares={"selection": 0.25, "dot_general": 0.7, "update": 0.05},
    tokens_per_s=40_960.0,
    utilization=0.406,
    store_bytes_per_s=2.62e6,
)
LARGE = MeshPlan(
    4,
    1,
    "compiled",
    False,
    "Used 20.5G of 15.7G hbm",
    dataclasses.replace(FITTING.bytes_per_chip, temporaries=None),
    1,
)


def plan(*meshes, config=CONFIG):
    return Plan(config, 16 * GIB, 123_456_789, meshes)


def test_memory_is_told_by_kind():
    table = wording.memory_table(plan(FITTING, LARGE))
    assert table.title == "Memory of one chip, GiB (16 there)"
    assert table.rows[0] == ("2x2", "yes", "6.50", "1.00", "2.00", "0.50", "0.25", "3.00", "")
    assert table.rows[1] == ("4x1", "NO", "-", "1.00", "2.00", "0.50", "0.25", "-", LARGE.reason)
    assert table.columns[-1] == "why not"


def test_where_all_fits_no_column_says_why_not():
    table = wording.memory_table(plan(FITTING))
    assert table.columns[-1] == "temporaries"
    assert len(table.rows[0]) == len(table.columns)


def test_a_step_is_told_in_the_units_of_the_columns():
    table = wording.step_table(plan(FITTING, LARGE))
    assert table.rows == (("2x2", "5", "3", "2.5", "10", "12.5", "40,960", "41%", "25%", "2.62"),)
    assert "not" not in table.columns
    assert table.title.endswith("nothing here is a measurement")
    assert wording.step_table(plan(LARGE)) is None


def test_the_cheapest_mesh_is_told_with_what_it_asks_for():
    assert wording.closing_lines(plan(FITTING, LARGE)) == [
        "Cheapest mesh that fits: 2x2, estimated 40,960 tokens/s, 41% of peak",
        "Where its cycles go (20 ms by them): products 70%, selection 25%, Adam 5%",
        "The store must deliver 2.62 MB/s to the host",
        "A checkpoint takes 123 MB",
    ]


def test_where_nothing_fits_that_is_told_with_a_remedy():
    (line,) = wording.closing_lines(plan(LARGE))
    assert line.startswith("No mesh fits into 16 GiB a chip: take more chips")


def test_sizes_from_shapes_are_labelled():
    gpu = dataclasses.replace(CONFIG, topology=Topology.parse("4xA100-40GB"))
    from_shapes = MeshPlan(4, 1, "shapes", True, "", LARGE.bytes_per_chip, 1, model_flops=312e9)
    made = plan(from_shapes, config=gpu)
    assert wording.memory_table(made).title.endswith("sizes from shapes alone, no compiler for GPUs is used")
    # 312 GFLOP at four times 312 TFLOP/s are 0.25 ms.
    assert wording.closing_lines(made)[1] == (
        "A dense step is 0.312 TFLOP: at the chips' peak, so no faster than 0.25 ms or 2,048,000 tokens/s"
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "no AuxK"),
        ({"aux_k_weight": 0.1}, "AuxK"),
    ],
)
def test_the_run_is_described_in_a_line(changes, says):
    config = dataclasses.replace(CONFIG, **({"aux_k_weight": 0.0} | changes))
    assert wording.describe(config) == (
        "v5e:2x2: 4 chips of 16 GiB; 1,024 latents of width 8 + 24, k 4, batch 512, bfloat16 at precision "
        f"highest, {says}"
    )


def test_json_holds_everything_and_says_that_times_are_estimates():
    data = json.loads(json.dumps(wording.plan_to_json(plan(FITTING, LARGE))))
    assert data["cheapest"] == [2, 2]
    assert data["times_are"] == "estimates of compilers, not measurements"
    assert data["config"]["topology"]["name"] == "v5e:2x2"
    assert data["meshes"][0]["bytes_per_chip"]["total"] == 6.5 * GIB
    assert data["meshes"][0]["collectives"][0]["axes"] == ["data"]
    assert data["meshes"][1]["reason"] == LARGE.reason
