import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import collectives, over
from diffing_cases import (
    GOLDEN,
    TARGETS,
    Batch,
    batches_of,
    make_crosscoder,
    oracle_betas,
    pair,
    random_crosscoder,
)

from crosscoder_jax.diffing import closed_form
from crosscoder_jax.diffing.decoder_norms import LatentClass
from crosscoder_jax.diffing.latent_scaling import (
    _encode_and_update,
    finalize_scaling,
    init_scaling,
    jackknife_groups,
    latent_scaling,
    scaling_decoders,
    update_scaling,
)
from crosscoder_jax.diffing.verdicts import Verdict, verdicts
from crosscoder_jax.sharding import Shardings, make_mesh
from crosscoder_jax.sources import Source, Sources

# Compiled once per shape; run op by op the tests would mostly wait for compilations.
update = jax.jit(update_scaling, static_argnames=("sources", "shardings"))
ERROR, RECON = TARGETS.index("error"), TARGETS.index("reconstruction")


def scale_code(acts, code, w_dec, b_dec, *, reference=1, documents=None, batch_size=None, **kwargs):
    """Latent Scaling of a given code: acts [token, source, d], w_dec [latent, source, d]."""
    count, _, width = acts.shape
    sources = pair(width)
    documents = np.arange(count) if documents is None else documents
    flat = jnp.asarray(acts.reshape(count, -1), jnp.float32)
    decoders = scaling_decoders(
        jnp.asarray(w_dec.reshape(-1, 2 * width), jnp.float32),
        jnp.asarray(b_dec.reshape(-1), jnp.float32),
        sources,
        reference=reference,
    )
    sums = init_scaling(code.shape[1])
    groups = jackknife_groups(jnp.asarray(documents, jnp.int32))
    step = batch_size or count
    for start in range(0, count, step):
        part = slice(start, start + step)
        code_part = jnp.asarray(code[part], jnp.float32)
        is_valid = jnp.ones(code_part.shape[0], bool)
        sums = update(sums, decoders, flat[part], code_part, groups[part], is_valid, sources=sources)
    return finalize_scaling(sums, decoders, **kwargs)


# ---- the authors' own numbers ------------------------------------------------------------------


@pytest.fixture(params=["scaling_batchtopk", "scaling_l1"])
def golden(request):
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        return dict(file)


def golden_crosscoder(golden):
    w_enc, w_dec = golden["w/W_enc"], golden["w/W_dec"]  # [2, 32, 256], [2, 256, 32]
    return make_crosscoder(
        pair(32),
        w_enc=w_enc.reshape(64, 256),
        b_enc=golden["w/b_enc"],
        w_dec=w_dec.transpose(1, 0, 2).reshape(256, 64),
        b_dec=golden["w/b_dec"].reshape(64),
        threshold=golden.get("threshold", np.float32(0)),
    )


