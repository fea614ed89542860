"""Measuring and calibrating against NumPy over all held-out tokens at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_cases import MESHES
from training_cases import activations, recipe, to_numpy, write_store

import crosscoder_jax as cc
from crosscoder_jax.activations import Split, TokenView
from crosscoder_jax.metrics import explained_variance
from crosscoder_jax.sharding import Shardings, make_mesh
from crosscoder_jax.training.evaluate import _from_digits, _sum_of_digits, calibrate, evaluate
from crosscoder_jax.training.state import init_state
from crosscoder_jax.training.statistics import data_statistics
from crosscoder_jax.training.step import eval_step, train_step

CONFIG = recipe(num_steps=150, warmup_steps=0)
TRAINING_RULE = {"fve_training_rule", "l0_training_rule"}


@pytest.fixture(scope="module")
def view(tmp_path_factory):
    """1,200 tokens of a store of 1,500, in several ranges."""
    store = write_store(tmp_path_factory.mktemp("evaluate") / "store")
    return TokenView.of_split(store, Split(0.2), held_out=False)


@pytest.fixture(scope="module")
def crosscoder():
    acts = activations(30 * 32, seed=1)
    statistics = data_statistics(acts, CONFIG)
    state = init_state(CONFIG, mean=statistics.mean, scale=statistics.scale, b_dec=statistics.b_dec)
    for batch in acts.reshape(30, 32, -1):
        state, _ = train_step(state, jnp.asarray(batch), config=CONFIG)
    return state.crosscoder()


class Oracle:
    """The whole view at once in float64."""

    def __init__(self, crosscoder, view, sources=None):
        acts = view.read_positions(np.arange(view.num_tokens)).astype(np.float64)
        c = {
            k: np.asarray(getattr(crosscoder, k)[...], np.float64)
            for k in ("w_enc", "b_enc", "w_dec", "b_dec")
        }
        self.sources = crosscoder.config.sources
        scale = np.repeat(np.asarray(crosscoder.scale[...], np.float64), self.sources.widths)
        self.x = (acts - np.asarray(crosscoder.mean[...], np.float64)) * scale
        self.relu = np.maximum(self.x @ c["w_enc"] + c["b_enc"], 0)
        norms = [np.linalg.norm(part, axis=1) for part in self.sources.split(c["w_dec"])]
        self.scores = self.relu * np.sum(norms, axis=0)
        self.c = c

    def metrics(self, kept):
        error = self.x - (self.relu * kept) @ self.c["w_dec"] - self.c["b_dec"]
        deviation = self.x - self.x.mean(axis=0)
        result = {"fve": 1 - np.sum(error**2) / np.sum(deviation**2), "l0": kept.sum() / len(self.x)}
        for name, part in zip(self.sources.names, self.sources.slices(), strict=True):
            result[f"fve/{name}"] = 1 - np.sum(error[:, part] ** 2) / np.sum(deviation[:, part] ** 2)
        frequency = kept.mean(axis=0)
        return result | {"dead": np.mean(frequency == 0), "dense": np.mean(frequency > 0.1)}


def test_the_inference_rule_against_numpy(crosscoder, view):
    oracle, threshold = Oracle(crosscoder, view), float(crosscoder.threshold[...])
    assert np.abs(oracle.scores - threshold).min() > 1e-6, "no score is a rounding away from the threshold"
    expected = oracle.metrics(oracle.scores > threshold)
    measured = evaluate(crosscoder, view, batch_size=64)
    assert measured["num_tokens"] == view.num_tokens
    assert measured["threshold"] == threshold
    assert measured["l0_inference_rule"] == pytest.approx(expected["l0"], rel=1e-12)
    assert measured["dead"] == expected["dead"]
    assert measured["dense"] == expected["dense"]
    assert 0 < measured["dense"] < 1
    for name in ("fve", "fve/base", "fve/chat"):
        # Sums of 64 tokens in float32, 6e-8 each, added in float64.
        assert measured[name] == pytest.approx(expected[name], rel=1e-5), name


def test_the_training_rule_is_batch_top_k_over_each_full_batch(crosscoder, view):
    batch_size = 128
    oracle = Oracle(crosscoder, view)
    num_full = view.num_tokens // batch_size * batch_size
    assert num_full < view.num_tokens, "the last batch is padded"
    kept = np.zeros_like(oracle.scores, bool)
    for start in range(0, num_full, batch_size):
        rows = oracle.scores[start : start + batch_size]
        kept[start : start + batch_size] = rows >= np.sort(rows, axis=None)[-3 * batch_size]
    oracle.x, oracle.relu = oracle.x[:num_full], oracle.relu[:num_full]
    expected = oracle.metrics(kept[:num_full])
    measured = evaluate(crosscoder, view, batch_size=batch_size)
    assert measured["l0_training_rule"] == pytest.approx(3.0, rel=1e-12)
    assert measured["fve_training_rule"] == pytest.approx(expected["fve"], rel=1e-5)


def test_nothing_but_the_training_rule_depends_on_the_batch_size(crosscoder, view):
    first, *others = (evaluate(crosscoder, view, batch_size=size) for size in (64, 100, 5000))
    for other in others:
        for name in set(first) - TRAINING_RULE:
            assert other[name] == pytest.approx(first[name], rel=2e-6), name


@pytest.mark.parametrize("junk", [0.0, 1e6, np.nan, np.inf])
def test_rows_of_padding_are_ignored_whatever_they_hold(crosscoder, junk):
    acts = activations(64, seed=3)
    is_valid = np.arange(64) < 40
    padded = np.where(is_valid[:, None], acts, np.float32(junk))
    ours = to_numpy(eval_step(crosscoder, jnp.asarray(padded), jnp.asarray(is_valid)))
    theirs = to_numpy(eval_step(crosscoder, jnp.asarray(acts[:40]), jnp.ones(40, bool)))
    for name, value in ours.items():
        if "training" in name:
            np.testing.assert_array_equal(value, 0, err_msg="BatchTopK would share out k of the padding")
        else:
            np.testing.assert_allclose(value, theirs[name], rtol=1e-5, atol=1e-4, err_msg=name)


def test_progress_is_told_the_tokens(crosscoder, view):
    told = []
    evaluate(crosscoder, view, batch_size=500, progress=lambda *args: told.append(args))
    assert (
        told == [(min(n, view.num_tokens), view.num_tokens, "tokens") for n in (500, 1000, 1500)][: len(told)]
    )
    assert told[-1][0] == view.num_tokens


def test_progress_of_a_calibration_comes_to_its_end(crosscoder, view):
    told = []
    calibrate(crosscoder, view, progress=lambda *args: told.append(args))
    assert told[-1][0] == told[-1][1]
    assert [t[0] for t in told] == sorted(t[0] for t in told)


def test_calibration_gives_the_k_of_training(crosscoder, view):
    calibrated = calibrate(crosscoder, view, batch_size=256)
    threshold = float(calibrated.threshold[...])
    kept = np.sum(Oracle(crosscoder, view).scores > threshold)
    assert abs(kept - 3.0 * view.num_tokens) <= 1e-3 * 3.0 * view.num_tokens
    # The same count by the package's own inference rule.
    measured = evaluate(calibrated, view, batch_size=256)
    assert measured["l0_inference_rule"] * view.num_tokens == pytest.approx(kept, abs=1)
    assert threshold != float(crosscoder.threshold[...])


def test_calibration_does_not_depend_on_the_batch_size(crosscoder, view):
    first, second = (float(calibrate(crosscoder, view, batch_size=n).threshold[...]) for n in (64, 500))
    assert first == second


def test_calibration_changes_a_copy_and_nothing_but_the_threshold(crosscoder, view):
    before = {
        k: np.array(getattr(crosscoder, k)[...]) for k in ("w_enc", "b_enc", "w_dec", "b_dec", "threshold")
    }
    calibrated = calibrate(crosscoder, view)
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(crosscoder, name)[...], value)
        if name != "threshold":
            np.testing.assert_array_equal(getattr(calibrated, name)[...], value)
    assert calibrated.config == crosscoder.config


def under(crosscoder, **rules):
    """The same weights under other rules."""
    config = dataclasses.replace(CONFIG.crosscoder, **rules)
    l1 = cc.L1OfNorms(0.1) if isinstance(config.sparsity, cc.ReLU) else None
    other = init_state(dataclasses.replace(CONFIG, crosscoder=config, l1=l1)).crosscoder()
    for name in ("w_enc", "b_enc", "w_dec", "b_dec", "mean", "scale"):
        getattr(other, name)[...] = getattr(crosscoder, name)[...]
    return other


@pytest.fixture(scope="module", params=[(2, 4), (8, 1)], ids=str)
def spread(request, crosscoder, tmp_path_factory):
    """A mesh and the crosscoder on it."""
    mesh = make_mesh(*request.param)
    folder = cc.save(crosscoder, tmp_path_factory.mktemp("spread"))
    with jax.set_mesh(mesh):
        return mesh, cc.load(folder, shardings=Shardings.for_mesh(mesh))


@pytest.mark.parametrize("batch_size", [64, 4096])
def test_a_crosscoder_is_measured_on_its_mesh_as_on_one_device(crosscoder, spread, view, batch_size):
    # The view fills no batch of 4,096: the first batch must still be full, for the training rule, and
    # spread evenly, so that it is the largest multiple of the devices.
    mesh, on_mesh = spread
    with jax.set_mesh(mesh):
        ours = evaluate(on_mesh, view, batch_size=batch_size)
    data = mesh.shape["data"]
    theirs = evaluate(crosscoder, view, batch_size=min(batch_size, view.num_tokens // data * data))
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        # Float32 partial sums of a batch in another order; counts of a score within a rounding of a cut.
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_crosscoder_is_calibrated_on_its_mesh_as_on_one_device(crosscoder, spread, view):
    mesh, on_mesh = spread
    with jax.set_mesh(mesh):
        ours = calibrate(on_mesh, view, batch_size=256)
    assert ours.shardings == on_mesh.shardings
    assert ours.w_dec[...].sharding == on_mesh.w_dec[...].sharding
    # Scores differ by a rounding, so the counts between two cuts a hundredth of a percent apart may.
    theirs = calibrate(crosscoder, view, batch_size=256)
    np.testing.assert_allclose(ours.threshold[...], theirs.threshold[...], rtol=1e-3)


@pytest.mark.parametrize("summed", [1, 2, 3, 8, 1023, 1024, 70_000])
def test_counts_of_rows_add_up_to_more_than_an_int32_holds(summed):
    """Dictionaries of 10^7 latents reach 2^31 scores at 215 tokens, all of them above the first cut."""
    rows = np.random.default_rng(summed).integers(2**31, size=summed).astype(np.int32)
    rows[-1] = 2**31 - 1
    for counts in (rows, np.full(summed, 2**31 - 1, np.int32), np.zeros(summed, np.int32)):
        digits = np.asarray(jax.jit(_sum_of_digits)(counts))
        assert digits.dtype == np.int32
        assert _from_digits(digits[None], summed) == sum(counts.tolist())
    if summed > 1:
        assert sum(rows.tolist()) > 2**31


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_counts_of_rows_add_up_on_meshes(shape):
    rows = np.full(64, 2**31 - 5, np.int32)
    with jax.set_mesh(make_mesh(*shape)):
        digits = jax.jit(_sum_of_digits)(jax.device_put(rows, jax.P("data")))
    assert _from_digits(np.asarray(digits)[None], 64) == 64 * (2**31 - 5)


def test_a_batch_that_does_not_spread_over_the_mesh_is_refused(spread, view):
    mesh, on_mesh = spread
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="batch_size=63 must be divisible by the 'data'"):
        evaluate(on_mesh, view, batch_size=63)


def test_each_source_with_its_own_code_is_calibrated_on_its_own(crosscoder, view):
    told = []
    other = under(crosscoder, code_norm=cc.Decoupled())
    calibrated = calibrate(other, view, batch_size=256, progress=lambda *args: told.append(args))
    oracle = Oracle(crosscoder, view)
    norms = [np.linalg.norm(part, axis=1) for part in oracle.sources.split(oracle.c["w_dec"])]
    for threshold, weights in zip(np.asarray(calibrated.threshold[...]), norms, strict=True):
        kept = np.sum(oracle.relu * weights > threshold)
        assert abs(kept - 3.0 * view.num_tokens) <= 1e-3 * 3.0 * view.num_tokens
    measured = evaluate(calibrated, view, batch_size=256)
    assert measured["l0_inference_rule"] == pytest.approx(3.0, rel=1e-3)
    assert measured["threshold/base"] != measured["threshold/chat"]
    assert "threshold" not in measured
    assert told[-1][0] == told[-1][1]
    assert [t[0] for t in told] == sorted(t[0] for t in told)


@pytest.mark.parametrize("k", [0.05, 1.5])
def test_calibration_reaches_fractional_k(crosscoder, view, k):
    other = under(crosscoder, sparsity=cc.BatchTopK(k=k))
    kept = np.sum(Oracle(other, view).scores > float(calibrate(other, view).threshold[...]))
    # 60 activations at k 0.05: none may be missing.
    assert abs(kept - k * view.num_tokens) <= max(1e-3 * k * view.num_tokens, 0.5)


def test_scores_far_from_one_are_calibrated_too(crosscoder, view):
    """Without scaling, scores are in raw units: a million and more in the residuals of some models."""
    large = under(crosscoder, sparsity=cc.BatchTopK(k=3.0))
    for name in ("w_dec", "w_enc", "b_enc"):
        getattr(large, name)[...] = getattr(crosscoder, name)[...] * 1e5
    kept = np.sum(Oracle(large, view).scores > float(calibrate(large, view).threshold[...]))
    assert abs(kept - 3.0 * view.num_tokens) <= 1e-3 * 3.0 * view.num_tokens


def test_a_k_that_cannot_be_reached_is_refused(crosscoder, view):
    other = under(crosscoder, sparsity=cc.BatchTopK(k=15.9))
    reachable = np.mean(np.sum(Oracle(other, view).scores > 0, axis=1))
    with pytest.raises(
        ValueError, match=rf"k=15\.9 cannot be reached: only {reachable:.2f} latents per token"
    ):
        calibrate(other, view)


@pytest.mark.parametrize(
    ("sparsity", "reason"),
    [
        (cc.ReLU(), "its penalty has trained what is active"),
        (cc.TopK(3), "it keeps k of every token"),
    ],
)
def test_what_has_no_threshold_has_nothing_to_calibrate_and_says_why(sparsity, reason, crosscoder, view):
    with pytest.raises(ValueError, match=f"has no threshold to calibrate: {reason}; evaluate the crosscoder"):
        calibrate(under(crosscoder, sparsity=sparsity), view)


def test_relu_is_measured_with_every_positive_latent(crosscoder, view):
    relu = under(crosscoder, sparsity=cc.ReLU())
    relu.threshold[...] = jnp.float32(0)
    oracle = Oracle(relu, view)
    expected = oracle.metrics(oracle.relu > 0)
    measured = evaluate(relu, view, batch_size=view.num_tokens)
    assert measured["l0_inference_rule"] == pytest.approx(expected["l0"], rel=1e-12)
    assert measured["l0_training_rule"] == pytest.approx(expected["l0"], rel=1e-6)
    assert measured["fve"] == pytest.approx(expected["fve"], rel=1e-5)
    assert measured["fve_training_rule"] == pytest.approx(measured["fve"], rel=1e-6)


def test_a_difference_source_is_measured_on_differences(tmp_path):
    """A crosscoder of ``chat - base`` measures the same as one that is given the differences stored."""
    acts = activations(600, (5, 5))
    pair = TokenView(write_store(tmp_path / "pair", widths=(5, 5), acts=acts))
    stored = pair.store.sources.entries
    difference = cc.difference(stored[1], stored[0], name="base")
    plain = TokenView(write_store(tmp_path / "plain", widths=(5,), acts=acts[:, 5:] - acts[:, :5]))
    results = []
    for view, source in ((pair, difference), (plain, cc.Source("base", 5))):
        config = recipe(sources=cc.Sources((source,)))
        crosscoder = init_state(config, scale=np.array([0.3], np.float32)).crosscoder()
        crosscoder.threshold[...] = jnp.float32(0.4)
        results.append((evaluate(crosscoder, view), float(calibrate(crosscoder, view).threshold[...])))
    assert results[0] == results[1]
    assert results[0][0]["fve/base"] == results[0][0]["fve"]
    assert results[0][0]["l0_inference_rule"] > 0.5


def test_predicting_the_mean_of_the_evaluated_tokens_scores_exactly_zero(tmp_path):
    """Integers with an integer mean: no rounding anywhere, whatever the batches are."""
    rng = np.random.default_rng(0)
    mean = np.array([90, -20, 3, 7, 0, 1, 2, 300, -5, 6, 4])
    half = mean + rng.integers(-8, 9, size=(50, 11))
    acts = np.float32(np.concatenate([half, 2 * mean - half]))
    view = TokenView(write_store(tmp_path / "store", acts=acts))
    crosscoder = init_state(CONFIG).crosscoder()
    crosscoder.b_dec[...] = jnp.asarray(mean, jnp.float32)
    crosscoder.threshold[...] = jnp.float32(1e9)
    for batch_size in (100, 32):
        measured = evaluate(crosscoder, view, batch_size=batch_size)
        assert [measured[name] for name in ("fve", "fve/base", "fve/chat")] == [0, 0, 0]


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_eight_devices_measure_what_one_does(shape):
    acts = activations(64, seed=3)
    is_valid = np.arange(64) < 60

    def measure(mesh):
        layout = Shardings.for_mesh(mesh)
        state = init_state(CONFIG, b_dec=acts.mean(axis=0), shardings=layout)
        crosscoder = state.crosscoder()
        crosscoder.threshold[...] = jnp.float32(8)
        put = (lambda x, place: jnp.asarray(x)) if mesh is None else jax.device_put
        sums = eval_step(crosscoder, put(acts, layout.acts_bw), put(is_valid, layout.per_batch_b))
        return jax.tree.map(lambda value: np.asarray(value, np.float64), sums)

    alone = measure(None)
    mesh = make_mesh(*shape)
    with jax.set_mesh(mesh):
        sharded = measure(mesh)
    assert 0.1 * 60 * 16 < alone.active_inference < 0.9 * 60 * 16
    np.testing.assert_array_equal(sharded.fired, alone.fired)
    assert sharded.active_inference == alone.active_inference
    ours, theirs = (
        explained_variance(sums.inference, CONFIG.crosscoder.sources) for sums in (sharded, alone)
    )
    for name, value in theirs.items():
        # Float32 sums of 60 tokens in another order, each term rounded by 6e-8 of itself.
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, err_msg=name)
