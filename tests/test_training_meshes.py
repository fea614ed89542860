"""Training on meshes of 8 devices: the numbers of one device, and what the compiled step sends."""

import contextlib
import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import collectives, over
from training_cases import activations, recipe, selected, to_numpy, weights

import crosscoder_jax as cc
from crosscoder_jax.kernels import native
from crosscoder_jax.sharding import Shardings, make_mesh
from crosscoder_jax.training.loop import put_batch
from crosscoder_jax.training.state import init_state
from crosscoder_jax.training.step import eval_step, train_step

BATCH, LATENTS, WIDTH, STEPS = 32, 48, 11, 20
# k 1 leaves about half of 48 latents silent in two batches of 32, now more than k_aux, now fewer.
RECIPE = recipe(
    num_latents=LATENTS,
    sparsity=cc.BatchTopK(k=1.0),
    num_steps=STEPS,
    warmup_steps=2,
    aux_k=cc.AuxK(0.5, k_aux=24, dead_after_tokens=2 * BATCH),
)
MESHES = [(1, 1), (8, 1), (1, 8), (2, 4), (4, 2)]
ACTS = activations(BATCH * STEPS).reshape(STEPS, BATCH, WIDTH) / 3


@contextlib.contextmanager
def on(mesh):
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        yield Shardings.for_mesh(mesh)


def train(config, shape):
    """Metrics and what was kept of each token at each step, and the weights at the end."""
    mesh = None if shape is None else make_mesh(*shape)
    metrics, kept = [], []
    with on(mesh) as shardings:
        state = init_state(config, b_dec=ACTS[0].mean(axis=0), shardings=shardings)
        for batch in ACTS:
            acts = put_batch(batch, mesh)
            kept.append(np.asarray(selected(state, acts)))
            state, measured = train_step(state, acts, config=config)
            metrics.append({name: float(value) for name, value in jax.device_get(measured).items()})
            # What the step itself kept, by the latents.
            np.testing.assert_array_equal(np.asarray(state.tokens_since_fired) == 0, kept[-1].any(axis=0))
        return metrics, np.stack(kept), weights(state), to_numpy(state)


@pytest.fixture(scope="module", params=["dense", "kept"])
def way(request):
    """Gradients by the dense code, as on TPUs and GPUs, and by what is kept alone, as on CPUs."""
    if request.param == "kept" and native.missing() is not None:
        pytest.skip(f"the products of what is kept are not compiled: {native.missing()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "is_available", lambda: request.param == "kept")
        jax.clear_caches()  # which do not know of the patch
        yield request.param
    jax.clear_caches()


@pytest.fixture(scope="module")
def alone(way):
    return train(RECIPE, None)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_twenty_steps_are_those_of_one_device(alone, shape):
    metrics, kept, parameters, state = train(RECIPE, shape)
    expected_metrics, expected_kept, expected_parameters, expected_state = alone
    np.testing.assert_array_equal(kept.sum(axis=(1, 2)), BATCH)
    np.testing.assert_array_equal(kept, expected_kept)
    assert [m["l0"] for m in metrics] == [m["l0"] for m in expected_metrics]
    # Sums of partial sums are added in another order: float32 rounds each by 6e-8, and Adam hands a
    # relative error of a gradient on to an update of 1e-2, twenty times.
    for ours, theirs in zip(metrics, expected_metrics, strict=True):
        for key in ("loss", "loss/aux_k", "grad_norm", "fve", "threshold"):
            np.testing.assert_allclose(ours[key], theirs[key], rtol=2e-5, atol=1e-7, err_msg=key)
        assert ours["dead"] == theirs["dead"]
    for key, value in parameters.items():
        np.testing.assert_allclose(value, expected_parameters[key], rtol=0, atol=2e-5, err_msg=key)
    np.testing.assert_array_equal(state[".tokens_since_fired"], expected_state[".tokens_since_fired"])
    np.testing.assert_array_equal(state[".key"], expected_state[".key"])


def test_dead_latents_took_part(alone):
    """All of them where they fit into k_aux, the best of them where they do not."""
    num_dead = np.round([m["dead"] * LATENTS for m in alone[0]])
    aux = np.array([m["loss/aux_k"] for m in alone[0]])
    assert np.sum((num_dead > 0) & (num_dead <= 24)) > 3
    assert np.sum(num_dead > 24) > 3
    np.testing.assert_array_equal(aux > 0, num_dead > 0)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_the_initial_weights_are_those_of_one_device(shape):
    config = RECIPE
    with on(make_mesh(*shape)) as shardings:
        ours = weights(init_state(config, shardings=shardings))
    for key, value in weights(init_state(config)).items():
        # Norms of rows are divided out, in another fusion.
        np.testing.assert_allclose(ours[key], value, rtol=0, atol=1.2e-7, err_msg=key)


LARGE = recipe(
    widths=(40, 24),
    num_latents=512,
    sparsity=cc.BatchTopK(k=4.0),
    batch_size=64,
    aux_k=cc.AuxK(0.5, k_aux=4, dead_after_tokens=64),
)
"""Sizes that no two axes share, so that a shape in the compiled text says which axes it has."""
DATA, LATENT = 2, 4


@pytest.fixture(scope="module")
def compiled(way):
    mesh = make_mesh(DATA, LATENT)
    with on(mesh) as shardings:
        state = init_state(LARGE, shardings=shardings)
        acts = put_batch(activations(64, (40, 24)), mesh)
        step = train_step.lower(state, acts, config=LARGE).compile()
        # What is asked of the devices, and how the devices of a mesh are counted.
        per_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in _arrays(state))
    return step, per_device


