"""Plans from what a compiler says: every number by hand; the compiler is played by the tests."""

import dataclasses

import numpy as np
import pytest

from crosscoder_jax.planning import PlanConfig, Topology, make_plan, plan
from crosscoder_jax.planning.program import Program

GIB = 2**30
WIDTH, LATENTS, BATCH = 6 + 10, 64, 32
CONFIG = PlanConfig(Topology.parse("v5e:2x2"), (6, 10), LATENTS, k=4.0, batch_size=BATCH, aux_k_weight=0.0)
TEXT = """ENTRY %main (p: f32[8]) -> f32[8] {
  %a = f32[8] fusion(%p), metadata={op_name="jit(f)/dot_general"}, backend_config={"estimated_cycles":"1200"}
  %s = f32[8] fusion(%a), metadata={op_name="jit(f)/selection/x"}, backend_config={"estimated_cycles":"300"}
  ROOT %r = f32[1000] all-reduce(%s), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""


def facts(mesh, **changes):
    # Two hosts, one after the other along the data, or along the latents where these are not shared.
    processes = (np.arange(4) // 2).reshape(mesh).tolist()
    said = {"mesh": list(mesh), "processes": processes}
    said |= {"arguments": 90_000, "outputs": 80_000, "aliased": 79_000}
    said |= {"temporaries": 50_000, "program": 4_000, "flops": 1e6, "optimal_seconds": 1e-5, "text": TEXT}
    return said | changes


@pytest.fixture
def compiler(monkeypatch):
    """Set what the compiler says of each mesh; returns the meshes it was asked for."""

    def play(answers):
        asked = []

        def compiled_steps(recipe, topology, meshes, *, is_optimizer_spread):
            asked.extend(meshes)
            return iter([answers(mesh) for mesh in meshes])

        monkeypatch.setattr(plan, "compiled_steps", compiled_steps)
        return asked

    return play


def only_mesh(config):
    (mesh,) = make_plan(config).meshes
    return mesh


def test_bytes_of_a_chip_are_those_of_shapes_and_compiler(compiler):
    compiler(facts)
    sizes = only_mesh(dataclasses.replace(CONFIG, meshes=((2, 2),))).bytes_per_chip
    # Half of the latents: encoder, decoder and encoder bias; the decoder bias whole. float32.
    weights = 4 * (2 * WIDTH * 32 + 32 + WIDTH)
    assert sizes.weights == weights
    assert sizes.moments == 2 * weights + 8  # and the two counts of steps of the optimiser
    assert sizes.pre_acts == 4 * 16 * 32
    assert sizes.batch == 90_000 - sizes.weights - sizes.moments
    assert sizes.temporaries == 50_000
    assert sizes.total == 90_000 + 50_000 + 4_000 + (80_000 - 79_000)


def test_a_checkpoint_is_the_whole_state(compiler):
    compiler(facts)
    weights = 4 * (2 * WIDTH * LATENTS + LATENTS + WIDTH)
    # Moments; two counts of the optimiser; the step, a key, normaliser, threshold, its mean, and counters.
    others = 8 + 4 + 8 + 4 * (WIDTH + 2 + 1) + 8 + 4 * LATENTS
    assert make_plan(CONFIG).checkpoint_bytes == 3 * weights + others


def test_times_and_what_follows_from_them(compiler):
    compiler(facts)
    mesh = only_mesh(dataclasses.replace(CONFIG, meshes=((2, 2),)))
    model_flops = 10 * LATENTS * WIDTH * BATCH
    # bfloat16 at precision highest: three of five products have one float32 side, which takes two more
    # passes. Three passes of the selection's loop, of which XLA counts one, over 2 KiB a chip.
    passes = model_flops * 3 / 5 * 2 / (4 * 197e12)
    searched = 2 * 4 * 16 * 32 / 819e9
    assert mesh.model_flops == model_flops
    assert mesh.flops == 4e6
    assert mesh.xla_seconds == 1e-5
    assert mesh.left_out_seconds == pytest.approx(passes + searched)
    seconds = 1e-5 + passes + searched
    assert mesh.tokens_per_s == pytest.approx(BATCH / seconds)
    assert mesh.utilization == pytest.approx(model_flops / (seconds * 4 * 197e12))
    assert mesh.store_bytes_per_s == pytest.approx(BATCH / seconds * WIDTH * 2 / 2)
    # 1500 cycles at 1.5 GHz; 4000 bytes go three quarters of the way around twice, at 200 GB/s.
    assert mesh.cycle_seconds == pytest.approx(1e-6 + 2 * 4000 * 3 / 4 / 200e9)
    assert mesh.cycle_shares == {"dot_general": 0.8, "selection": 0.2}


@pytest.mark.parametrize(
    ("changes", "further_passes"),
    [
        ({"dtype": "float32", "precision": "highest"}, 5 * 5),
        ({"dtype": "float32", "precision": "high"}, 5 * 2),
        ({"dtype": "float32", "precision": "default"}, 0),
        ({"dtype": "bfloat16", "precision": "highest"}, 3 * 2),
        ({"dtype": "bfloat16", "precision": "high"}, 3 * 1),
        ({"dtype": "bfloat16", "precision": "default"}, 0),
        ({"dtype": "float32", "precision": "highest", "aux_k_weight": 0.1}, 8 * 5),
        ({"dtype": "bfloat16", "precision": "highest", "aux_k_weight": 0.1}, 5 * 2),
    ],
)
def test_every_pass_of_a_float32_product_counts(compiler, changes, further_passes):
    compiler(facts)
    mesh = only_mesh(dataclasses.replace(CONFIG, meshes=((4, 1),), **changes))
    a_product = 2 * LATENTS * WIDTH * BATCH / (4 * 197e12)
    searched = 2 * mesh.bytes_per_chip.pre_acts / 819e9
    assert mesh.left_out_seconds == pytest.approx(further_passes * a_product + searched)


def test_operations_of_unknown_time_are_no_gain(compiler):
    text = TEXT.replace("ROOT", '%v = f32[8] custom-call(%a), custom_call_target="V"\n  ROOT', 1)
    compiler(lambda mesh: facts(mesh, optimal_seconds=1e-5 - 1, text=text))
    assert only_mesh(dataclasses.replace(CONFIG, meshes=((2, 2),))).xla_seconds == pytest.approx(1e-5)
    compiler(lambda mesh: facts(mesh, optimal_seconds=1e-5 - 2, text=text))
    mesh = only_mesh(dataclasses.replace(CONFIG, meshes=((2, 2),)))
    assert mesh.xla_seconds is None
    assert mesh.estimate == "cycles"
    assert mesh.tokens_per_s == pytest.approx(BATCH / mesh.cycle_seconds)


def test_meshes_are_compared_by_one_kind_of_estimate(compiler):
    """XLA tells no time of 2x2; its cycles say more than XLA of the others, which would then be cheapest."""
    many = TEXT.replace('"1200"', '"30000"')
    texts = {(1, 4): many, (2, 2): TEXT, (4, 1): many}
    seconds = {(1, 4): 1e-5, (2, 2): None, (4, 1): 1e-5}
    compiler(lambda mesh: facts(mesh, optimal_seconds=seconds[mesh], text=texts[mesh]))
    made = make_plan(CONFIG)
    assert made.meshes[0].xla_seconds == pytest.approx(1e-5)
    assert [mesh.estimate for mesh in made.meshes] == ["cycles"] * 3
    assert [mesh.tokens_per_s for mesh in made.meshes] == [
        pytest.approx(BATCH / mesh.cycle_seconds) for mesh in made.meshes
    ]
    assert made.cheapest is made.meshes[1]


def test_without_cycles_xla_tells_the_times(compiler):
    compiler(lambda mesh: facts(mesh, text=TEXT.replace("estimated_cycles", "none")))
    made = make_plan(CONFIG)
    assert all(mesh.estimate == "xla" and mesh.cycle_seconds is None for mesh in made.meshes)
    assert all(mesh.tokens_per_s is not None for mesh in made.meshes)


@pytest.mark.parametrize(
    ("mesh", "processes", "share", "lanes"),
    [
        ((1, 4), [[0, 0, 1, 1]], 1, 1),  # both hold latents of the only shard of the data
        ((2, 2), [[0, 0], [1, 1]], 1 / 2, 2),
        ((2, 2), [[0, 1], [0, 1]], 1, 1),
        ((4, 1), [[0], [0], [1], [1]], 1 / 2, 2),
        ((4, 1), [[0], [1], [0], [1]], 1 / 2, 4),  # with two lanes each host would need both
        ((4, 1), [[0], [0], [0], [1]], 3 / 4, 4),
    ],
)
def test_a_host_reads_the_rows_that_its_chips_hold(compiler, mesh, processes, share, lanes):
    compiler(lambda mesh: facts(mesh, processes=processes))
    planned = only_mesh(dataclasses.replace(CONFIG, meshes=(mesh,)))
    assert planned.hosts == 2
    assert planned.lanes == lanes
    assert planned.store_bytes_per_s == pytest.approx(planned.tokens_per_s * WIDTH * 2 * share)


def test_hosts_of_sizes_from_shapes_hold_neighbours(compiler):
    compiler(facts)
    # Eight GPUs a host: hosts are the two halves of the latents of 1x16, the halves of the data of 16x1, and
    # of 4x4 each has two shards of the data.
    config = dataclasses.replace(
        CONFIG, topology=Topology.parse("16xH100-80GB"), meshes=((1, 16), (4, 4), (16, 1))
    )
    made = make_plan(config).meshes
    assert [(mesh.hosts, mesh.data_shards_per_host, mesh.lanes) for mesh in made] == [
        (2, 1, 1),
        (2, 2, 2),
        (2, 8, 2),
    ]


def test_a_mesh_that_the_chips_do_not_make_is_told_with_those_that_they_make(compiler):
    compiler(lambda mesh: {"mesh": list(mesh), "no_mesh": "no block of the wiring: use 2x2"})
    made = make_plan(dataclasses.replace(CONFIG, num_latents=63, meshes=((1, 3),)))
    assert (made.meshes[0].is_fitting, made.meshes[0].reason) == (False, "no block of the wiring: use 2x2")
    assert made.cheapest is None


def test_publishing_takes_the_weights_once_and_more_where_they_are_written(compiler):
    compiler(facts)
    assert make_plan(CONFIG).crosscoder_bytes == 4 * (2 * WIDTH * LATENTS + LATENTS + WIDTH)


def test_all_splits_that_divide_are_tried_and_the_quickest_that_fits_is_cheapest(compiler):
    seconds = {(1, 4): 3e-5, (2, 2): 2e-5, (4, 1): 1e-5}
    large = {(4, 1): 17 * GIB}
    asked = compiler(
        lambda mesh: facts(mesh, optimal_seconds=seconds[mesh], temporaries=large.get(mesh, 50_000))
    )
    made = make_plan(CONFIG)
    assert asked == [(1, 4), (2, 2), (4, 1)]
    assert [mesh.is_fitting for mesh in made.meshes] == [True, True, False]
    assert made.meshes[2].reason == "17.0 GiB"
    assert made.cheapest is made.meshes[1]


def test_sizes_that_do_not_divide_are_left_out(compiler):
    asked = compiler(facts)
    make_plan(dataclasses.replace(CONFIG, num_latents=66))
    assert asked == [(2, 2), (4, 1)]


def test_a_refusal_of_the_compiler_is_an_answer(compiler):
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.53G of 15.75G hbm. Exceeded."
    compiler(lambda mesh: {"mesh": list(mesh), "processes": np.zeros(mesh, int).tolist(), "refusal": said})
    made = make_plan(CONFIG)
    assert {(mesh.is_fitting, mesh.reason) for mesh in made.meshes} == {(False, "20.53G used, 15.75G there")}
    assert made.cheapest is None


def test_what_cannot_fit_is_not_compiled(compiler):
    asked = compiler(facts)
    # 2^22 latents of width 16: 3 * 2 * 16 * 4 bytes each are 1.5 GiB, of width 256 24 GiB; a quarter fits.
    made = make_plan(dataclasses.replace(CONFIG, widths=(128, 128), num_latents=2**22, batch_size=4))
    assert asked == [(1, 4), (2, 2)]
    assert made.meshes[2].reason == "its state alone is 24.1 GiB"


def test_gpus_are_planned_from_shapes(compiler):
    asked = compiler(facts)
    config = dataclasses.replace(CONFIG, topology=Topology.parse("2xA100-40GB"), meshes=((1, 2),))
    mesh = only_mesh(config)
    assert asked == []
    assert mesh.basis == "shapes"
    assert mesh.is_fitting
    sizes = mesh.bytes_per_chip
    assert sizes.temporaries is None
    # Gradients like the weights, and three arrays [batch, latent].
    assert sizes.total == 2 * sizes.weights + sizes.moments + sizes.batch + 3 * 4 * BATCH * LATENTS // 2
    assert (mesh.tokens_per_s, mesh.utilization, mesh.xla_seconds) == (None, None, None)


@pytest.mark.parametrize(
    ("changes", "weights", "codes", "pre_acts"),
    [
        ({}, 1, 2, 4),
        ({"is_rematerialized": True}, 1, 2, 4),
        ({"aux_k_weight": 0.1}, 1.5, 5, 4),
        ({"pre_acts": "bfloat16"}, 1, 2, 2),
        ({"micro_batches": 4}, 1.5, 2 / 4, 4),
        ({"micro_batches": 4, "is_rematerialized": True}, 1.5, 2 / 4, 4),
        ({"micro_batches": 4, "aux_k_weight": 0.1}, 4.5, 5 / 4, 4),
    ],
)
def test_sizes_from_shapes_know_what_a_step_keeps(changes, weights, codes, pre_acts):
    config = dataclasses.replace(CONFIG, topology=Topology.parse("2xA100-40GB"), meshes=((1, 2),), **changes)
    sizes = only_mesh(config).bytes_per_chip
    shard = BATCH * LATENTS // 2
    assert sizes.assumed_temporaries == weights * sizes.weights + (4 * codes + pre_acts) * shard
    assert sizes.total == sizes.weights + sizes.moments + sizes.batch + sizes.assumed_temporaries


def test_sizes_from_shapes_are_those_of_the_compiler_nearly():
    """Temporaries in GiB of v5e-8 as 2x4, as libtpu 0.0.42.1 laid them out, at most 15 % off."""
    base = PlanConfig(
        Topology.parse("8xH100-80GB"),
        (2304, 2304),
        73_728,
        batch_size=16_384,
        precision="default",
        meshes=((2, 4),),
    )
    compiled = [
        ({}, 4.29),
        ({"is_rematerialized": True}, 4.26),
        ({"micro_batches": 4}, 4.26),
        ({"micro_batches": 16}, 3.54),
        ({"pre_acts": "bfloat16"}, 3.55),
        ({"aux_k_weight": 0.0}, 2.22),
        ({"aux_k_weight": 0.0, "is_rematerialized": True}, 2.22),
        ({"aux_k_weight": 0.0, "micro_batches": 4}, 1.78),
        ({"aux_k_weight": 0.0, "micro_batches": 16}, 1.50),
    ]
    for changes, gib in compiled:
        assumed = only_mesh(dataclasses.replace(base, **changes)).bytes_per_chip.assumed_temporaries
        assert assumed / GIB == pytest.approx(gib, rel=0.15), changes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"widths": ()}, r"sources=\(\) must be the positive widths"),
        ({"widths": (4, 0)}, "must be the positive widths"),
        ({"num_latents": 0}, "num_latents=0 must be positive"),
        ({"batch_size": -1}, "batch_size=-1 must be positive"),
        ({"meshes": ((2, 3),)}, "meshes=2x3 needs 6 chips, and v5e:2x2 has 4"),
        ({"meshes": ((1, 4),), "num_latents": 66}, "meshes=1x4: num_latents=66 .* 4 shards: use 64 or 68"),
        ({"meshes": ((4, 1),), "batch_size": 2}, "batch_size=2 does not spread over 4 shards: use 4 or 4"),
    ],
)
def test_what_makes_no_plan_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(CONFIG, **changes)


def test_sizes_that_spread_in_no_way_are_refused_with_one_that_does():
    config = dataclasses.replace(CONFIG, num_latents=63, batch_size=33)
    with pytest.raises(ValueError, match=r"spread over the 4 chips of v5e:2x2 in no way: .*num_latents=64"):
        config.splits()


def test_a_recipe_that_makes_no_run_is_refused():
    with pytest.raises(ValueError, match=r"k=100\.0 active latents per token are more than num_latents=64"):
        make_plan(dataclasses.replace(CONFIG, k=100.0))


def test_the_played_program_is_read_as_the_tests_say():
    assert Program(TEXT, (2, 2)).cycles(("selection", "dot_general")) == {
        "dot_general": 1200,
        "selection": 300,
    }
