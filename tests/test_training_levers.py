"""What saves memory changes the step only as it says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import collectives
from test_training_meshes import ACTS, BATCH, MESHES, RECIPE, train
from training_cases import K3, OPTIONS, activations, recipe, small_run, to_numpy, weights, write_store

import crosscoder_jax as cc
from crosscoder_jax.sharding import Shardings, make_mesh
from crosscoder_jax.training.adam import Adam, Factors
from crosscoder_jax.training.checkpoint import Checkpoints
from crosscoder_jax.training.loop import put_batch
from crosscoder_jax.training.state import init_state
from crosscoder_jax.training.step import train_step

KINDS = {
    "plain": RECIPE,
    "mean squared": dataclasses.replace(RECIPE, loss=cc.MeanSquaredError()),
    "matryoshka": dataclasses.replace(RECIPE, matryoshka=cc.Matryoshka((0.25, 1.0))),
    "without AuxK": dataclasses.replace(RECIPE, aux_k=None),
    "own budget": recipe(
        num_latents=48,
        sparsity=cc.BatchTopK(k=1.0),
        groups=(cc.LatentGroup("own", 0.25, k=0.5, writes=("chat",)),),
        aux_k=RECIPE.aux_k,
    ),
    "decoupled": recipe(
        num_latents=48, sparsity=cc.BatchTopK(k=1.0), code_norm=cc.Decoupled(), aux_k=RECIPE.aux_k
    ),
    "most tokens keep nothing": recipe(num_latents=48, sparsity=cc.BatchTopK(k=0.1), aux_k=RECIPE.aux_k),
}


def in_float64(config, **changes):
    crosscoder = dataclasses.replace(config.crosscoder, dtype="float64")
    return dataclasses.replace(config, crosscoder=crosscoder, **changes)


def run(config, steps=12):
    state, metrics = init_state(config), []
    for batch in ACTS[:steps]:
        state, measured = train_step(state, jnp.asarray(batch), config=config)
        metrics.append({name: np.asarray(value) for name, value in jax.device_get(measured).items()})
    return state, metrics


@pytest.mark.parametrize("parts", [2, 8, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_make_the_same_steps(kind, parts):
    """In float64, where only the order of sums differs."""
    with jax.enable_x64(True):
        whole, expected = run(in_float64(KINDS[kind]))
        state, metrics = run(in_float64(KINDS[kind], micro_batches=parts))
        for ours, theirs in zip(metrics, expected, strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                np.testing.assert_allclose(ours[name], value, rtol=1e-9, atol=1e-12, err_msg=name)
        for name, value in weights(whole).items():
            np.testing.assert_allclose(weights(state)[name], value, rtol=0, atol=1e-9, err_msg=name)
        np.testing.assert_array_equal(state.tokens_since_fired, whole.tokens_since_fired)
    if "loss/aux_k" in metrics[-1]:
        assert any(m["loss/aux_k"] > 0 for m in metrics), "latents were revived"


@pytest.mark.parametrize("kind", KINDS)
def test_codes_made_anew_make_the_same_steps(kind):
    with jax.enable_x64(True):
        whole, expected = run(in_float64(KINDS[kind]))
        state, metrics = run(in_float64(KINDS[kind], is_rematerialized=True))
    for ours, theirs in zip(metrics, expected, strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-9)
    for name, value in weights(whole).items():
        np.testing.assert_allclose(weights(state)[name], value, rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_micro_batches_on_meshes_are_those_of_one_device(shape):
    """Four parts of 32 tokens spread over up to 8 devices; in float64, so that selections are compared."""
    config = in_float64(RECIPE, micro_batches=4)
    with jax.enable_x64(True):
        _, fired, parameters, _ = train(config, shape)
        _, expected_fired, expected, _ = train(in_float64(RECIPE), None)
    np.testing.assert_array_equal(fired, expected_fired)
    for name, value in expected.items():
        np.testing.assert_allclose(parameters[name], value, rtol=0, atol=1e-9, err_msg=name)


LARGE = recipe(widths=(40, 24), num_latents=512, sparsity=cc.BatchTopK(k=4.0), batch_size=256, aux_k=None)


def compiled(config, shape=(2, 4), **spread):
    mesh = make_mesh(*shape)
    with jax.set_mesh(mesh):
        shardings = Shardings.for_mesh(mesh, **spread)
        state = init_state(config, shardings=shardings)
        acts = put_batch(activations(256, (40, 24)), mesh)
        return train_step.lower(state, acts, config=config).compile()


def test_parts_take_less_memory_than_the_whole():
    """Codes and their gradients are of one part; of the arrays [batch, latent] only pre-activations stay."""
    reviving = dataclasses.replace(LARGE, aux_k=cc.AuxK(k_aux=4, dead_after_tokens=256))
    whole, parts = (
        compiled(dataclasses.replace(reviving, micro_batches=number)).memory_analysis().temp_size_in_bytes
        for number in (1, 16)
    )
    array = 4 * (256 // 2) * (512 // 4)
    assert whole - parts > array


def test_a_batch_in_parts_gathers_nothing():
    text = compiled(dataclasses.replace(LARGE, micro_batches=4)).as_text()
    assert {kind for kind, _, _ in collectives(text)} == {"all-reduce"}


def test_rounded_pre_activations_choose_what_is_as_good():
    """A number rounded to 8 bits is off by at most a 512th: so is the cut, and each score beside it."""
    crosscoder = init_state(RECIPE).crosscoder()
    pre_acts = crosscoder.pre_acts(crosscoder.normalize(jnp.asarray(ACTS[0])))
    exact = crosscoder.training_code(pre_acts)
    rounded = crosscoder.training_code(pre_acts.astype(jnp.bfloat16))
    scores = np.asarray(jax.nn.relu(pre_acts) * crosscoder.score_weights())
    kept, cut = np.asarray(rounded.code > 0), float(exact.smallest_score)
    assert kept[scores > cut * (1 + 1 / 200)].all()
    assert not kept[scores < cut * (1 - 1 / 200)].any()
    np.testing.assert_allclose(rounded.smallest_score, cut, rtol=1 / 256)
    # The state stays float32, and learns.
    state, metrics = run(dataclasses.replace(RECIPE, pre_acts="bfloat16"), steps=20)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    _, expected = run(RECIPE, steps=20)
    assert metrics[-1]["fve"] > expected[-1]["fve"] - 0.02


# The optimiser's state.


def test_factors_of_a_matrix_of_rank_one_are_the_matrix():
    rows, columns = np.array([1.0, 2.0, 0.0]), np.array([0.5, 4.0])
    matrix = jnp.asarray(np.outer(rows, columns), jnp.float32)
    np.testing.assert_allclose(Factors.of(matrix).product(), matrix, rtol=1e-6)
    np.testing.assert_array_equal(Factors.of(jnp.zeros((3, 2))).product(), np.zeros((3, 2)))


def test_a_factored_second_moment_is_adam_where_squares_have_rank_one():
    rng = np.random.default_rng(0)
    rows, columns = rng.uniform(0.5, 2, 6), rng.uniform(0.5, 2, 4)
    signs = rng.choice([-1, 1], size=(8, 6, 4))
    full, factored = Adam().transformation(), Adam(second_moment="factored").transformation()
    params = {"w": jnp.zeros((6, 4)), "b": jnp.zeros(4)}
    states = full.init(params), factored.init(params)
    for sign in signs:
        grads = {"w": jnp.asarray(sign * np.outer(rows, columns), jnp.float32), "b": jnp.asarray(columns)}
        (expected, one), (found, other) = (
            rule.update(grads, state) for rule, state in zip((full, factored), states, strict=True)
        )
        states = one, other
        for name in params:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=name)
    kept = states[1].nu
    assert {leaf.shape for leaf in kept["w"]} == {(6,), (4,)}
    assert kept["b"].shape == (4,)


def test_a_first_moment_in_bfloat16_is_adams_to_its_rounding():
    rng = np.random.default_rng(0)
    full, half = Adam().transformation(), Adam(first_moment="bfloat16").transformation()
    params = jnp.zeros((50,))
    states = full.init(params), half.init(params)
    for _ in range(30):
        grads = jnp.asarray(rng.normal(size=50), jnp.float32)
        (expected, one), (found, other) = (
            rule.update(grads, state) for rule, state in zip((full, half), states, strict=True)
        )
        states = one, other
        assert other.mu.dtype == jnp.bfloat16
        # Each of about ten roundings that still count is by a 512th of the moment; updates are of size 1.
        np.testing.assert_allclose(found, expected, atol=10 / 512)
    assert other.nu.dtype == jnp.float32


SMALL = {
    "bfloat16 and factored": Adam(first_moment="bfloat16", second_moment="factored"),
    "bfloat16": Adam(first_moment="bfloat16"),
    "factored": Adam(second_moment="factored"),
}


@pytest.mark.parametrize("kind", SMALL)
def test_less_state_learns_about_as_much(kind):
    _, metrics = run(dataclasses.replace(RECIPE, optimizer=SMALL[kind]), steps=20)
    _, expected = run(RECIPE, steps=20)
    first, last = expected[0]["loss/reconstruction"], expected[-1]["loss/reconstruction"]
    assert metrics[-1]["loss/reconstruction"] < last + (first - last) / 10


def test_states_of_less_memory_are_saved_and_restored(tmp_path):
    config = dataclasses.replace(RECIPE, optimizer=SMALL["bfloat16 and factored"])
    state, _ = run(config, steps=3)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state)
    restored = checkpoints.restore(jax.eval_shape(lambda: init_state(config)))
    checkpoints.close()
    for name, value in to_numpy(state).items():
        np.testing.assert_array_equal(to_numpy(restored)[name], value, err_msg=name)


@pytest.mark.parametrize("optimizer", [Adam(), *SMALL.values()], ids=str)
@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (8, 1)], ids=str)
def test_an_optimizer_spread_over_the_data_takes_the_same_steps(optimizer, shape):
    config = dataclasses.replace(
        RECIPE,
        optimizer=optimizer,
        crosscoder=recipe(widths=(4, 4), num_latents=48, sparsity=cc.BatchTopK(k=1.0)).crosscoder,
    )
    acts = [activations(BATCH, (4, 4), seed=seed) / 3 for seed in range(6)]
    mesh, found = make_mesh(*shape), []
    with jax.set_mesh(mesh):
        for is_spread in (False, True):
            state = init_state(config, shardings=Shardings.for_mesh(mesh, is_optimizer_spread=is_spread))
            layout = jax.tree.map(lambda leaf: leaf.sharding, state.opt_state)
            for batch in acts:
                state, _ = train_step(state, put_batch(batch, mesh), config=config)
            assert jax.tree.map(lambda leaf: leaf.sharding, state.opt_state) == layout
            found.append(
                (weights(state), state.opt_state[1].mu["w_enc"][...].addressable_shards[0].data.size)
            )
    (expected, whole), (ours, share) = found
    assert share * shape[0] == whole
    for name, value in expected.items():
        # The same numbers, summed in another order, and Adam's first steps divide by roots of them.
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=2e-5, err_msg=name)


def test_a_spread_optimizer_gathers_updates_and_keeps_its_share():
    whole, spread = (compiled(LARGE, is_optimizer_spread=is_spread) for is_spread in (False, True))
    assert spread.memory_analysis().argument_size_in_bytes < whole.memory_analysis().argument_size_in_bytes
    gathered = [shapes for kind, shapes, _ in collectives(spread.as_text()) if kind == "all-gather"]
    # Updates of encoder and decoder, of the latents of this shard.
    assert {shape for shapes in gathered for shape in shapes} >= {(64, 128), (128, 64)}


def test_a_run_of_less_memory_goes_on_with_another(tmp_path):
    """How moments are spread is no part of the recipe: a checkpoint of one is one of the other."""
    store = write_store(tmp_path / "store", widths=(4, 4))
    config = recipe(widths=(4, 4), sparsity=K3, num_steps=12)
    whole = small_run(store, tmp_path / "whole", config=config)
    mesh = make_mesh(4, 2)
    spread = dataclasses.replace(OPTIONS, is_optimizer_spread=True, checkpoint_every=4)

    class StoppedError(Exception):
        pass

    def stop(done, total, unit):
        if done >= 6:
            raise StoppedError

    with pytest.raises(StoppedError):
        small_run(store, tmp_path / "run", config=config, mesh=mesh, options=spread, progress=stop)
    resumed = small_run(store, tmp_path / "run", config=config)
    for name in ("w_enc", "w_dec"):
        expected = np.asarray(getattr(whole, name)[...])
        np.testing.assert_allclose(np.asarray(getattr(resumed, name)[...]), expected, rtol=0, atol=2e-5)


# What makes no run.


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"micro_batches": 0}, "micro_batches=0 must be positive and divide batch_size=32"),
        ({"micro_batches": 3}, "micro_batches=3 must be positive and divide batch_size=32"),
        ({"micro_batches": 2, "sparsity": cc.TopK(3)}, "only a batch of BatchTopK"),
        ({"is_rematerialized": True, "sparsity": cc.TopK(3)}, "only codes of BatchTopK are made anew"),
        (
            {"optimizer": Adam(second_moment="factored"), "resampling": cc.Resampling(10)},
            "resampling with second_moment='factored'",
        ),
    ],
)
def test_levers_that_make_no_run_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        recipe(**changes)


@pytest.mark.parametrize(
    ("field", "value"),
    [("b1", 1.0), ("b2", -0.1), ("eps", 0.0)],
)
def test_moments_that_make_no_adam_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r} of Adam must"):
        Adam(**{field: value})


def test_sizes_that_do_not_spread_are_refused_by_name(tmp_path):
    store = write_store(tmp_path / "store")
    with pytest.raises(ValueError, match="batch_size / micro_batches=4 must be divisible by the 'data'"):
        small_run(store, tmp_path / "run", config=recipe(micro_batches=8), mesh=make_mesh(8, 1))
    with pytest.raises(ValueError, match="width of all sources=11 must be divisible by the 'data'"):
        small_run(
            store,
            tmp_path / "run",
            mesh=make_mesh(2, 1),
            options=dataclasses.replace(OPTIONS, is_optimizer_spread=True),
        )