def _arrays(state):
    return [
        jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in jax.tree.leaves(state)
    ]


def test_the_step_gathers_nothing(compiled):
    text = compiled[0].as_text()
    kinds = {kind for kind, _, _ in collectives(text)}
    assert kinds == {"all-reduce"}
    for word in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert f" {word}" not in text


def test_what_is_reduced_over_which_axis(compiled):
    rows, width, latents = 64 // DATA, 64, 512 // LATENT
    allowed = {
        # Reconstructions and their gradients, and one number per token.
        "latent": {(), (rows, width), (rows,), (rows, 1)},
        # Gradients of this shard's parameters, and sums over tokens.
        "data": {
            (),
            (width, latents),
            (latents, width),
            (latents,),
            (1, latents),
            (width,),
            (1, width),
            (2,),
        },
        # How many scores reach each of the six cuts of a pass, too.
        "both": {(), (width,), (2,), (6,)},
    }
    seen = set()
    for _, shapes, where in collectives(compiled[0].as_text()):
        axis = over(where, DATA, LATENT)
        assert set(shapes) <= allowed[axis], (axis, shapes)
        seen |= {(axis, shape) for shape in shapes}
    assert ("latent", (rows, width)) in seen, "the reconstruction"
    assert {("data", (width, latents)), ("data", (latents, width))} & seen, "the gradients"


@pytest.mark.parametrize("has_aux_k", [False, True])
def test_the_gradients_are_reduced_once(compiled, has_aux_k, way):
    """One collective over ``data`` has them all. In steps with dead latents AuxK, whose branch is entered
    only then, sends its part of the decoder's gradient besides; of the encoder's, too, where the other one is
    not made of a dense gradient of the pre-activations, to which it could be added."""
    if has_aux_k:
        text = compiled[0].as_text()
    else:
        config, mesh = dataclasses.replace(LARGE, aux_k=None), make_mesh(DATA, LATENT)
        with on(mesh) as shardings:
            state = init_state(config, shardings=shardings)
            acts = put_batch(activations(64, (40, 24)), mesh)
            text = train_step.lower(state, acts, config=config).compile().as_text()
    width, latents = 64, 512 // LATENT
    matrices = {(width, latents), (latents, width)}
    sent = [[shape for shape in shapes if shape in matrices] for _, shapes, _ in collectives(text)]
    carriers = sorted((shapes for shapes in sent if shapes), key=len)
    of_aux_k = {"dense": [1], "kept": [1, 1]}[way] if has_aux_k else []
    assert [len(shapes) for shapes in carriers] == [*of_aux_k, 2]
    assert set(carriers[-1]) == matrices


