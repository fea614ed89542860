"""Wrong numbers that other libraries gave, each with the test that would have caught it.

The first line of a docstring is the trap, with the issue where it was found: SL is SAELens, DL the
dictionary_learning family, SP sparsify, OM Language-Model-SAEs, SA sparsity-artifacts-crosscoders, DT
diffing-toolkit.
"""

import dataclasses

import diffing_cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from core_cases import random_crosscoder, two_sources
from diffing_cases import batches_of, make_crosscoder, oracle_betas
from flax import nnx
from training_cases import activations, recipe, to_numpy, write_store

import crosscoder_jax as cc
from crosscoder_jax.activations import TokenView
from crosscoder_jax.activations.statistics import MomentAccumulator
from crosscoder_jax.diffing import DiffConfig, diff_run, latent_scaling
from crosscoder_jax.diffing.evidence import init_activity, init_top, update_activity, update_top
from crosscoder_jax.metrics import explained_variance, fired_counts, reconstruction_sums
from crosscoder_jax.objectives import AuxK, ErrorNorm, MeanSquaredError, SquaredError
from crosscoder_jax.sharding import Shardings, make_mesh
from crosscoder_jax.sparsity import BatchTopK
from crosscoder_jax.training.checkpoint import Checkpoints
from crosscoder_jax.training.evaluate import evaluate
from crosscoder_jax.training.forward import count_silence
from crosscoder_jax.training.laws import CorrectedThreshold, RunningMean
from crosscoder_jax.training.state import init_state
from crosscoder_jax.training.statistics import data_statistics
from crosscoder_jax.training.step import eval_step, train_step

BATCH = 32
RECIPE = recipe(aux_k=AuxK(0.5, k_aux=4, dead_after_tokens=BATCH), sparsity=BatchTopK(k=0.25), warmup_steps=0)
"""Eight of 16 latents stay silent in a batch, so AuxK takes part from the first step on."""


@pytest.fixture(scope="module")
def steps():
    """Three steps of ``RECIPE``: (crosscoder before, batch, metrics, threshold and counters after)."""
    state, done = init_state(RECIPE), []
    for batch in activations(3 * BATCH).reshape(3, BATCH, -1):
        before = jax.tree.map(jnp.copy, state.crosscoder())
        state, metrics = train_step(state, jnp.asarray(batch), config=RECIPE)
        after = jax.tree.map(jnp.copy, state.crosscoder())
        done.append((before, batch, to_numpy(metrics), float(state.threshold), after))
    return done


def raw_acts(crosscoder, num_tokens=64, seed=0):
    shape = (num_tokens, crosscoder.config.sources.width)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# ---- checkpoints --------------------------------------------------------------------------------------


def test_b_dec_stays_when_the_input_scale_is_folded():
    """b_dec left out when the input scale is folded (SL#354)."""
    crosscoder = random_crosscoder(threshold=1e9)  # nothing fires: the reconstruction is the bias
    scale = np.repeat(np.asarray(crosscoder.scale[...]), 3)
    expected = np.asarray(crosscoder.b_dec[...]) / scale + np.asarray(crosscoder.mean[...])
    found = cc.fold_normalization(crosscoder)(raw_acts(crosscoder))
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-6)


def test_a_checkpoint_in_the_middle_reads_raw_activations(tmp_path):
    """Intermediate checkpoints never folded; scale not saved at all (SL#381, Kissane)."""
    mean, scale = np.arange(11, dtype=np.float32), np.array([0.5, 4.0], np.float32)
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, init_state(RECIPE, mean=mean, scale=scale))
    again = checkpoints.restore(jax.eval_shape(lambda: init_state(RECIPE))).crosscoder()
    checkpoints.close()
    raw = activations(8)
    normalized = (raw - mean) * np.repeat(scale, (6, 5))
    expected = np.maximum(normalized @ np.asarray(again.w_enc[...]), 0)  # threshold 0, biases 0
    np.testing.assert_allclose(again.encode(jnp.asarray(raw)), expected, atol=1e-4)