def test_golden_betas_of_every_target_and_model(golden):
    crosscoder = golden_crosscoder(golden)
    acts = golden["X"].astype(np.float32)
    batches = batches_of(acts.reshape(len(acts), 64), np.arange(len(acts)) // 10, 128)
    result = latent_scaling(crosscoder, batches)
    assert result.num_tokens == len(acts)

    # What float32 may do: a dot product over n = 32 or 64 terms errs by at most ~n u |a||b|; the
    # code, the reconstruction (256 terms, few nonzero) and the projection add up to < 512 u relative to
    # the sum of absolute terms, so |d beta| <= 512 u * sum_n f |y_n| / (||d|| sum f^2).
    unit = 2.0**-24
    w_dec = golden["w/W_dec"].astype(np.float64)
    code = np.asarray(crosscoder.encode(jnp.asarray(acts.reshape(len(acts), 64))), np.float64)
    size = np.linalg.norm(acts.astype(np.float64), axis=2).max(axis=1) + np.linalg.norm(golden["w/b_dec"])
    with np.errstate(invalid="ignore", divide="ignore"):
        allowed = 512 * unit * (code.T @ size) / (np.linalg.norm(w_dec[1], axis=1) * (code**2).sum(0))
    for t, target in enumerate(TARGETS):
        for m, model in enumerate(("base", "chat")):
            expected = golden[f"float64/{model}_{target}/betas"]
            np.testing.assert_array_equal(np.isnan(result.beta[t, m]), np.isnan(expected))
            error = np.abs(result.beta[t, m] - expected)
            assert np.all((error <= allowed) | np.isnan(expected)), (
                target,
                model,
                np.nanmax(error / allowed),
            )
    np.testing.assert_array_equal(result.active_tokens, golden["float64/chat_error/count_active"])


def test_golden_ratios(golden):
    result = latent_scaling(golden_crosscoder(golden), [golden["X"].reshape(-1, 64).astype(np.float32)])
    for name, target in (("nu_error", "error"), ("nu_recon", "reconstruction")):
        numerator = golden[f"float64/base_{target}/betas"]
        denominator = golden[f"float64/chat_{target}/betas"]
        expected = numerator / denominator
        # A ratio errs by what its two betas err (below 1e-4, see above) over the denominator.
        clear = np.abs(denominator) > 0.05
        assert clear.sum() > 150
        np.testing.assert_allclose(
            getattr(result, name)[clear], expected[clear], rtol=2e-3, atol=2e-3, err_msg=name
        )


# ---- against least squares in float64 -----------------------------------------------------------


@pytest.mark.parametrize("reference", [0, 1, "mixed"])
def test_equals_least_squares(reference):
    crosscoder = random_crosscoder(seed=3)
    rng = np.random.default_rng(4)
    acts = rng.standard_normal((300, 12)).astype(np.float32)
    chosen = np.arange(16) % 2 if reference == "mixed" else np.full(16, reference)
    result = latent_scaling(
        crosscoder,
        [acts[:200], acts[200:]],
        reference=jnp.asarray(chosen) if reference == "mixed" else reference,
    )
    code = np.asarray(crosscoder.encode(jnp.asarray(acts)))
    w_dec, b_dec = (np.asarray(x) for x in crosscoder.raw_decoder())
    expected = oracle_betas(
        acts.reshape(-1, 2, 6), code, w_dec.reshape(16, 2, 6), b_dec.reshape(2, 6), chosen
    )
    # 300 tokens, coordinates of order 1: float32 sums of ~1e3 terms are good to ~1e-5 of their scale.
    np.testing.assert_allclose(result.beta, expected, rtol=2e-5, atol=2e-5)
    latents = np.arange(16)
    ratio = expected[:, 1 - chosen, latents] / expected[:, chosen, latents]
    np.testing.assert_allclose(result.nu_error, ratio[ERROR], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(result.nu_recon, ratio[RECON], rtol=1e-4, atol=1e-4)


def test_one_latent_by_hand():
    # d_chat = (2, 0), d_base = (1, 1), b_base = (0, 3), b_chat = (1, 0); f = 1 then 2.
    # Base activations (5, 5), (3, 0); chat activations (4, 0), (6, 1).
    # d = d_chat, ||d||^2 = 4, sum f^2 = 5, denominator 20; gram = (1*2, 2*2) = (2, 4); b.d = (0, 2).
    sums = np.zeros((7, 2))
    sums[0], sums[1], sums[2] = (1, 2), (1, 4), (1, 1)
    # recon base: (1,4), (2,5); recon chat: (3,0), (5,0)
    # f (recon . d): base 1*2, 2*4; chat 1*6, 2*10.
    # f (residual . d): base (4,1), (1,-5) give 8, 4; chat (1,0), (1,1) give 2, 4
    sums[5], sums[6] = (2, 8), (6, 20)
    sums[3], sums[4] = (8, 4), (2, 4)
    beta = closed_form.scaling_coefficients(
        jnp.asarray(sums.sum(1), jnp.float32), jnp.array([2.0, 4.0]), jnp.array([0.0, 2.0]), jnp.int32(1)
    )
    # activation: base 1*10 + 2*6 = 22, chat 8 + 24 = 32.  no bias: chat 32 - 3 * 2 = 26.
    # recon: 10, 26.  error: base 12 + 5 * 2 = 22, chat 6 + 5 * 4 = 26.
    np.testing.assert_allclose(beta * 20, [[22, 32], [22, 26], [10, 26], [22, 26]], rtol=1e-6)
    nu = closed_form.nu_ratios(beta, jnp.int32(1))
    np.testing.assert_allclose(nu, [22 / 26, 10 / 26], rtol=1e-6)


def test_closed_form_under_vmap_equals_a_loop():
    rng = np.random.default_rng(0)
    sums, gram, bias = rng.random((7, 5, 9)), rng.random((2, 9)), rng.random((2, 9))
    reference = np.arange(9) % 2
    together = closed_form.solve_in_float64(sums, gram, bias, reference, np.ones(5))
    for j in range(9):
        with jax.enable_x64(True):
            one = closed_form.solve_one_latent(
                jnp.asarray(sums[..., j]),
                jnp.asarray(gram[:, j]),
                jnp.asarray(bias[:, j]),
                jnp.asarray(reference[j]),
                jnp.ones(5, jnp.float64),
            )
        for name, value in one.items():
            np.testing.assert_allclose(together[name][..., j], value, rtol=1e-12)
    assert together["beta"].dtype == np.float64


# ---- planted truth ------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "num_latents"), [(10, 2), (64, 32), (256, 128), (1000, 128)])
def test_recovers_planted_betas(width, num_latents):
    # Orthonormal decoders, lognormal code at 10 % density, beta ~ 5 N(0, 1): the activations are
    # sum_j beta_j f_j d_j, so each latent's coefficient is its beta, in each model its own.
    rng = np.random.default_rng(width)
    directions = np.linalg.qr(rng.standard_normal((width, num_latents)))[0].T
    code = rng.lognormal(size=(500, num_latents)) * (rng.random((500, num_latents)) < 0.1)
    beta = 5 * rng.standard_normal((2, num_latents))
    acts = np.stack([(code * b) @ directions for b in beta], axis=1)
    w_dec = np.stack([np.zeros_like(directions), directions], axis=1)
    result = scale_code(acts, code, w_dec, np.zeros((2, width)))
    # Crosstalk between float32 orthonormal rows and the projections: ~width^0.5 u times max f beta ~ 100.
    np.testing.assert_allclose(result.beta[TARGETS.index("activation")], beta, rtol=2e-5, atol=5e-5)
    np.testing.assert_array_equal(result.active_tokens, (code > 0).sum(0))


def planted(kind, rng, strength=0.4):
    """One chat-only looking latent (0) among orthogonal others, whose base side is of the given kind."""
    width, count = 16, 4000
    v = np.linalg.qr(rng.standard_normal((width, 3)))[0].T
    code = np.abs(rng.standard_normal((count, 3))) * (rng.random((count, 3)) < 0.3)
    w_dec = np.zeros((3, 2, width))
    w_dec[0, 1] = 2.0 * v[0]
    w_dec[1, 0], w_dec[1, 1] = v[1], v[1]  # a bystander that both models have
    b_dec = rng.standard_normal((2, width)) * 0.1
    if kind == "decoupled":  # a base-only latent fires together with it, in the same direction
        code[:, 2], w_dec[2, 0] = code[:, 0], 2.0 * v[0]
    if kind == "shared":
        w_dec[0, 0] = 2.0 * v[0]
    acts = np.einsum("nl,lsd->nsd", code, w_dec) + b_dec
    if kind == "shrunk":  # in the base's activations, but not in its decoder
        acts[:, 0] += strength * 2.0 * code[:, :1] * v[0]
    # The bias reaches the reconstruction target; kept orthogonal to v0 so that the planted truth is exact.
    shift = b_dec @ v[0]
    acts, b_dec = acts - np.multiply.outer(shift, v[0]), b_dec - np.multiply.outer(shift, v[0])
    return acts, code, w_dec, b_dec


@pytest.mark.parametrize(
    ("kind", "nu_error", "nu_recon"),
    [
        ("genuine", 0.0, 0.0),
        ("shrunk", 0.4, 0.0),  # x_base / x_chat
        ("decoupled", 0.0, 1.0),
        ("shared", 1.0, 1.0),
    ],
)
def test_planted_artefacts(kind, nu_error, nu_recon):
    result = scale_code(*planted(kind, np.random.default_rng(5)))
    # Exact in real arithmetic; float32 leaves ~1e-6.
    assert result.nu_error[0] == pytest.approx(nu_error, abs=1e-5)
    assert result.nu_recon[0] == pytest.approx(nu_recon, abs=1e-5)
    assert result.has_evidence[0]


@pytest.mark.parametrize("strength", [0.1, 0.7, 1.0])
def test_shrunk_latents_show_the_ratio_of_strengths(strength):
    result = scale_code(*planted("shrunk", np.random.default_rng(6), strength))
    assert result.nu_error[0] == pytest.approx(strength, abs=1e-5)


def test_base_only_latents_are_tested_from_their_own_side():
    acts, code, w_dec, b_dec = (x.copy() for x in planted("shrunk", np.random.default_rng(7)))
    # Swap the models: now the latent is base-only and the chat model has 0.4 of it in its error.
    acts, w_dec, b_dec = acts[:, ::-1], w_dec[:, ::-1], b_dec[::-1]
    mirrored = scale_code(acts, code, w_dec, b_dec, reference=0)
    assert mirrored.nu_error[0] == pytest.approx(0.4, abs=1e-5)
    from_chat = scale_code(acts, code, w_dec, b_dec, reference=1)
    assert np.isnan(from_chat.nu_error[0])  # its chat decoder is zero: no direction to test
    assert not from_chat.has_evidence[0]


# ---- streaming ----------------------------------------------------------------------------------


def arrays_of(result):
    return {name: value for name, value in vars(result).items() if isinstance(value, np.ndarray)}


def test_batch_size_padding_and_order_do_not_matter():
    crosscoder = random_crosscoder(seed=8)
    rng = np.random.default_rng(9)
    acts = rng.standard_normal((700, 12)).astype(np.float32)
    documents = np.repeat(np.arange(35), 20)
    results = [latent_scaling(crosscoder, batches_of(acts, documents, size)) for size in (64, 700, 1000)]
    results.append(latent_scaling(crosscoder, batches_of(acts[::-1], documents[::-1], 100)))
    assert {result.num_tokens for result in results} == {700}
    for other in results[1:]:
        for name, value in arrays_of(results[0]).items():
            np.testing.assert_allclose(arrays_of(other)[name], value, rtol=2e-4, atol=1e-5, err_msg=name)


def sums_of(crosscoder, batches):
    sources = crosscoder.config.sources
    decoders = scaling_decoders(*crosscoder.raw_decoder(), sources)
    sums = init_scaling(crosscoder.config.num_latents)
    for batch in batches:
        acts = jnp.asarray(batch.acts)
        sums = update(
            sums,
            decoders,
            acts,
            crosscoder.encode(acts),
            jackknife_groups(jnp.asarray(batch.documents, jnp.int32)),
            jnp.asarray(batch.is_valid),
            sources=sources,
        )
    return sums, decoders


def test_merging_halves_gives_the_whole():
    crosscoder = random_crosscoder(seed=10)
    acts = np.random.default_rng(11).standard_normal((512, 12)).astype(np.float32)
    batches = batches_of(acts, np.arange(512) // 8, 64)
    whole, decoders = sums_of(crosscoder, batches)
    merged = sums_of(crosscoder, batches[:3])[0].merge(sums_of(crosscoder, batches[3:])[0])
    scale = np.abs(whole.sums.to_float64()).max()
    # The same float32 batch sums, added in another order with compensation: 2^-48 of the total.
    np.testing.assert_allclose(
        merged.sums.to_float64(), whole.sums.to_float64(), rtol=0, atol=scale * 2.0**-44
    )
    plain = jax.tree.map(jnp.add, sums_of(crosscoder, batches[:3])[0], sums_of(crosscoder, batches[3:])[0])
    np.testing.assert_allclose(
        plain.sums.to_float64(), whole.sums.to_float64(), rtol=0, atol=scale * 2.0**-22
    )
    for name, value in arrays_of(finalize_scaling(whole, decoders)).items():
        np.testing.assert_allclose(
            arrays_of(finalize_scaling(merged, decoders))[name], value, rtol=1e-9, err_msg=name
        )


def test_sums_add_up_over_devices_by_psum():
    # Each device sums its own batch, as under shard_map; the psum of the fields is a valid sum.
    crosscoder = random_crosscoder(seed=29)
    acts = np.random.default_rng(30).standard_normal((256, 12)).astype(np.float32)
    batches = batches_of(acts, np.arange(256) // 8, 32)
    parts = [sums_of(crosscoder, [batch])[0] for batch in batches]
    stacked = jax.tree.map(lambda *values: np.stack(values), *parts)
    with jax.set_mesh(make_mesh(8, 1)):
        spread = jax.tree.map(lambda x: jax.device_put(x, jax.P("data")), stacked)
        add = jax.shard_map(
            lambda own: jax.tree.map(lambda x: jax.lax.psum(x[0], "data"), own),
            in_specs=jax.P("data"),
            out_specs=jax.P(),
        )
        added = jax.jit(add)(spread)
    whole, decoders = sums_of(crosscoder, batches)
    for name, value in arrays_of(finalize_scaling(whole, decoders)).items():
        found = arrays_of(finalize_scaling(added, decoders))[name]
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_sums_survive_a_file(tmp_path):
    crosscoder = random_crosscoder(seed=31)
    acts = np.random.default_rng(32).standard_normal((256, 12)).astype(np.float32)
    batches = batches_of(acts, np.arange(256) // 8, 64)
    first, decoders = sums_of(crosscoder, batches[:2])
    leaves, structure = jax.tree.flatten(first)
    np.savez(tmp_path / "sums.npz", *leaves)
    with np.load(tmp_path / "sums.npz") as file:
        read = structure.unflatten([jnp.asarray(file[name]) for name in file.files])
    resumed = read.merge(sums_of(crosscoder, batches[2:])[0])
    whole, _ = sums_of(crosscoder, batches)
    expected = arrays_of(finalize_scaling(whole, decoders))
    for name, value in arrays_of(finalize_scaling(resumed, decoders)).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_units_of_the_activations_do_not_matter(factor):
    # Scale activations, decoders and biases together: the code and every beta stay as they are.
    acts, code, w_dec, b_dec = planted("shrunk", np.random.default_rng(33))
    documents = np.arange(len(acts)) // 10
    plain = scale_code(acts, code, w_dec, b_dec, documents=documents)
    scaled = scale_code(factor * acts, code, factor * w_dec, factor * b_dec, documents=documents)
    np.testing.assert_allclose(scaled.beta, plain.beta, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(scaled.has_evidence, plain.has_evidence)


def test_rescaling_a_latent_changes_no_ratio():
    # (f, d) -> (c f, d / c) is the same crosscoder: nu stays, and so does what is known about it.
    acts, code, w_dec, b_dec = planted("shrunk", np.random.default_rng(34))
    documents = np.arange(len(acts)) // 10
    factors = np.array([0.01, 30.0, 2.0])
    plain = scale_code(acts, code, w_dec, b_dec, documents=documents)
    other = scale_code(acts, code * factors, w_dec / factors[:, None, None], b_dec, documents=documents)
    np.testing.assert_allclose(other.nu_error, plain.nu_error, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(other.nu_recon, plain.nu_recon, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(other.se_nu_error, plain.se_nu_error, rtol=1e-2, atol=1e-5)


def test_noise_in_the_activations_widens_the_intervals_as_one_over_root_n():
    num_latents = 40

    def mean_error(count):
        rng = np.random.default_rng(35)
        code = np.abs(rng.standard_normal((count, num_latents))) * (rng.random((count, num_latents)) < 0.3)
        w_dec = np.stack([np.zeros((num_latents, num_latents)), np.eye(num_latents)], axis=1)
        noise = 0.5 * rng.standard_normal((count, 2, num_latents))
        acts = np.einsum("nl,lsd->nsd", code, w_dec) + noise
        result = scale_code(acts, code, w_dec, np.zeros((2, num_latents)), documents=np.arange(count) // 5)
        assert np.all(np.abs(result.nu_error) < 5 * result.se_nu_error)
        return result.se_nu_error.mean()

    few, many = mean_error(1000), mean_error(16_000)
    # With nothing of the latent in the base, nu is noise over noise-free: the textbook error of the
    # slope, 0.5 / sqrt(sum f^2) with sum f^2 = 0.3 n. One jackknife error of 20 groups is good to
    # 16 %, the mean of 40 to 3 %; four deviations are allowed.
    assert many == pytest.approx(0.5 / np.sqrt(0.3 * 16_000), rel=0.12)
    assert few / many == pytest.approx(4.0, rel=0.16)


def test_masked_rows_are_ignored_whatever_they_hold():
    crosscoder = random_crosscoder(seed=12)
    acts = np.random.default_rng(13).standard_normal((200, 12)).astype(np.float32)
    documents = np.arange(200) // 5
    is_valid = np.arange(200) % 3 != 0
    dirty = np.where(is_valid[:, None], acts, np.float32(np.nan))
    dirty[3] = np.inf
    masked = latent_scaling(crosscoder, [Batch(dirty, documents, is_valid)])
    clean = latent_scaling(crosscoder, [Batch(acts[is_valid], documents[is_valid], is_valid[is_valid])])
    assert masked.num_tokens == is_valid.sum()
    for name, value in arrays_of(clean).items():
        np.testing.assert_allclose(arrays_of(masked)[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_long_sums_do_not_lose_what_a_float32_sum_loses():
    # 3,000 identical batches: every sum is 3,000 times one batch's. A plain float32 sum drifts by
    # about 1e-5 of its value here; the compensated one by nothing but the batch's own rounding.
    crosscoder = random_crosscoder(seed=14)
    batch = batches_of(
        np.random.default_rng(15).standard_normal((8, 12)).astype(np.float32), np.arange(8), 8
    )[0]
    one, _ = sums_of(crosscoder, [batch])
    add = jax.jit(lambda sums, more: sums.merge(more))
    total = init_scaling(16)
    plain = jnp.zeros_like(one.sums.high)
    for _ in range(3000):
        total, plain = add(total, one), plain + one.sums.high
    expected = 3000 * one.sums.to_float64()
    scale = np.abs(expected) + 1e-30
    assert (np.abs(total.sums.to_float64() - expected) / scale).max() < 1e-12
    assert (np.abs(np.asarray(plain, np.float64) - expected) / scale).max() > 1e-7
    assert round(total.tokens.to_float64().sum()) == 24_000


def test_bfloat16_activations_are_read_as_they_are():
    crosscoder = random_crosscoder(seed=16)
    acts = jnp.asarray(np.random.default_rng(17).standard_normal((128, 12)), jnp.bfloat16)
    narrow = latent_scaling(crosscoder, [np.asarray(acts)])
    wide = latent_scaling(crosscoder, [np.asarray(acts, np.float32)])
    np.testing.assert_allclose(narrow.beta, wide.beta, rtol=1e-6)


# ---- evidence and standard errors -----------------------------------------------------------------


def test_a_latent_that_never_fires_is_nan_and_kept():
    crosscoder = random_crosscoder(seed=18)
    crosscoder.b_enc[...] = crosscoder.b_enc[...].at[4].set(-1e6)
    result = latent_scaling(
        crosscoder, [np.random.default_rng(19).standard_normal((400, 12)).astype(np.float32)]
    )
    assert np.isnan(result.beta[..., 4]).all()
    assert np.isnan([result.nu_error[4], result.nu_recon[4], result.se_nu_error[4]]).all()
    assert (result.active_tokens[4], result.has_evidence[4]) == (0, False)
    assert np.isfinite(result.nu_error[5])


def test_little_evidence_is_marked_and_still_reported():
    acts, code, w_dec, b_dec = planted("genuine", np.random.default_rng(20))
    documents = np.arange(len(acts)) // 10
    code = code.copy()
    active = np.flatnonzero(code[:, 0])
    code[active[30:], 0] = 0  # fires on 30 tokens only
    few = scale_code(acts, code, w_dec, b_dec, documents=documents)
    assert np.isfinite(few.nu_error[0])
    assert not few.has_evidence[0]
    assert few.has_evidence[1]
    assert scale_code(acts, code, w_dec, b_dec, documents=documents, min_active_tokens=30).has_evidence[0]


def test_activity_in_two_groups_is_too_little():
    acts, code, w_dec, b_dec = planted("genuine", np.random.default_rng(21))
    documents = np.arange(len(acts)) // 100
    groups = np.asarray(jackknife_groups(jnp.asarray(documents)))
    code = code.copy()
    two = np.isin(groups, np.unique(groups)[:2])
    code[~two, 0] = 0
    result = scale_code(acts, code, w_dec, b_dec, documents=documents)
    assert result.active_tokens[0] >= 50
    assert (result.active_groups[0], result.has_evidence[0]) == (2, False)


def test_a_denominator_that_could_be_zero_is_too_little():
    # The chat activations hold nothing of the latent's direction but noise: beta_chat of the error
    # target is the noise alone once its own contribution is taken out of the residual.
    rng = np.random.default_rng(22)
    acts, code, w_dec, b_dec = planted("genuine", rng)
    direction = w_dec[0, 1] / 2
    acts = acts - np.multiply.outer(acts @ direction, direction)
    acts[:, 1] += rng.standard_normal((len(acts), 1)) * direction
    result = scale_code(acts, code, w_dec, b_dec)
    beta, error = result.beta[ERROR, 1, 0], result.se_beta[ERROR, 1, 0]
    assert abs(beta) < 2 * error
    assert not result.has_evidence[0]


@pytest.mark.parametrize("target", ["error", "reconstruction"])
def test_a_reference_that_is_clearly_negative_is_no_evidence(target):
    # Chat holds the opposite of the latent's direction in one target and the base holds the direction:
    # the ratio is negative, below every cut-off, and would confirm the latent as chat-only.
    acts, code, w_dec, b_dec = planted("genuine", np.random.default_rng(40))
    documents = np.arange(len(acts)) // 10
    if target == "error":
        # 2 d in the base and -2 d in chat, against the d that chat's decoder writes: betas 2 and -2.
        acts[:, 0] += 2 * code[:, :1] * w_dec[0, 1]
        acts[:, 1] -= 3 * code[:, :1] * w_dec[0, 1]
    else:
        # Latent 2, silent so far, fires with latent 0 and writes 2 d to the base and -3 d to chat, so the
        # whole reconstruction holds 2 d and -2 d; the activations follow it, so the error holds d alone.
        code = code.copy()
        code[:, 2], w_dec[2] = code[:, 0], np.stack([2 * w_dec[0, 1], -3 * w_dec[0, 1]])
        acts = np.einsum("nl,lsd->nsd", code, w_dec) + b_dec
    result = scale_code(acts, code, w_dec, b_dec, documents=documents)
    row = TARGETS.index(target)
    np.testing.assert_allclose(result.beta[row, :, 0], [2, -2], atol=1e-4)
    assert np.all(np.abs(result.beta[row, :, 0]) > 2 * result.se_beta[row, :, 0])
    assert not result.has_evidence[0]
    assert verdicts(np.full(3, LatentClass.CHAT_ONLY), result)[0] == Verdict.UNDETERMINED


def test_jackknife_of_a_mean_is_its_textbook_standard_error():
    # Leaving out one of n equal groups, the jackknife of a mean is s / sqrt(n), exactly.
    values = np.random.default_rng(23).standard_normal(20)
    left_out = (values.sum() - values) / 19
    error = closed_form.jackknife_error(jnp.asarray(left_out, jnp.float32), jnp.ones(20))
    assert float(error) == pytest.approx(values.std(ddof=1) / np.sqrt(20), rel=1e-4)
    padded = jnp.concatenate([jnp.asarray(left_out, jnp.float32), jnp.full(5, values.mean(), jnp.float32)])
    is_used = jnp.arange(25) < 20
    assert float(closed_form.jackknife_error(padded, is_used)) == pytest.approx(float(error), rel=1e-5)


def test_jackknife_needs_two_groups():
    assert np.isnan(closed_form.jackknife_error(jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0])))


def simulate_clustered(rng, num_documents, per_document, num_latents):
    """Independent latents whose base strength varies by document: the mean ratio is 0.3."""
    documents = np.repeat(np.arange(num_documents), per_document)
    count = documents.size
    code = rng.lognormal(0, 0.5, (count, num_latents)) * (rng.random((count, num_latents)) < 0.1)
    by_document = 0.3 + 0.3 * rng.standard_normal((num_documents, num_latents))
    base = code * by_document[documents] + 0.3 * rng.standard_normal(code.shape)
    chat = code + 0.3 * rng.standard_normal(code.shape)
    identity = np.eye(num_latents)
    w_dec = np.stack([np.zeros_like(identity), identity], axis=1)
    return np.stack([base, chat], axis=1), code, w_dec, np.zeros((2, num_latents)), documents


def test_intervals_cover_the_truth_although_documents_are_correlated():
    # 400 independent latents are 400 trials. The 95 % interval of 20 groups uses Student's t with 19
    # degrees of freedom, 2.093; the jackknife of a ratio runs a little narrow (0.94 in long runs).
    # Binomial noise of 400 trials is 0.012: four of them below 0.94 and above 0.95 are allowed.
    acts, code, w_dec, b_dec, documents = simulate_clustered(np.random.default_rng(24), 80, 60, 400)
    by_document = scale_code(acts, code, w_dec, b_dec, documents=documents)
    covered = np.abs(by_document.nu_error - 0.3) < 2.093 * by_document.se_nu_error
    assert 0.89 < covered.mean() < 0.998
    # Groups of single tokens forget the correlation and are far too sure of themselves.
    by_token = scale_code(acts, code, w_dec, b_dec)
    too_sure = np.abs(by_token.nu_error - 0.3) < 2.093 * by_token.se_nu_error
    assert too_sure.mean() < 0.85


def test_groups_are_even_for_documents_with_a_period():
    # Every tenth document held out: the remainder of the index alone would fill 2 of 20 groups.
    groups = np.asarray(jackknife_groups(jnp.arange(0, 20_000, 10)))
    counts = np.bincount(groups, minlength=20)
    # 2,000 documents: 100 +- 10 a group, so five deviations.
    assert counts.min() > 50
    assert counts.max() < 150
    assert groups.min() >= 0
    assert groups.max() < 20


# ---- the same model twice -------------------------------------------------------------------------


def test_identical_sources_give_nu_of_one():
    rng = np.random.default_rng(25)
    half = rng.standard_normal((6, 16))
    w_dec = rng.standard_normal((16, 6))
    crosscoder = make_crosscoder(
        pair(6),
        np.concatenate([half, half]) / 3,
        np.zeros(16),
        np.concatenate([w_dec, w_dec], 1),
        np.ones(12),
        0.5,
    )
    acts = rng.standard_normal((1000, 6)).astype(np.float32)
    result = latent_scaling(crosscoder, [np.concatenate([acts, acts], axis=1)])
    # The same arithmetic on both sources.
    np.testing.assert_allclose(result.nu_error, 1.0, atol=1e-5)
    np.testing.assert_allclose(result.nu_recon, 1.0, atol=1e-5)


# ---- meshes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 4), (8, 1), (1, 8)])
def test_eight_devices_equal_one(shape):
    acts = np.random.default_rng(26).standard_normal((256, 12)).astype(np.float32)
    documents = np.arange(250) // 6
    batches = batches_of(acts[:250], documents, 64)
    chosen = np.arange(16) % 2
    alone = latent_scaling(random_crosscoder(seed=27), batches, reference=jnp.asarray(chosen))
    with jax.set_mesh(make_mesh(*shape)):
        crosscoder = random_crosscoder(seed=27, shardings=Shardings.data_latent())
        spread = latent_scaling(crosscoder, batches, reference=jnp.asarray(chosen))
    for name, value in arrays_of(alone).items():
        np.testing.assert_allclose(arrays_of(spread)[name], value, rtol=2e-4, atol=1e-5, err_msg=name)


def test_no_array_with_the_latent_axis_is_gathered():
    with jax.set_mesh(make_mesh(2, 4)):
        shardings = Shardings.data_latent()
        crosscoder = random_crosscoder(seed=28, num_latents=208, shardings=shardings)
        decoders = scaling_decoders(*crosscoder.raw_decoder(), crosscoder.config.sources, shardings=shardings)
        sums = init_scaling(208, shardings=shardings)
        assert jax.typeof(sums.sums.high).sharding.spec == jax.P(None, None, "latent")
        acts = jax.device_put(np.zeros((64, 12), np.float32), shardings.acts_bw)
        documents = jax.device_put(np.zeros(64, np.int32), shardings.per_batch_b)
        is_valid = jax.device_put(np.ones(64, bool), shardings.per_batch_b)
        leaves, structure = jax.tree.flatten((sums, decoders, crosscoder))

        def step(leaves, *batch):
            return _encode_and_update(*structure.unflatten(leaves), *batch)

        text = jax.jit(step).lower(leaves, acts, documents, is_valid).compile().as_text()
    # 208 latents are 52 a device, 64 tokens 32; this crosscoder reads two sources of width 6.
    allowed = {
        "latent": {(), (32, 12), (32, 6)},
        # Per group of documents: sums of this shard's latents, and tokens.
        "data": {(20, 52), (20,)},
    }
    found = collectives(text)
    assert {kind for kind, _, _ in found} == {"all-reduce"}
    for _, shapes, where in found:
        axis = over(where, 2, 4)
        assert set(shapes) <= allowed[axis], (axis, shapes)


# ---- refusals ---------------------------------------------------------------------------------------


def test_refusals_name_what_to_do():
    crosscoder = random_crosscoder()
    with pytest.raises(ValueError, match="batches is empty"):
        latent_scaling(crosscoder, [])
    with pytest.raises(ValueError, match="reference=2 must be 0"):
        latent_scaling(crosscoder, [np.zeros((4, 12), np.float32)], reference=2)
    with pytest.raises(ValueError, match="num_groups=1"):
        init_scaling(4, num_groups=1)
    unequal = Sources((Source("base", 3), Source("chat", 5)))
    with pytest.raises(ValueError, match=r"one width.*'base': 3, 'chat': 5"):
        scaling_decoders(jnp.ones((4, 8)), jnp.ones(8), unequal)
    with pytest.raises(ValueError, match="there are 1"):
        scaling_decoders(jnp.ones((4, 8)), jnp.ones(8), Sources((Source("difference", 8),)))