@pytest.fixture(scope="module")
def measured():
    """The compiled measurement of a batch, which evaluation and, for its code, calibration run."""
    mesh = make_mesh(DATA, LATENT)
    with on(mesh) as shardings:
        crosscoder = init_state(LARGE, shardings=shardings).crosscoder()
        acts = put_batch(activations(64, (40, 24)), mesh)
        is_valid = jax.device_put(np.ones(64, bool), shardings.per_batch_b)
        return eval_step.lower(crosscoder, acts, is_valid).compile().as_text()


def test_a_measurement_reduces_partial_sums_and_nothing_else(measured):
    rows, width, latents = 64 // DATA, 64, 512 // LATENT
    allowed = {
        # Reconstructions, and one number per token.
        "latent": {(), (rows, width), (rows,)},
        # Tokens on which each of this shard's latents fired, the mean, and sums per source.
        "data": {(), (latents,), (1, latents), (width,), (1, width), (2,)},
        "both": {(), (2,), (6,)},
    }
    found = collectives(measured)
    assert {kind for kind, _, _ in found} == {"all-reduce"}
    for _, shapes, where in found:
        assert set(shapes) <= allowed[over(where, DATA, LATENT)], (over(where, DATA, LATENT), shapes)
    assert ("latent", (rows, width)) in {(over(g, DATA, LATENT), s) for _, ss, g in found for s in ss}


def test_every_buffer_of_the_state_is_donated(compiled):
    step, per_device = compiled
    assert step.memory_analysis().alias_size_in_bytes == per_device


def test_a_donation_that_fails_is_heard_of():
    """``fit`` turns this warning of JAX into an error: here is the warning it waits for."""

    def keep_half(x):
        return x[:2]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.jit(keep_half, donate_argnums=0)(jnp.zeros(4))
    assert any("Some donated buffers were not usable" in str(w.message) for w in caught)


def test_the_state_is_made_where_it_lives():
    """No device holds a whole array of latents on the way."""
    from crosscoder_jax.training.state import _make_state

    large = recipe(widths=(32, 32), num_latents=8192)
    with on(make_mesh(1, 8)) as shardings:
        state = init_state(large, shardings=shardings)
        arguments = (
            jax.random.key(0),
            np.zeros(64, np.float32),
            np.ones(2, np.float32),
            np.zeros(64, np.float32),
        )
        memory = _make_state.lower(*arguments, config=large, shardings=shardings).compile().memory_analysis()
    whole = 8192 * 64 * 4
    for name in ("w_enc", "w_dec"):
        array = state.params[name][...]
        assert array.addressable_shards[0].data.nbytes == whole // 8
    # Six arrays of latents x width: two weights and two moments of each.
    assert memory.output_size_in_bytes < 6.5 * whole / 8
    # One source's rows at a time, each 1/16 of a decoder, with random bits and norms beside them.
    assert memory.temp_size_in_bytes < 4 * whole / 8 < whole


def test_sizes_that_do_not_divide_are_refused_by_name(tmp_path):
    from training_cases import write_store

    from crosscoder_jax.training.loop import fit

    store = write_store(tmp_path / "store", num_tokens=200)
    with pytest.raises(
        ValueError, match=r"batch_size=30 must be divisible by the 'data' mesh axis \(size 4\)"
    ):
        fit(recipe(batch_size=30), store, tmp_path / "run", mesh=make_mesh(4, 2))
    with pytest.raises(ValueError, match=r"num_latents=15 .*'latent' mesh axis \(size 2\): use 14 or 16"):
        fit(recipe(num_latents=15), store, tmp_path / "run", mesh=make_mesh(4, 2))
    assert not (tmp_path / "run").exists(), "nothing was begun"