def test_a_loaded_batch_top_k_crosscoder_is_as_sparse_as_the_saved_one(tmp_path):
    """TopK loaded as ReLU: L0 600 for 80 (SL#308)."""
    crosscoder = random_crosscoder(threshold=20.0, sparsity=BatchTopK(k=3))
    acts = raw_acts(crosscoder)
    l0 = [float(cc.l0(c.encode(acts))) for c in (crosscoder, cc.load(cc.save(crosscoder, tmp_path)))]
    assert l0[0] == l0[1] < 0.6 * float(cc.l0(random_crosscoder(threshold=0.0).encode(acts)))
    assert cc.load(tmp_path).config.sparsity == BatchTopK(k=3)


def test_the_threshold_is_saved_in_float32_whatever_is_computed_in(tmp_path):
    """Threshold re-cast to bf16 on save and load (SL#728)."""
    threshold = np.float32(1 + 2**-20)  # 1 in bfloat16
    crosscoder = random_crosscoder(threshold=threshold, dtype="bfloat16")
    again = cc.load(cc.save(crosscoder, tmp_path))
    assert again.threshold[...].dtype == jnp.float32
    assert np.asarray(again.threshold[...]) == threshold


@pytest.mark.parametrize(("threshold", "code"), [(2.9, 1.0), (3.1, 0.0)])
def test_the_decoder_norm_counts_once(threshold, code):
    """Decoder norm applied twice (DL#39)."""
    # Activation 1, decoder norms 2 and 1: the score is 3, not 9, and the code is 1, not 3.
    crosscoder = make_crosscoder(
        two_sources(1, 1),
        w_enc=np.array([[1.0], [0.0]]),
        b_enc=np.zeros(1),
        w_dec=np.array([[2.0, 1.0]]),
        b_dec=np.zeros(2),
        threshold=threshold,
    )
    acts = jnp.array([[1.0, 0.0]])
    assert float(crosscoder.encode(acts)[0, 0]) == code
    np.testing.assert_array_equal(crosscoder(acts), [[2 * code, code]])
    assert float(crosscoder.training_code(crosscoder.pre_acts(acts)).smallest_score) == 3.0


# ---- AuxK ---------------------------------------------------------------------------------------------


def aux_loss(crosscoder, x, is_dead, aux_k=AuxK(weight=1.0)):
    """AuxK as in training: the live latents reconstruct, the dead ones what is left."""
    pre_acts = crosscoder.pre_acts(x)
    residual = x - crosscoder.decode_normalized(jnp.where(is_dead, 0.0, jax.nn.relu(pre_acts)))
    return aux_k(crosscoder, pre_acts, residual, is_dead)


def aux_gradients():
    """Gradients of AuxK, and which latents were dead; all of them fit into k_aux."""
    crosscoder = random_crosscoder(sources=two_sources(6, 6))
    is_dead = jnp.arange(16) < 3
    graphdef, params, rest = nnx.split(crosscoder, nnx.Param, ...)
    x = raw_acts(crosscoder)
    return jax.grad(lambda p: aux_loss(nnx.merge(graphdef, p, rest), x, is_dead))(params), np.asarray(is_dead)


def test_aux_k_decodes_without_the_bias():
    """AuxK: b_dec counted twice (SP#134)."""
    # The dead latent gives exactly the residual, so any bias would be an error.
    w_dec, b_dec = np.array([[1.0, 0.5]]), np.array([7.0, -3.0])
    crosscoder = make_crosscoder(two_sources(1, 1), np.array([[1.0], [0.0]]), np.zeros(1), w_dec, b_dec)
    pre_acts = jnp.array([[1.0], [2.0]])
    residual = pre_acts @ jnp.asarray(w_dec, jnp.float32)
    assert float(AuxK(weight=1.0)(crosscoder, pre_acts, residual, jnp.array([True]))) == 0


def test_k_aux_is_half_the_width_and_not_of_the_dictionary():
    """k_aux taken from the dictionary size (SL#432)."""
    crosscoder = random_crosscoder(sources=two_sources(4, 4), num_latents=64)
    pre_acts, residual = jnp.ones((5, 64)) + jnp.arange(64) / 64, raw_acts(crosscoder, 5)
    touched = jax.grad(lambda pre: AuxK()(crosscoder, pre, residual, jnp.ones(64, bool)))(pre_acts) != 0
    np.testing.assert_array_equal(jnp.sum(touched, axis=1), np.full(5, 2))


