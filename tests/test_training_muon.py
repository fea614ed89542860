"""Muon: the updates of optax's on one device, the same over a mesh, and no weight moved that must stay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_training_levers import in_float64, run
from test_training_meshes import ACTS, RECIPE
from training_cases import recipe, to_numpy, weights

import crosscoder_jax as cc
from crosscoder_jax.sharding import Shardings, make_mesh
from crosscoder_jax.training.checkpoint import Checkpoints
from crosscoder_jax.training.loop import put_batch
from crosscoder_jax.training.muon import orthogonalized
from crosscoder_jax.training.state import init_state
from crosscoder_jax.training.step import train_step

SPREADABLE = dataclasses.replace(
    RECIPE,
    optimizer=cc.Muon(),
    crosscoder=recipe(widths=(4, 4), num_latents=48, sparsity=cc.BatchTopK(k=1.0)).crosscoder,
)
"""Widths that spread over any mesh of 8."""


def test_singular_values_are_made_equal_and_singular_vectors_kept():
    matrix = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    for wide in (matrix, matrix.T):
        u, _, vt = np.linalg.svd(wide, full_matrices=False)
        found = np.asarray(orthogonalized(jnp.asarray(wide)))
        inside = u.T @ found @ vt.T
        # The published polynomial takes values within 0.68 to 1.13; what it leaves beside them is rounding.
        assert 0.65 < np.diag(inside).min() <= np.diag(inside).max() < 1.2
        np.testing.assert_allclose(inside - np.diag(np.diag(inside)), 0, atol=1e-5)
    assert not np.asarray(orthogonalized(jnp.zeros((3, 5)))).any()


def test_updates_are_those_of_optax():
    rng = np.random.default_rng(0)
    params = {"w_enc": jnp.zeros((5, 30)), "w_dec": jnp.zeros((30, 5))}
    muon = cc.Muon(decay=0.9, update_rms=0.3)
    ours, theirs = muon.transformation(), optax.contrib.muon(1.0, beta=0.9, consistent_rms=0.3)
    states = ours.init(params), theirs.init(params)
    for _ in range(4):
        grads = {name: jnp.asarray(rng.normal(size=w.shape), jnp.float32) for name, w in params.items()}
        found, one = ours.update(grads, states[0])
        expected, other = theirs.update(grads, states[1], params)
        states = one, other
        for name in params:
            # Theirs have the sign of the rate. Five iterations hand on roundings of 6e-8.
            np.testing.assert_allclose(-found[name], expected[name], rtol=0, atol=2e-5, err_msg=name)
            size = np.sqrt(np.mean(np.square(found[name])))
            assert 0.7 * 0.3 < size < 1.2 * 0.3


def test_biases_are_moved_by_adam_and_matrices_keep_one_moment():
    adam = cc.Adam(b1=0.5)
    muon = cc.Muon(others=adam)
    params = {"w": jnp.zeros((3, 4)), "b": jnp.zeros(4)}
    grads = {"w": jnp.ones((3, 4)), "b": jnp.arange(4.0)}
    state, alone = muon.transformation().init(params), adam.transformation().init({"b": params["b"]})
    for _ in range(3):
        found, state = muon.transformation().update(grads, state)
        expected, alone = adam.transformation().update({"b": grads["b"]}, alone)
        np.testing.assert_array_equal(found["b"], expected["b"])
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [(), (4,), (3, 4), (4,)]
    half = dataclasses.replace(muon, first_moment="bfloat16").transformation().init(params)
    assert half.mu["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize("is_spread", [False, True])
@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (2, 4)], ids=str)
def test_a_mesh_takes_the_same_steps(shape, is_spread):
    """In float64, where only the order of sums differs."""
    with jax.enable_x64(True):
        config = in_float64(SPREADABLE)
        acts = [batch[:, :8].astype(np.float64) for batch in ACTS[:6]]
        alone, mesh = init_state(config), make_mesh(*shape)
        for batch in acts:
            alone, _ = train_step(alone, jnp.asarray(batch), config=config)
        with jax.set_mesh(mesh):
            state = init_state(config, shardings=Shardings.for_mesh(mesh, is_optimizer_spread=is_spread))
            layout = jax.tree.map(lambda leaf: leaf.sharding, state.opt_state)
            for batch in acts:
                state, _ = train_step(state, put_batch(batch, mesh), config=config)
        assert jax.tree.map(lambda leaf: leaf.sharding, state.opt_state) == layout
    expected = weights(alone)
    for name, value in weights(state).items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-8, err_msg=name)


def test_it_learns_about_as_much_as_adam_at_the_same_rate():
    _, metrics = run(dataclasses.replace(RECIPE, optimizer=cc.Muon()), steps=20)
    _, expected = run(RECIPE, steps=20)
    first, last = expected[0]["loss/reconstruction"], expected[-1]["loss/reconstruction"]
    assert metrics[-1]["loss/reconstruction"] < last + (first - last) / 10


def test_what_a_group_or_the_recipe_keeps_in_place_stays():
    """Orthogonalised updates move weights whose gradient is zero, as Adam's do not."""
    groups = (
        cc.LatentGroup("own", 0.25, reads=("chat",), writes=("chat",)),
        cc.LatentGroup("tied", 0.25, is_tied=True),
    )
    config = recipe(
        widths=(4, 4),
        num_latents=48,
        sparsity=cc.BatchTopK(k=1.0),
        groups=groups,
        optimizer=cc.Muon(),
        frozen=("b_dec",),
    )
    state = init_state(config)
    for batch in ACTS[:10]:
        state, _ = train_step(state, jnp.asarray(batch[:, :8]), config=config)
    crosscoder = state.crosscoder()
    names = np.array(crosscoder.config.layout.names())
    w_enc, w_dec = np.asarray(crosscoder.w_enc[...]), np.asarray(crosscoder.w_dec[...])
    assert not w_enc[:4, names == "own"].any()
    assert not w_dec[names == "own", :4].any()
    assert w_dec[names == "own", 4:].all()
    np.testing.assert_allclose(
        *(np.linalg.norm(part[names == "tied"], axis=1) for part in np.split(w_dec, 2, axis=1)), rtol=1e-5
    )
    np.testing.assert_array_equal(crosscoder.b_dec[...], init_state(config).crosscoder().b_dec[...])


def test_a_state_is_saved_and_restored(tmp_path):
    config = dataclasses.replace(RECIPE, optimizer=cc.Muon(first_moment="bfloat16"))
    state, _ = run(config, steps=3)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state)
    restored = checkpoints.restore(jax.eval_shape(lambda: init_state(config)))
    checkpoints.close()
    for name, value in to_numpy(state).items():
        np.testing.assert_array_equal(to_numpy(restored)[name], value, err_msg=name)


def test_dead_latents_begin_again_with_it():
    config = recipe(
        sparsity=cc.ReLU(), l1=cc.L1OfNorms(5.0), aux_k=None, resampling=cc.Resampling(5), optimizer=cc.Muon()
    )
    state, _ = run(config, steps=12)
    assert all(np.isfinite(value).all() for value in to_numpy(state).values() if value.dtype.kind == "f")


@pytest.mark.parametrize(("field", "value"), [("decay", 1.0), ("update_rms", 0.0)])
def test_settings_that_make_no_muon_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r} of Muon must"):
        cc.Muon(**{field: value})
