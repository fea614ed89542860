"""Plans from what a compiler says: every number by hand; the compiler is played by the tests."""

import dataclasses

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
    said = {"mesh": list(mesh), "hosts": 2, "arguments": 90_000, "outputs": 80_000, "aliased": 79_000}
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
    assert mesh.tokens_per_s == pytest.approx(BATCH / mesh.cycle_seconds)


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
    compiler(lambda mesh: {"mesh": list(mesh), "hosts": 1, "refusal": said})
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