def test_the_residual_of_aux_k_is_detached():
    """Residual not detached (SL#432): live latents and the bias would learn from what dead ones miss."""
    gradients, is_dead = aux_gradients()
    assert not np.asarray(gradients["w_dec"][...])[~is_dead].any()
    assert not np.asarray(gradients["w_enc"][...])[:, ~is_dead].any()
    assert not np.asarray(gradients["b_dec"][...]).any()


def test_aux_k_trains_the_encoder_of_dead_latents():
    """No gradient to the encoder (SP)."""
    gradients, is_dead = aux_gradients()
    assert np.abs(np.asarray(gradients["w_enc"][...])[:, is_dead]).sum(axis=0).all()
    assert np.asarray(gradients["b_enc"][...])[is_dead].all()


def test_aux_k_is_a_part_of_the_loss(steps):
    """Loss computed and not added (crosscode)."""
    metrics = steps[2][2]
    assert metrics["['loss/aux_k']"] > 0.01 * metrics["['loss']"]
    parts = metrics["['loss/reconstruction']"] + metrics["['loss/aux_k']"]
    np.testing.assert_allclose(metrics["['loss']"], parts, rtol=1e-6)


def test_aux_k_takes_any_sizes():
    """Shapes that cannot multiply (OM)."""
    crosscoder = random_crosscoder(sources=two_sources(2, 5), num_latents=9)
    loss = aux_loss(crosscoder, raw_acts(crosscoder, 3), jnp.arange(9) < 4)
    assert 0 < float(loss) < np.inf


# ---- metrics ------------------------------------------------------------------------------------------


def fve(acts, recon, sources):
    return explained_variance(reconstruction_sums(jnp.asarray(acts), jnp.asarray(recon), sources), sources)


def test_variance_is_about_the_mean():
    """Explained variance about zero instead of the mean: 0.98 for 0.78 (SL#665)."""
    # Values 9 and 11, predicted as 10 and 11: 1 - 1/2. About zero it would be 1 - 1/202 = 0.995.
    assert float(fve([[9.0], [11.0]], [[10.0], [11.0]], cc.Sources((cc.Source("a", 1),)))["fve"]) == 0.5


def test_variance_explained_is_a_ratio_of_sums():
    """Mean of ratios for ratio of sums (SL#443)."""
    # Variances 2 and 200, errors 2 and 0: 1 - 2/202 pooled, and not (0 + 1) / 2.
    found = fve([[-1.0, -10.0], [1.0, 10.0]], [[0.0, -10.0], [0.0, 10.0]], two_sources(1, 1))
    assert float(found["fve"]) == pytest.approx(1 - 2 / 202, rel=1e-6)


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_losses_do_not_shrink_with_the_batch(num_tokens):
    """MSE divided by the token count (SL#711)."""
    residual, sources = jnp.full((num_tokens, 8), 2.0), two_sources(4, 4)
    losses = [float(loss(residual, sources)) for loss in (SquaredError(), MeanSquaredError(), ErrorNorm())]
    assert losses == [32.0, 4.0, 4.0]  # 8 coordinates of 4; their mean; two norms of 4, averaged


def test_training_and_evaluation_agree_on_the_same_batch(steps):
    """Training and offline metric disagree (SP#130)."""
    for before, batch, metrics, *_ in steps:
        measured = eval_step(before, jnp.asarray(batch), jnp.ones(BATCH, bool))
        found = explained_variance(measured.training, before.config.sources)
        for name, value in found.items():
            # Float32 sums of a few hundred terms, in another fusion.
            np.testing.assert_allclose(metrics[f"['{name}']"], value, atol=5e-6, err_msg=name)
        assert metrics["['l0']"] == float(measured.active_training) / BATCH


# ---- dead latents and thresholds ------------------------------------------------------------------------


def test_measuring_advances_no_counter(tmp_path):
    """Logging and validation advance the dead-latent counters (DL)."""
    view = TokenView(write_store(tmp_path / "store", num_tokens=100))
    state = init_state(RECIPE)
    state = dataclasses.replace(state, tokens_since_fired=state.tokens_since_fired + 5)
    evaluate(state.crosscoder(), view)
    assert state.tokens_since_fired.tolist() == [5] * 16
    batch = jnp.asarray(activations(BATCH))
    is_active = (state.crosscoder().training_code(state.crosscoder().pre_acts(batch)).code > 0).any(axis=0)
    state, _ = train_step(state, batch, config=RECIPE)
    np.testing.assert_array_equal(state.tokens_since_fired, np.where(is_active, 0, 5 + BATCH))


