"""What a plan looks like in a terminal and as JSON."""

import dataclasses
import json

import pytest

from crosscoder_jax.planning import MeshPlan, Plan, PlanConfig, Topology, wording
from crosscoder_jax.planning.plan import ChipBytes
from crosscoder_jax.planning.program import Collective
from crosscoder_jax.training.adam import Adam
from crosscoder_jax.training.muon import Muon

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
    return Plan(config, 16 * GIB, 123_456_789, 41_000_000, meshes)


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
        "To finish the host needs 123 MB of memory, 3 times the crosscoder",
    ]


def test_hosts_that_share_a_batch_are_told_the_lanes_that_it_takes():
    # Of 4 shards of the data a host holds 2, so that without lanes each reads twice as much.
    mesh = dataclasses.replace(FITTING, data=4, latent=1, hosts=2, data_shards_per_host=2, lanes=2)
    lines = wording.closing_lines(plan(mesh))
    assert lines[2] == (
        "The store must deliver 2.62 MB/s to each of 2 hosts if train is given --lanes 2 or a multiple; "
        "without, every host reads the whole store, at 5.24 MB/s"
    )
    assert lines[-1] == (
        "To finish each of 2 hosts needs 41 MB of memory, the whole crosscoder, and the first one 123 MB"
    )


def test_hosts_along_the_latents_all_read_the_same():
    mesh = dataclasses.replace(FITTING, data=1, latent=4, hosts=2)
    assert wording.closing_lines(plan(mesh))[2] == (
        "The store must deliver 2.62 MB/s to each of 2 hosts, which all need every row"
    )


def test_the_optimizer_is_called_what_it_is():
    made = plan(FITTING, config=dataclasses.replace(CONFIG, optimizer=Muon()))
    assert wording.closing_lines(made)[1].endswith("products 70%, selection 25%, Muon 5%")


def test_estimates_by_cycles_are_marked():
    made = plan(dataclasses.replace(FITTING, xla_seconds=None, estimate="cycles"))
    assert wording.closing_lines(made)[0].endswith("41% of peak by the compiler's cycles")
    table = wording.step_table(made)
    assert "(step ms by its cycles, as XLA tells no time of some mesh)" in table.title
    assert table.rows[0][4:6] == ("-", "20")


def test_where_nothing_fits_that_is_told_with_a_remedy():
    (line,) = wording.closing_lines(plan(LARGE))
    assert line == (
        "No mesh fits into 16 GiB a chip: take more chips or a smaller --batch-size, or save memory with "
        "--micro-batches, --is-rematerialized, --is-optimizer-spread, --first-moment bfloat16, "
        "--second-moment factored, --pre-acts bfloat16"
    )


@pytest.mark.parametrize(
    ("changes", "names", "leaves_out"),
    [
        ({"dtype": "float32"}, "--dtype bfloat16", None),
        # Codes of parts of a batch are made anew anyway.
        ({"micro_batches": 2}, "--is-optimizer-spread", "--is-rematerialized"),
        ({"is_optimizer_spread": True}, "--micro-batches", "--is-optimizer-spread"),
        ({"pre_acts": "bfloat16"}, "--micro-batches", "--pre-acts"),
        ({"optimizer": Adam(first_moment="bfloat16")}, "--second-moment factored", "--first-moment"),
        ({"optimizer": Muon()}, "--first-moment bfloat16", "--second-moment"),
    ],
)
def test_remedies_are_those_not_taken_yet(changes, names, leaves_out):
    (line,) = wording.closing_lines(plan(LARGE, config=dataclasses.replace(CONFIG, **changes)))
    assert names in line
    assert leaves_out is None or leaves_out not in line


def test_what_uses_every_remedy_is_left_with_more_chips():
    config = dataclasses.replace(
        CONFIG,
        micro_batches=2,
        is_optimizer_spread=True,
        pre_acts="bfloat16",
        optimizer=Adam(first_moment="bfloat16", second_moment="factored"),
    )
    (line,) = wording.closing_lines(plan(LARGE, config=config))
    assert line == "No mesh fits into 16 GiB a chip: take more chips or a smaller --batch-size"


def test_sizes_from_shapes_are_labelled():
    gpu = dataclasses.replace(CONFIG, topology=Topology.parse("4xA100-40GB"))
    from_shapes = MeshPlan(4, 1, "shapes", True, "", LARGE.bytes_per_chip, 1, model_flops=312e9)
    made = plan(from_shapes, config=gpu)
    assert wording.memory_table(made).title.endswith("sizes from shapes alone, no compiler for GPUs is used")
    assert wording.closing_lines(made)[0] == (
        "Cheapest mesh that fits: 4x1, the one that takes the least memory, as nothing here estimates times"
    )
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
    assert (data["crosscoder_bytes"], data["finishing_bytes"]) == (41_000_000, 123_000_000)
    assert data["times_are"] == "estimates of compilers, not measurements"
    assert data["config"]["topology"]["name"] == "v5e:2x2"
    assert data["meshes"][0]["bytes_per_chip"]["total"] == 6.5 * GIB
    assert data["meshes"][0]["collectives"][0]["axes"] == ["data"]
    assert data["meshes"][1]["reason"] == LARGE.reason
