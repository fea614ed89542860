"""Losses against formulas worked out by hand and in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from core_cases import MESHES, PARAMETERS, arrays, config, golden, random_crosscoder, two_sources
from flax import nnx

import crosscoder_jax as cc
from crosscoder_jax.objectives import AuxK, ErrorNorm, L1OfNorms, MeanSquaredError, SquaredError
from crosscoder_jax.sharding import Shardings, make_mesh

BATCH = 16


def random_acts(crosscoder, seed=0):
    shape = (BATCH, crosscoder.config.sources.width)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Reconstruction


def test_squared_error_sums_over_sources_and_averages_over_tokens():
    residual = jnp.array([[1.0, 2.0, 2.0], [0.0, 3.0, 4.0]])
    # (1 + 4 + 4 + 9 + 16) / 2 tokens
    assert SquaredError()(residual, two_sources(1, 2)) == 17.0


def test_mean_squared_error_averages_over_tokens_and_coordinates():
    # (1 + 4 + 9 + 16 + 25 + 36) / 6 coordinates of two tokens
    residual = jnp.array([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]])
    assert np.isclose(MeanSquaredError()(residual, two_sources(1, 2)), 91 / 6)


def test_error_norm_averages_the_norms_of_sources_and_tokens():
    residual = jnp.array([[1.0, 3.0, 4.0], [0.0, 0.0, 2.0]])
    # base: 1 and 0; chat: 5 and 2; four norms in all
    assert ErrorNorm()(residual, two_sources(1, 2)) == 2.0


def test_error_norm_has_a_finite_gradient_at_a_perfect_reconstruction():
    gradient = jax.grad(ErrorNorm())(jnp.zeros((2, 3)), two_sources(1, 2))
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


@pytest.mark.parametrize("loss", [SquaredError(), ErrorNorm()])
@pytest.mark.parametrize("sparsity", [cc.ReLU(), cc.BatchTopK(k=2)])
def test_with_one_source_the_loss_is_that_of_an_autoencoder(loss, sparsity):
    crosscoder = random_crosscoder(
        sources=cc.Sources((cc.Source("only", 5),)), num_latents=8, sparsity=sparsity
    )
    x = random_acts(crosscoder)
    w = arrays(crosscoder)
    pre = np.asarray(x, np.float64) @ w["w_enc"] + w["b_enc"]
    code = np.maximum(pre, 0)
    if isinstance(sparsity, cc.BatchTopK):
        scores = code * np.linalg.norm(w["w_dec"], axis=1)
        code = np.where(scores >= np.sort(scores.ravel())[-2 * BATCH], code, 0)
    error = np.linalg.norm(np.asarray(x) - (code @ w["w_dec"] + w["b_dec"]), axis=1)
    expected = np.mean(error**2 if isinstance(loss, SquaredError) else error)
    ours = sparsity(crosscoder.pre_acts(x), crosscoder.score_weights()).code
    found = loss(x - crosscoder.decode_normalized(ours), crosscoder.config.sources)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_with_block_diagonal_weights_the_loss_is_the_sum_of_the_autoencoders():
    # Latents 0-3 read and write the base alone, 4-7 the chat alone.
    crosscoder = random_crosscoder(sources=two_sources(3, 5), num_latents=8, sparsity=cc.ReLU())
    block = np.zeros((8, 8), np.float32)
    block[:4, :3] = block[4:, 3:] = 1
    crosscoder.w_dec[...] = crosscoder.w_dec[...] * block
    crosscoder.w_enc[...] = crosscoder.w_enc[...] * block.T
    x = random_acts(crosscoder)
    code = jax.nn.relu(crosscoder.pre_acts(x))
    whole = SquaredError()(x - crosscoder.decode_normalized(code), crosscoder.config.sources)
    whole += L1OfNorms(0.3)(code, crosscoder.score_weights(), 0)

    def autoencoder(part, latents):
        w = arrays(crosscoder)
        acts = np.asarray(x, np.float64)[:, part]
        code = np.maximum(acts @ w["w_enc"][part, latents] + w["b_enc"][latents], 0)
        error = acts - code @ w["w_dec"][latents, part] - w["b_dec"][part]
        penalty = code @ np.linalg.norm(w["w_dec"][latents, part], axis=1)
        return np.mean(np.sum(error**2, axis=1)) + 0.3 * np.mean(penalty)

    parts = autoencoder(slice(0, 3), slice(0, 4)) + autoencoder(slice(3, 8), slice(4, 8))
    np.testing.assert_allclose(whole, parts, rtol=1e-5)


@pytest.mark.parametrize("kind", ["batchtopk/topk", "batchtopk/threshold", "l1"])
def test_losses_are_those_of_the_reference_library(kind):
    crosscoder, data, x = golden(kind.split("/")[0])
    residual = x - data[f"{kind}/x_hat"].reshape(-1, 64)
    sources = crosscoder.config.sources
    np.testing.assert_allclose(ErrorNorm()(residual, sources), data[f"{kind}/l2_loss"], rtol=1e-5)
    # The reference averages over the two models, the paper sums over them.
    np.testing.assert_allclose(SquaredError()(residual, sources) / 2, data[f"{kind}/mse_loss"], rtol=1e-5)


# L1 of norms


def test_l1_is_the_mean_over_tokens_of_codes_times_summed_norms():
    code = jnp.array([[1.0, 2.0], [0.0, 4.0]])
    weights = cc.SumOfNorms()(jnp.array([[1.0, 0.5], [2.0, 0.0]]))
    # sums of norms 3 and 0.5: (1 * 3 + 2 * 0.5 + 4 * 0.5) / 2 = 3
    assert L1OfNorms(0.1)(code, weights, 0) == pytest.approx(0.3)


def test_l1_weighs_codes_as_the_code_norm_does():
    crosscoder = random_crosscoder(sparsity=cc.ReLU(), code_norm=cc.NormOfConcatenation())
    code = jax.nn.relu(crosscoder.pre_acts(random_acts(crosscoder)))
    whole_norms = np.linalg.norm(crosscoder.w_dec[...], axis=1)
    expected = 0.5 * np.mean(np.asarray(code) @ whole_norms)
    np.testing.assert_allclose(L1OfNorms(0.5)(code, crosscoder.score_weights(), 0), expected, rtol=1e-6)


def test_l1_is_that_of_the_reference_library():
    crosscoder, data, _ = golden("l1")
    found = L1OfNorms(1.0)(jnp.asarray(data["l1/f"]), crosscoder.score_weights(), 0)
    np.testing.assert_allclose(found, data["l1/sparsity_loss"], rtol=1e-5)


def test_l1_rises_linearly_over_the_warm_up():
    penalty = L1OfNorms(2.0, warmup_steps=4)
    found = [float(penalty(jnp.ones((1, 1)), jnp.ones(1), step)) for step in (0, 1, 3, 4, 50)]
    assert found == [0.0, 0.5, 1.5, 2.0, 2.0]


def test_scaling_codes_up_and_decoders_down_leaves_reconstruction_and_penalty_unchanged():
    crosscoder = random_crosscoder(sparsity=cc.ReLU())
    code = jax.nn.relu(crosscoder.pre_acts(random_acts(crosscoder)))
    recon = crosscoder.decode_normalized(code)
    penalty = L1OfNorms(0.5)(code, crosscoder.score_weights(), 0)
    factors = 2.0 ** np.arange(-8, 8, dtype=np.float32)  # exact in float32
    crosscoder.w_dec[...] = crosscoder.w_dec[...] / factors[:, None]
    np.testing.assert_array_equal(crosscoder.decode_normalized(code * factors), recon)
    np.testing.assert_array_equal(L1OfNorms(0.5)(code * factors, crosscoder.score_weights(), 0), penalty)


def test_l1_costs_one_shared_latent_as_much_as_two_exclusive_ones():
    # The indifference behind Latent Decoupling: {(d_base, d_chat)} against {(d_base, 0), (0, d_chat)}.
    strength = jnp.array([[0.5], [3.0], [0.0]])
    penalty, weights = L1OfNorms(0.7), cc.SumOfNorms()
    shared = penalty(strength, weights(jnp.array([[1.5], [2.0]])), 0)
    twice = jnp.concatenate([strength, strength], axis=1)
    exclusive = penalty(twice, weights(jnp.array([[1.5, 0.0], [0.0, 2.0]])), 0)
    assert shared == exclusive


def trained_strengths(strengths, weight, g):
    """Train one latent on x_s * g in sources of width 1; return decoder times code per unit of g."""
    entries = tuple(cc.Source(f"s{i}", 1) for i in range(len(strengths)))
    the_config = config(cc.Sources(entries), 1, sparsity=cc.ReLU())
    crosscoder = cc.Crosscoder(the_config, key=jax.random.key(0))
    crosscoder.w_dec[...] = jnp.asarray(strengths, jnp.float32)[None]
    crosscoder.w_enc[...] = jnp.asarray(strengths, jnp.float32)[:, None]
    graphdef, params, rest = nnx.split(crosscoder, nnx.Param, ...)
    x = jnp.asarray(np.outer(g, strengths), jnp.float32)
    optimizer = optax.adam(optax.linear_schedule(3e-3, 0.0, 3000))

    def loss(params):
        model = nnx.merge(graphdef, params, rest)
        code = jax.nn.relu(model.pre_acts(x))
        penalty = L1OfNorms(weight)(code, model.score_weights(), 0)
        return SquaredError()(x - model.decode_normalized(code), the_config.sources) + penalty

    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss)(params)
        # The closed form is for a code proportional to g: biases stay at zero.
        grads["b_enc"][...] = jnp.zeros_like(grads["b_enc"][...])
        grads["b_dec"][...] = jnp.zeros_like(grads["b_dec"][...])
        updates, state = optimizer.update(grads, state, params)
        return (jax.tree.map(jnp.add, params, updates), state), None

    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=3000))((params, optimizer.init(params)))
    model = nnx.merge(graphdef, params, rest)
    return np.asarray(model.decode_without_bias(jax.nn.relu(model.pre_acts(x))))[0] / g[0]


def test_l1_shrinks_weak_sources_completely_and_strong_ones_by_the_closed_form():
    # E||(x_s - a_s) g||^2 + weight * E[g] * sum_s a_s is least at
    # a_s = max(0, x_s - weight * E[g] / (2 E[g^2])): a source below the threshold disappears.
    g = np.abs(np.random.default_rng(0).normal(size=256))
    strengths = np.array([0.1, 0.2, 0.3, 0.6])
    threshold = 0.55 * np.mean(g) / (2 * np.mean(g**2))
    assert 0.2 < threshold < 0.25
    expected = np.maximum(0, strengths - threshold)
    np.testing.assert_allclose(trained_strengths(strengths, 0.55, g), expected, atol=2e-3)


def test_without_l1_every_source_keeps_its_strength():
    g = np.abs(np.random.default_rng(0).normal(size=256))
    strengths = np.array([0.1, 0.2, 0.3, 0.6])
    np.testing.assert_allclose(trained_strengths(strengths, 0.0, g), strengths, atol=2e-3)


# AuxK


def aux_k_oracle(crosscoder, x, residual, is_dead, k_aux):
    """The loss before its weight in float64, with a sort per token."""
    w = arrays(crosscoder)
    norms = sum(np.linalg.norm(part, axis=1) for part in crosscoder.config.sources.split(w["w_dec"]))
    acts = np.where(is_dead, np.maximum(np.asarray(x, np.float64) @ w["w_enc"] + w["b_enc"], 0), 0)
    code = np.zeros_like(acts)
    for token, scores in enumerate(acts * norms):
        chosen = np.argsort(-scores)[:k_aux]
        code[token, chosen] = acts[token, chosen]
    e = np.asarray(residual, np.float64)
    missed = np.mean(np.sum((e - code @ w["w_dec"]) ** 2, axis=1))
    return missed / np.mean(np.sum((e - e.mean(axis=0)) ** 2, axis=1))


def aux_inputs(crosscoder, num_dead, seed=0):
    """Normalised activations, and a mask of dead latents spread over the dictionary."""
    dead = np.random.default_rng(seed).permutation(crosscoder.config.num_latents)[:num_dead]
    is_dead = np.zeros(crosscoder.config.num_latents, bool)
    is_dead[dead] = True
    return random_acts(crosscoder, seed), jnp.asarray(is_dead)


@functools.partial(jax.jit, static_argnums=3)
def aux_loss(crosscoder, x, is_dead, aux_k):
    """AuxK as a training step calls it: live latents reconstruct, dead ones what is left."""
    pre = crosscoder.pre_acts(x)
    residual = x - crosscoder.decode_normalized(jnp.where(is_dead, 0.0, jax.nn.relu(pre)))
    return aux_k(crosscoder, pre, residual, is_dead), residual


@pytest.mark.parametrize("num_dead", [1, 4, 5, 12, 16])
def test_aux_k_is_the_formula_whether_or_not_the_dead_need_ranking(num_dead):
    # k_aux is 4: up to four dead latents all take part, more are ranked per token.
    crosscoder = random_crosscoder()
    x, is_dead = aux_inputs(crosscoder, num_dead)
    found, residual = aux_loss(crosscoder, x, is_dead, AuxK(weight=0.5, k_aux=4))
    expected = 0.5 * aux_k_oracle(crosscoder, x, residual, np.asarray(is_dead), 4)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_aux_k_uses_half_the_width_of_the_widest_source_by_default():
    crosscoder = random_crosscoder(sources=two_sources(3, 6))
    x, is_dead = aux_inputs(crosscoder, 12)
    found, residual = aux_loss(crosscoder, x, is_dead, AuxK(weight=1.0))
    np.testing.assert_allclose(found, aux_k_oracle(crosscoder, x, residual, is_dead, 3), rtol=1e-5)


def test_a_cheap_group_does_not_keep_other_dead_latents_from_being_revived():
    cheap = cc.LatentGroup("cheap", 0.5, cost=0.2)
    crosscoder = random_crosscoder(sources=two_sources(1, 1), num_latents=2, groups=(cheap,))
    crosscoder.w_dec[...] = jnp.array([[1.0, 1.0], [2.0, 0.0]])
    # The cheap latent's activation of 2 times its norms of 1 + 1 is 4, its score 4 / 0.2 = 20; the free one's
    # are both 3 * 2 = 6, and it writes all that is left: (6, 0). The cheap one would write (2, 2).
    pre, residual = jnp.array([[2.0, 3.0], [0.0, 0.0]]), jnp.array([[6.0, 0.0], [0.0, 0.0]])
    assert AuxK(k_aux=1)(crosscoder, pre, residual, jnp.array([True, True])) == 0.0


def test_aux_k_never_uses_less_than_one_latent():
    crosscoder = random_crosscoder(sources=two_sources(1, 1))
    x, is_dead = aux_inputs(crosscoder, 12)
    found, residual = aux_loss(crosscoder, x, is_dead, AuxK(weight=1.0))
    np.testing.assert_allclose(found, aux_k_oracle(crosscoder, x, residual, is_dead, 1), rtol=1e-5)


@pytest.mark.parametrize("rule", ["topk", "threshold"])
def test_aux_k_is_that_of_the_reference_library(rule):
    # 46 and 223 latents did not fire in this batch; 16 of them take part per token.
    crosscoder, data, x = golden("aux", sparsity=cc.BatchTopK(k=8))
    is_dead = data[f"aux/{rule}/deads"]
    assert is_dead.sum() == {"topk": 46, "threshold": 223}[rule]
    if rule == "topk":
        code = crosscoder.config.sparsity(crosscoder.pre_acts(x), crosscoder.score_weights()).code
    else:
        code = crosscoder.encode(x)
    residual = x - crosscoder.decode_normalized(code)
    found = AuxK(weight=1.0)(crosscoder, crosscoder.pre_acts(x), residual, jnp.asarray(is_dead))
    np.testing.assert_allclose(found, data[f"aux/{rule}/auxk_loss"], rtol=1e-5)


@pytest.mark.parametrize("num_dead", [3, 10])
def test_aux_k_reaches_only_the_encoders_and_decoders_of_dead_latents(num_dead):
    crosscoder = random_crosscoder()
    x, is_dead = aux_inputs(crosscoder, num_dead)
    graphdef, params, rest = nnx.split(crosscoder, nnx.Param, ...)
    aux_k = AuxK(weight=1.0, k_aux=4)
    grads = jax.jit(jax.grad(lambda p: aux_loss(nnx.merge(graphdef, p, rest), x, is_dead, aux_k)[0]))(params)
    dead = np.asarray(is_dead)
    for per_latent in (grads["w_enc"][...].T, grads["b_enc"][...][:, None], grads["w_dec"][...]):
        touched = np.abs(np.asarray(per_latent)).sum(axis=1) > 0
        np.testing.assert_array_equal(touched, dead)
    # Neither decoded here nor reached through the residual, which is detached.
    np.testing.assert_array_equal(grads["b_dec"][...], np.zeros(6))


def test_gradient_of_aux_k_is_that_of_the_oracle():
    # Central differences in float64 along a random direction; the ranking does not change within it.
    crosscoder = random_crosscoder()
    x, is_dead = aux_inputs(crosscoder, 10)
    _, residual = aux_loss(crosscoder, x, is_dead, AuxK(k_aux=4))
    graphdef, params, rest = nnx.split(crosscoder, nnx.Param, ...)

    def loss(params):
        model = nnx.merge(graphdef, params, rest)
        return AuxK(weight=1.0, k_aux=4)(model, model.pre_acts(x), residual, is_dead)

    grads = jax.jit(jax.grad(loss))(params)
    rng = np.random.default_rng(0)
    direction = {name: rng.normal(size=params[name].shape) for name in PARAMETERS}

    def moved(amount):
        class Moved:
            config = crosscoder.config

        values = arrays(crosscoder)
        for name in PARAMETERS:
            values[name] = values[name] + amount * direction[name]
        for name, value in values.items():
            setattr(Moved, name, {...: value})
        return aux_k_oracle(Moved, x, residual, is_dead, 4)

    along = sum(np.sum(np.asarray(grads[name][...]) * direction[name]) for name in PARAMETERS)
    np.testing.assert_allclose(along, (moved(1e-5) - moved(-1e-5)) / 2e-5, rtol=1e-3)


def test_aux_k_is_zero_with_zero_gradient_while_no_latent_is_dead():
    crosscoder = random_crosscoder()
    x, is_dead = aux_inputs(crosscoder, 0)
    loss, grads = jax.jit(nnx.value_and_grad(lambda c: aux_loss(c, x, is_dead, AuxK())[0]))(crosscoder)
    assert loss == 0
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads))


def test_aux_k_is_zero_and_finite_for_a_residual_without_variance():
    crosscoder = random_crosscoder()
    x, is_dead = aux_inputs(crosscoder, 5)
    residual = jnp.ones_like(x)  # the same for every token: 0 / 0 in the formula

    def loss(crosscoder):
        return AuxK()(crosscoder, crosscoder.pre_acts(x), residual, is_dead)

    value, grads = jax.jit(nnx.value_and_grad(loss))(crosscoder)
    assert value == 0
    assert all(bool(jnp.all(leaf == 0)) for leaf in jax.tree.leaves(grads))


@jax.jit
def aux_value_and_grads(crosscoder, x, is_dead):
    aux_k = AuxK(weight=1.0, k_aux=4)
    return nnx.value_and_grad(lambda c: aux_loss(c, x, is_dead, aux_k)[0])(crosscoder)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # base: norms 1 and 0; chat: 5 and 2. Weighed 2 and 3 by source.
        (SquaredError((2.0, 3.0)), (2 * 1 + 3 * 25 + 3 * 4) / 2),
        (MeanSquaredError((2.0, 3.0)), (2 * 1 + 3 * 25 + 3 * 4) / 6),
        (ErrorNorm((2.0, 3.0)), (2 * (1 + 0) / 2 + 3 * (5 + 2) / 2) / 2),
    ],
)
def test_sources_can_be_weighed(loss, expected):
    residual = jnp.array([[1.0, 3.0, 4.0], [0.0, 0.0, 2.0]])
    np.testing.assert_allclose(loss(residual, two_sources(1, 2)), expected, rtol=1e-6)


@pytest.mark.parametrize("loss", [SquaredError(), MeanSquaredError(), ErrorNorm((1.0, 7.0))])
def test_the_delta_loss_is_that_of_the_difference_of_raw_residuals(loss):
    crosscoder = random_crosscoder()
    residual = np.asarray(random_acts(crosscoder), np.float64)
    scale = np.asarray(crosscoder.scale[...], np.float64)
    raw = residual[:, 3:] / scale[1] - residual[:, :3] / scale[0]
    norms = np.linalg.norm(raw * np.sqrt(scale[0] * scale[1]), axis=1)
    expected = {
        SquaredError: (norms**2).mean(),
        MeanSquaredError: (norms**2).mean() / 3,
        ErrorNorm: norms.mean(),
    }[type(loss)]
    found = cc.DeltaLoss(0.5, "base", "chat")(crosscoder, jnp.asarray(residual, jnp.float32), loss)
    np.testing.assert_allclose(found, 0.5 * expected, rtol=1e-5)


def test_the_delta_loss_is_of_the_sources_it_names_wherever_they_stand():
    sources = cc.Sources(tuple(cc.Source(name, 2) for name in ("chat", "other", "base")))
    crosscoder = random_crosscoder(sources=sources)
    crosscoder.scale[...] = jnp.array([1.0, 7.0, 4.0])
    # chat (1, 0) and base (0, 4): with sqrt(4 / 1) = 2 their difference is (1, 0) * 2 - (0, 4) / 2 = (2, -2).
    residual = jnp.array([[1.0, 0.0, 50.0, 60.0, 0.0, 4.0]])
    assert cc.DeltaLoss(0.5, "base", "chat")(crosscoder, residual, SquaredError()) == 0.5 * 8


def test_errors_that_both_models_share_cost_no_delta_loss():
    crosscoder = random_crosscoder()
    crosscoder.scale[...] = jnp.ones(2)
    shared = random_acts(crosscoder)[:, :3]
    delta = cc.DeltaLoss(1.0, "base", "chat")
    assert delta(crosscoder, jnp.concatenate([shared, shared], axis=1), SquaredError()) == 0


def prefix_loss(crosscoder, x, matryoshka):
    code = crosscoder.training_code(crosscoder.pre_acts(x)).code
    return matryoshka(crosscoder, x, code, crosscoder.decode_normalized(code), cc.SquaredError())


def test_the_prefixes_of_a_matryoshka_are_reconstructions_of_the_first_latents():
    crosscoder = random_crosscoder()
    x = random_acts(crosscoder)
    code = np.asarray(crosscoder.training_code(crosscoder.pre_acts(x)).code, np.float64)
    w_dec, b_dec = (np.asarray(getattr(crosscoder, name)[...], np.float64) for name in ("w_dec", "b_dec"))
    losses = []
    for size in (2, 8, 16):  # of 16 latents
        residual = np.asarray(x) - (code[:, :size] @ w_dec[:size] + b_dec)
        losses.append((residual**2).sum(axis=1).mean())
    found = prefix_loss(crosscoder, x, cc.Matryoshka((1 / 8, 1 / 2, 1.0)))
    np.testing.assert_allclose(found, np.mean(losses), rtol=1e-6)


def test_one_prefix_that_is_the_whole_dictionary_is_no_matryoshka():
    crosscoder = random_crosscoder()
    x = random_acts(crosscoder)
    code = crosscoder.training_code(crosscoder.pre_acts(x)).code
    expected = cc.SquaredError()(x - crosscoder.decode_normalized(code), crosscoder.config.sources)
    assert prefix_loss(crosscoder, x, cc.Matryoshka((1.0,))) == expected


@pytest.mark.parametrize("shape", MESHES)
def test_a_matryoshka_on_a_mesh_equals_one_device(shape):
    value_and_grads = jax.jit(nnx.value_and_grad(prefix_loss), static_argnums=2)
    matryoshka = cc.Matryoshka((0.3, 1.0))  # 5 of 16 latents: the cut runs through a shard
    single, mesh = random_crosscoder(), make_mesh(*shape)
    x = random_acts(single)
    expected = value_and_grads(single, x, matryoshka)
    with jax.set_mesh(mesh):
        sharded = random_crosscoder(shardings=Shardings.for_mesh(mesh))
        found = value_and_grads(sharded, jax.device_put(x, sharded.shardings.acts_bw), matryoshka)
    # Sums over shards are taken in another order: a few units in the last place of float32.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.parametrize("shape", MESHES)
def test_aux_k_on_a_mesh_equals_one_device(shape):
    single = random_crosscoder()
    mesh = make_mesh(*shape)
    layout = Shardings.for_mesh(mesh)
    with jax.set_mesh(mesh):
        sharded = random_crosscoder(shardings=layout)
    for num_dead in (0, 3, 10):
        x, is_dead = aux_inputs(single, num_dead)
        expected = aux_value_and_grads(single, x, is_dead)
        with jax.set_mesh(mesh):
            placed = jax.device_put(x, layout.acts_bw), jax.device_put(is_dead, layout.per_latent_l)
            found = aux_value_and_grads(sharded, *placed)
        # Sums over shards are taken in another order: a few units in the last place of float32.
        assert (found[0] > 0) == (num_dead > 0)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L1OfNorms(-1.0), "weight=-1.0"),
        (lambda: L1OfNorms(1.0, warmup_steps=-1), "warmup_steps=-1"),
        (
            lambda: cc.Matryoshka((0.5, 0.5, 1.0)),
            r"shares=\(0.5, 0.5, 1.0\) must be positive and ascend to 1",
        ),
        (lambda: cc.DeltaLoss(0.0, "base", "chat"), "weight=0.0 of the delta loss must be positive"),
        (
            lambda: cc.DeltaLoss(1.0, "base", "mid").check(two_sources()),
            r"after='mid' of the delta loss is not read: name one of \('base', 'chat'\)",
        ),
        (lambda: cc.DeltaLoss(1.0, "base", "base"), "before='base' and after='base' of the delta loss must"),
        (
            lambda: cc.DeltaLoss(1.0, "base", "difference").check(
                cc.Sources((cc.Source("base", 3), cc.difference(cc.Source("chat", 3), cc.Source("base", 3))))
            ),
            "after='difference' of the delta loss is a combination of stored sources, whose difference",
        ),
        (
            lambda: cc.DeltaLoss(1.0, "base", "chat").check(two_sources(3, 4)),
            "of width 3 and 'chat' of width 4",
        ),
        (lambda: cc.Matryoshka((0.5,)), "must be positive and ascend to 1"),
        (lambda: cc.Matryoshka((0.01, 1.0)).sizes(16), r"num_latents=16 are prefixes of \(0, 16\) latents"),
        (lambda: AuxK(weight=-1.0), "weight=-1.0 must not be negative"),
        (lambda: AuxK(k_aux=0), "k_aux=0 must be positive; leave AuxK out"),
        (lambda: AuxK(dead_after_tokens=0), "dead_after_tokens=0 must be positive"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