def test_counters_count_the_tokens_of_all_devices():
    """Dead counters per rank, off by the number of devices (SP#119)."""
    code = np.zeros((16, 4), np.float32)
    code[15, 2] = 1.0  # fires on the last device only
    with jax.set_mesh(mesh := make_mesh(8, 1)):
        layout = Shardings.for_mesh(mesh)
        placed = jax.device_put(code, layout.code_bl)
        since = jax.device_put(np.full(4, 100, np.int32), layout.per_latent_l)
        counted = jax.jit(count_silence, static_argnums=2)(since, fired_counts(placed), 16)
    np.testing.assert_array_equal(counted, [116, 116, 0, 116])


def test_the_code_is_sparse_after_one_step(steps):
    """Threshold never set before step 1000, so the code is dense (DL); missing (OM)."""
    _, batch, _, threshold, after = steps[0]
    assert threshold > 0
    # k is 0.25; without a threshold half of the 16 latents would fire.
    assert float(cc.l0(after.encode(jnp.asarray(batch)))) < 0.75
    after.threshold[...] = jnp.float32(0)
    assert float(cc.l0(after.encode(jnp.asarray(batch)))) > 4


def test_the_first_threshold_is_the_first_smallest_score(steps):
    """Running threshold from 0 without bias correction (SL): a thousandth of it after one step."""
    before, batch, _, threshold, _ = steps[0]
    sparse = before.training_code(before.pre_acts(before.normalize(jnp.asarray(batch))))
    np.testing.assert_allclose(threshold, sparse.smallest_score, rtol=1e-6)


def test_the_threshold_is_a_mean_of_the_smallest_scores():
    """Minimum instead of mean gives L0 106 for k 100 (DL#29)."""
    mean = RunningMean(jnp.float32(0), jnp.float32(0))
    for step, smallest in enumerate((1.0, 3.0)):
        mean = CorrectedThreshold(0.5)(mean, jnp.float32(smallest), jnp.int32(step))
    # Weights 1/4 and 1/2: (1/4 + 3/2) / (3/4).
    assert float(mean.value) == pytest.approx(7 / 3)
    assert type(RECIPE.threshold) is CorrectedThreshold


@pytest.mark.parametrize(
    ("mesh", "rows", "columns"),
    [((8, 1), slice(0, 2), slice(None)), ((1, 8), slice(None), slice(14, 16))],
    ids=["BatchTopK per data shard instead of over the global batch (OM)", "top-k inside a chunk of latents"],
)
def test_the_selection_is_over_the_whole_batch_and_dictionary(mesh, rows, columns):
    """BatchTopK per data shard (OM); top-k inside a chunk of latents (SAEDashboard#33)."""
    # All large scores are on the first device's tokens, or in the last device's latents.
    scores = np.random.default_rng(0).uniform(1, 2, size=(16, 16)).astype(np.float32)
    scores[rows, columns] += 10
    with jax.set_mesh(mesh := make_mesh(*mesh)):
        layout = Shardings.for_mesh(mesh)
        placed = jax.device_put(scores, layout.code_bl)
        ones = jax.device_put(np.ones(16, np.float32), layout.per_latent_l)
        code = jax.jit(BatchTopK(k=2))(placed, ones).code
    expected = np.zeros((16, 16), bool)
    expected[rows, columns] = True
    np.testing.assert_array_equal(np.asarray(code) > 0, expected)


def test_nested_prefixes_share_one_selection():
    """One top-k per Matryoshka level (SL#571)."""
    batch = jnp.asarray(activations(BATCH))
    codes = {}
    for matryoshka in (None, cc.Matryoshka((0.25, 0.5, 1.0))):
        config = recipe(sparsity=BatchTopK(k=2), warmup_steps=0, aux_k=None, matryoshka=matryoshka)
        state, metrics = train_step(init_state(config), batch, config=config)
        codes[matryoshka] = np.asarray(state.tokens_since_fired), float(metrics["loss/reconstruction"])
        assert metrics["l0"] == 2.0
    (alone, loss), (nested, nested_loss) = codes.values()
    np.testing.assert_array_equal(nested, alone)
    assert nested_loss != loss  # the prefixes do take part


