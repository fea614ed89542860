"""What latents weigh under each code norm, and codes of their own for each source."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_cases import MESHES, collectives, config, random_crosscoder, two_sources

import crosscoder_jax as cc
from crosscoder_jax.metrics import active_latents, fired_counts, named_thresholds
from crosscoder_jax.objectives import AuxK
from crosscoder_jax.sharding import Shardings, make_mesh


@pytest.mark.parametrize(
    ("code_norm", "weights"),
    [
        # Norms (3, 4) and (0, 2).
        (cc.SumOfNorms(), [7.0, 2.0]),
        (cc.NormOfConcatenation(), [5.0, 2.0]),
        (cc.MixedNorms(), [5.7, 2.2]),
        (cc.MixedNorms(concatenation=0.0, total=2.0), [14.0, 4.0]),
        (cc.Unweighted(), [1.0, 1.0]),
        (cc.Decoupled(), [[3.0, 0.0], [4.0, 2.0]]),
    ],
)
def test_weights_of_two_latents(code_norm, weights):
    np.testing.assert_allclose(code_norm(jnp.array([[3.0, 0.0], [4.0, 2.0]])), weights, rtol=1e-6)


@pytest.mark.parametrize(
    "code_norm", [cc.SumOfNorms(), cc.NormOfConcatenation(), cc.MixedNorms(), cc.Unweighted(), cc.Decoupled()]
)
def test_gradients_are_finite_where_a_latent_has_no_decoder(code_norm):
    gradient = jax.grad(lambda norms: jnp.sum(code_norm(norms)))(jnp.array([[0.0, 1.0], [0.0, 0.0]]))
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("shares", [(-1.0, 2.0), (0.0, 0.0), (math.inf, 1.0), (math.nan, 1.0)])
def test_impossible_shares_are_refused(shares):
    with pytest.raises(ValueError, match=r"concatenation=.* and total=.* must be finite"):
        cc.MixedNorms(*shares)


# Each source with its own code


def decoupled(**changes):
    return random_crosscoder(code_norm=cc.Decoupled(), sparsity=cc.BatchTopK(k=3), **changes)


def random_acts(crosscoder, batch=16):
    shape = (batch, crosscoder.config.sources.width)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape) * 2 + 1, jnp.float32)


def test_each_source_keeps_k_per_token_of_its_own():
    crosscoder = decoupled(sources=two_sources(2, 3))
    acts = random_acts(crosscoder)
    code, smallest = crosscoder.training_code(crosscoder.pre_acts(crosscoder.normalize(acts)))
    np.testing.assert_array_equal((code > 0).sum(axis=(0, 2)), [48, 48])
    assert (code[:, 0] > 0).sum() != ((code[:, 0] > 0) & (code[:, 1] > 0)).sum(), "the selections differ"
    # What is kept is one activation for both.
    both = (code[:, 0] > 0) & (code[:, 1] > 0)
    np.testing.assert_array_equal(code[:, 0][both], code[:, 1][both])
    # With the smallest kept scores as thresholds, inference drops just those.
    crosscoder.threshold[...] = smallest
    np.testing.assert_array_equal((crosscoder.encode(acts) > 0).sum(axis=(0, 2)), [47, 47])


def test_each_source_is_decoded_from_its_own_code():
    crosscoder = decoupled(sources=two_sources(2, 3))
    code = jnp.asarray(np.random.default_rng(1).uniform(size=(5, 2, 16)), jnp.float32)
    base, chat = crosscoder.config.sources.split(np.asarray(crosscoder.w_dec[...], np.float64))
    expected = np.concatenate([code[:, 0] @ base, code[:, 1] @ chat], axis=1)
    np.testing.assert_allclose(crosscoder.decode_without_bias(code), expected, rtol=1e-5, atol=1e-5)


def test_folding_keeps_codes_and_reconstructions_of_each_source():
    crosscoder = decoupled(threshold=2.0, sources=two_sources(3, 4))
    crosscoder.scale[...] = jnp.array([0.25, 16.0])
    crosscoder.threshold[...] = jnp.array([0.5, 40.0])
    folded, acts = cc.fold_normalization(crosscoder), random_acts(crosscoder)
    code = crosscoder.encode(acts)
    assert all(0 < share < 1 for share in (code > 0).mean(axis=(0, 2)))
    np.testing.assert_array_equal(folded.threshold[...], [2.0, 2.5])
    np.testing.assert_array_equal(folded.encode(acts) > 0, code > 0)
    np.testing.assert_allclose(folded.encode(acts), code, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(folded(acts), crosscoder(acts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", MESHES)
def test_codes_of_each_source_on_a_mesh(shape):
    single = decoupled(threshold=2.0)
    acts = random_acts(single)
    mesh = make_mesh(*shape)
    layout = Shardings.for_mesh(mesh)

    def codes(crosscoder, acts):
        return crosscoder.training_code(crosscoder.pre_acts(crosscoder.normalize(acts)))

    with jax.set_mesh(mesh):
        sharded = decoupled(threshold=2.0, shardings=layout)
        placed = jax.device_put(acts, layout.acts_bw)
        compiled = jax.jit(codes).lower(sharded, placed).compile()
        code = compiled(sharded, placed).code
        recon = jax.jit(lambda c, a: c(a))(sharded, placed)
    # One number per source, or as many as there are cuts.
    moved = collectives(compiled.as_text())
    assert {name for name, _ in moved} == {"all-reduce"}
    assert {shape for _, shapes in moved for shape in shapes} <= {"", "2", "6,2"}
    assert code.sharding.shard_shape(code.shape) == (16 // shape[0], 2, 16 // shape[1])
    np.testing.assert_allclose(code, codes(single, acts).code, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(recon, single(acts), rtol=1e-5, atol=1e-5)


def test_metrics_count_a_latent_once_and_mean_k_over_the_sources():
    # Latent 0 fires in both sources, latent 1 in the second only: (1 + 2) / 2 active on the token.
    code = jnp.array([[[1.0, 0.0, 0.0], [1.0, 2.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 3.0]]])
    assert active_latents(code) == 2.0
    assert cc.l0(code) == 1.0
    assert cc.l0(code, jnp.array([True, False])) == 1.5
    np.testing.assert_array_equal(fired_counts(code), [1, 1, 1])
    np.testing.assert_array_equal(fired_counts(code, jnp.array([False, True])), [0, 0, 1])
    names = named_thresholds(jnp.array([1.0, 2.0]), two_sources().names)
    assert names == {"threshold/base": 1.0, "threshold/chat": 2.0}


def test_dead_latents_are_revived_for_all_sources_at_once():
    # One of two dead latents may help: weights (1, 4) and (3, 1) add up to 4 and 5, so of equal
    # activations the second is taken, and it writes to both sources.
    crosscoder = random_crosscoder(sources=two_sources(1, 1), num_latents=2, code_norm=cc.Decoupled())
    crosscoder.w_dec[...] = jnp.array([[1.0, 3.0], [4.0, 1.0]])
    pre_acts, residual = jnp.ones((2, 2)), jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    loss = AuxK(weight=1.0, k_aux=1)(crosscoder, pre_acts, residual, jnp.array([True, True]))
    # ||(1, 0) - (4, 1)||^2 = 10 and ||(-1, 0) - (4, 1)||^2 = 26, over a variance of 1.
    assert loss == 18.0


def test_what_needs_one_code_says_so():
    crosscoder, acts = decoupled(), np.ones((4, 6), np.float32)
    for what, call in (("latent_scaling", lambda: cc.latent_scaling(crosscoder, [acts])),):
        with pytest.raises(ValueError, match=f"{what} needs one code for all sources"):
            call()
    with pytest.raises(ValueError, match="would give every source the same code: use SumOfNorms"):
        config(code_norm=cc.Decoupled(), sparsity=cc.ReLU())
