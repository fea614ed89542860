"""Gated latents: gates, magnitudes and what each of them learns from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_cases import arrays, random_crosscoder, two_sources
from flax import nnx

import crosscoder_jax as cc
from crosscoder_jax.objectives import gate_loss
from crosscoder_jax.sparsity import Gate

GATED = cc.Gated()


def random_gated(**changes):
    """Gains above one and shifts, half of which are negative, so that some open gates say nothing."""
    crosscoder = random_crosscoder(sparsity=GATED, **changes)
    assert crosscoder.shift is not None
    crosscoder.shift[...] = crosscoder.shift[...] * (-1) ** jnp.arange(crosscoder.config.num_latents)
    return crosscoder


def test_the_code_is_the_papers():
    crosscoder = random_gated()
    acts = jnp.asarray(np.random.default_rng(0).normal(size=(50, 6)), jnp.float32)
    known = arrays(crosscoder)
    gain, shift = (np.asarray(getattr(crosscoder, name)[...], np.float64) for name in Gate._fields)
    normalized = (np.asarray(acts, np.float64) - known["mean"]) * np.repeat(known["scale"], 3)
    gate = normalized @ known["w_enc"] + known["b_enc"]
    magnitude = np.maximum(np.exp(gain) * gate + shift, 0)
    expected = np.where(gate > 0, magnitude, 0)
    assert ((gate > 0) & (magnitude == 0)).any(), "some gates open for nothing"
    np.testing.assert_allclose(crosscoder.encode(acts), expected, atol=1e-4)
    np.testing.assert_array_equal(
        crosscoder.training_code(crosscoder.pre_acts(crosscoder.normalize(acts))).code,
        crosscoder.encode(acts),
    )


def test_folded_it_is_the_same_function():
    crosscoder = random_gated()
    acts = jnp.asarray(np.random.default_rng(0).normal(size=(50, 6)), jnp.float32)
    folded = cc.fold_normalization(crosscoder)
    np.testing.assert_allclose(folded(acts), crosscoder(acts), atol=1e-4)
    weights = np.asarray(crosscoder.score_weights())
    np.testing.assert_allclose(folded.encode(acts), crosscoder.encode(acts) * weights, rtol=1e-4, atol=1e-4)


def test_the_loss_of_the_gates_moves_what_opens_them_and_not_the_decoder():
    crosscoder = random_gated()
    tokens = np.random.default_rng(1).normal(size=(20, 6)).astype(np.float32)
    normalized = jnp.asarray(tokens)

    def loss(crosscoder):
        return gate_loss(crosscoder, crosscoder.pre_acts(normalized), normalized, cc.SquaredError())

    value, grads = nnx.value_and_grad(loss)(crosscoder)
    known = arrays(crosscoder)
    opened = np.maximum(tokens @ known["w_enc"] + known["b_enc"], 0)
    residual = tokens - opened @ known["w_dec"] - known["b_dec"]
    assert float(value) == pytest.approx(np.mean(np.sum(residual**2, axis=1)), rel=1e-4)
    # By hand: the gradient of an open gate is -2 / batch * residual . decoder.
    by_gate = -2 / 20 * (residual @ known["w_dec"].T) * (opened > 0)
    np.testing.assert_allclose(np.asarray(grads["b_enc"][...]), by_gate.sum(axis=0), rtol=1e-3, atol=1e-3)
    for name in ("w_dec", "b_dec", *Gate._fields):
        np.testing.assert_array_equal(np.asarray(grads[name][...]), 0.0)


@pytest.fixture(scope="module")
def trained():
    """Sixteen directions, two active a token, in both models: enough for gates to learn which."""
    config = cc.TrainConfig(
        cc.CrosscoderConfig(two_sources(8, 8), num_latents=32, sparsity=GATED),
        num_steps=600,
        batch_size=256,
        learning_rate=1e-2,
        warmup_steps=20,
        loss=cc.SquaredError(),
        l1=cc.L1OfNorms(1.0),
        aux_k=None,
    )
    directions = jax.random.normal(jax.random.key(1), (16, 16)) / 4
    state = cc.init_state(config)
    for step in range(config.num_steps):
        keys = jax.random.split(jax.random.key(100 + step))
        strengths = jax.random.bernoulli(keys[0], 1 / 8, (256, 16)) * (
            1 + jax.random.uniform(keys[1], (256, 16))
        )
        state, metrics = cc.train_step(state, strengths @ directions, config=config)
    return state.crosscoder(), metrics


def test_trained_it_is_sparse_and_its_magnitudes_are_not_shrunk(trained):
    crosscoder, metrics = trained
    assert 1.5 < float(metrics["l0"]) < 4  # two are active, and 32 could be
    assert float(metrics["fve"]) > 0.9
    # The penalty shrinks what the gates see, and the gains make up for it: that is what they are for.
    directions = jax.random.normal(jax.random.key(1), (16, 16)) / 4
    acts = 1.5 * directions
    recon = crosscoder(acts)
    with_gates = crosscoder.denormalize(
        crosscoder.decode_normalized(jax.nn.relu(crosscoder.pre_acts(crosscoder.normalize(acts))))
    )
    along = jnp.sum(recon * acts) / jnp.sum(acts * acts)
    shrunk = jnp.sum(with_gates * acts) / jnp.sum(acts * acts)
    assert float(along) > 0.9
    assert float(shrunk) < 0.7


def test_other_formats_and_codes_of_each_source_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has gates and magnitudes, which this format does not keep"):
        cc.save(random_gated(), tmp_path / "file", format="dictionary_learning")
    with pytest.raises(ValueError, match=r"sparsity=Gated\(\) would give every source the same code"):
        random_gated(code_norm=cc.Decoupled())