# ---- precision and shapes -------------------------------------------------------------------------------


def test_statistics_of_bfloat16_activations_are_summed_in_float64():
    """Running mean and std in bf16: std 0.35 times what it is (DL, DT)."""
    rows = np.random.default_rng(0).normal(40, 1, size=(4000, 11)).astype(ml_dtypes.bfloat16)
    exact = rows.astype(np.float64)
    moments = MomentAccumulator.empty(11)
    for block in np.array_split(rows, 40):
        moments = moments.update(block)
    np.testing.assert_allclose(moments.finalize().mean, exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.finalize().std, exact.std(axis=0), rtol=1e-9)
    statistics = data_statistics(rows, RECIPE)
    norm = np.linalg.norm((exact - exact.mean(axis=0))[:, :6], axis=1).mean()
    np.testing.assert_allclose(statistics.mean, exact.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(statistics.scale[0], np.sqrt(6) / norm, rtol=1e-6)


def test_both_models_read_every_batch_in_one_shape():
    """Different bf16 results for different batch shapes: fix the shape when extracting both models."""
    pytest.importorskip("torch", reason="language models run in torch: install the extra 'lm'")
    from crosscoder_jax.language_models.batches import pad_windows
    from crosscoder_jax.language_models.documents import Window

    for lengths in ([7, 7], [3], [1, 5]):
        windows = [Window(np.arange(n), np.arange(n), 0, 0) for n in lengths]
        ids, mask = pad_windows(windows, batch_size=2, context=7, pad=9)
        assert ids.shape == mask.shape == (2, 7)


# ---- diffing --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diffed(tmp_path_factory):
    """A diff of a crosscoder that reads (base, chat - base), its activations and its code."""
    acts = activations(640, (5, 5), seed=4)
    view = TokenView(write_store(tmp_path_factory.mktemp("traps") / "store", widths=(5, 5), acts=acts))
    base, chat = view.store.sources.entries
    sources = cc.Sources((base, cc.difference(chat, base)))
    crosscoder = random_crosscoder(3, sources=sources, num_latents=8, threshold=60.0)
    result = diff_run(crosscoder, view, DiffConfig(batch_size=128, num_snippet_latents=0))
    own = sources.derive(jnp.asarray(acts), view.store.sources)
    return crosscoder, acts, np.asarray(crosscoder.encode(own)), result


def test_latent_scaling_depends_on_no_batch_and_tells_its_error():
    """Latent Scaling at batch 16, on 100k tokens, without intervals (DT)."""
    crosscoder = diffing_cases.random_crosscoder(threshold=0.5)
    acts = np.asarray(raw_acts(crosscoder, 400))
    documents = np.arange(400) // 4
    results = [latent_scaling(crosscoder, batches_of(acts, documents, size)) for size in (16, 150)]
    np.testing.assert_allclose(results[0].beta, results[1].beta, rtol=1e-4)
    clear = results[0].has_evidence
    assert clear.any()
    assert (results[0].se_beta[..., clear] > 0).all()
    assert (results[0].se_nu_error[clear] > 0).all()


def test_betas_of_a_difference_basis_are_those_of_the_two_models(diffed):
    """Difference-SAE betas from the wrong input (DT)."""
    crosscoder, acts, code, result = diffed
    w_dec, b_dec = (np.asarray(part) for part in crosscoder.raw_decoder())
    # The decoders of base and chat: chat = base + difference.
    carried = np.stack([w_dec[:, :5], w_dec[:, :5] + w_dec[:, 5:]], axis=1)
    bias = np.stack([b_dec[:5], b_dec[:5] + b_dec[5:]])
    reference = np.where(result.columns["delta_norm"] < 0.5, 0, 1)
    expected = oracle_betas(acts.reshape(-1, 2, 5), code, carried, bias, reference)
    for t, target in enumerate(("activation", "activation_no_bias", "reconstruction", "error")):
        for m, source in enumerate(("base", "chat")):
            found = result.columns[f"beta_{target}_{source}"]
            np.testing.assert_allclose(found, expected[t, m], rtol=1e-3, atol=1e-4, err_msg=target)


def test_every_analysis_reads_the_thresholded_code(diffed, tmp_path):
    """Thresholded codes for one method, raw for the other (SA)."""
    crosscoder, acts, code, result = diffed
    fires = (code > 0).sum(axis=0)
    np.testing.assert_array_equal(result.columns["active_tokens"], fires)
    view = TokenView(write_store(tmp_path / "store", widths=(5, 5), acts=acts))
    measured = evaluate(crosscoder, view)
    assert measured["l0_inference_rule"] == pytest.approx(fires.sum() / len(acts), rel=1e-6)
    own = crosscoder.config.sources.derive(jnp.asarray(acts), view.store.sources)
    unthresholded = crosscoder.pre_acts(crosscoder.normalize(own)) > 0
    assert 0.1 * unthresholded.sum() < fires.sum() < 0.8 * unthresholded.sum()


@pytest.mark.parametrize("values", [[5.0, 1.0, 2.0], [1.0, 5.0, 2.0], [2.0, 1.0, 5.0]])
def test_the_largest_of_a_group_wins_wherever_it_stands(values):
    """Group maxima by fancy-index assignment with duplicate indices: the last write wins (SA)."""
    code, same = jnp.array(values)[:, None], jnp.zeros(3, jnp.int32)
    is_valid = jnp.ones(3, bool)
    top = update_top(init_top(1, 2), code, jnp.array([0]), jnp.arange(3), same, is_valid)
    assert top.values.tolist() == [[5.0, 0.0]], "one document: its strongest token alone"
    assert top.tokens.tolist() == [[values.index(5.0), -1]]
    sums = update_activity(init_activity(1, 1), code, same, is_valid)
    assert float(sums.maximum[0]) == 5.0
    assert sums.sums.to_float64()[1, 0, 0] == 8.0, "sums of a group that comes three times"


def test_a_code_times_the_raw_decoder_is_what_it_adds_to_the_activations():
    """Steering vectors in other units than the activations that set their strength (DT)."""
    crosscoder = random_crosscoder(threshold=0.0)
    code = jnp.zeros((1, 16)).at[0, 3].set(2.0)
    added = crosscoder.decode(code) - crosscoder.decode(jnp.zeros((1, 16)))
    np.testing.assert_allclose(added[0], 2.0 * crosscoder.raw_decoder()[0][3], rtol=1e-4, atol=1e-5)


def test_the_l0_penalty_moves_the_thresholds():
    """log-threshold under Adam that cannot move, so the L0 penalty does nothing (SL#718)."""
    penalty = cc.L0Penalty(10.0, target=1.0)
    config = recipe(sparsity=cc.JumpReLU(bandwidth=2.0), l0=penalty, warmup_steps=0, num_steps=100)
    state, acts = init_state(config), jnp.asarray(activations(BATCH))
    l0 = []
    for _ in range(60):
        state, metrics = train_step(state, acts, config=config)
        l0.append(float(metrics["l0"]))
    # Without the penalty: 0.7 of it, and thresholds below zero.
    assert l0[-1] < 0.5 * l0[0]
    assert float(jnp.min(state.crosscoder().latent_threshold[...])) > 0.4, "from 0.1 on"


def test_neither_bos_nor_padding_nor_sinks_are_kept():
    """BOS and first-position sink tokens (100x norm) left in training or in CE evaluation (SL#472, DL#50)."""
    torch = pytest.importorskip("torch", reason="language models run in torch: install the extra 'lm'")
    from crosscoder_jax.language_models.batches import kept_positions, kept_rows
    from crosscoder_jax.language_models.documents import Window

    windows = [Window(np.arange(n), np.arange(n), 0, 0) for n in (5, 3)]
    acts = {name: torch.ones(2, 6, 1) for name in ("base", "chat")}
    acts["chat"][0, 2] = 100.0
    limits = {"base": 10.0, "chat": 10.0}
    expected = [[False, True, False, True, True, False], [False, True, True, False, False, False]]
    # The mask of the harvest is that of the cross-entropy.
    assert kept_positions(acts, windows, 1, limits).tolist() == expected
    assert kept_rows(acts, windows, 1).within(limits).tokens.tolist() == [1, 3, 4, 1, 2]
