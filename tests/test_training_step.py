"""The step against a NumPy oracle with gradients by hand, and its counters and statistics."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import NUM_LATENTS, activations, recipe, to_numpy, weights
from training_oracle import Oracle

import crosscoder_jax as cc
from crosscoder_jax.training.config import TOKENS_CAP
from crosscoder_jax.training.optimizer import learning_rate_schedule
from crosscoder_jax.training.state import init_state
from crosscoder_jax.training.step import eval_step, train_step

BATCH = 32
NAMES = ("w_enc", "b_enc", "w_dec", "b_dec")


def batches(num_steps, batch=BATCH, seed=0):
    """Batches in about normalised units."""
    acts = activations(num_steps * batch, seed=seed) / 3.0
    return acts.reshape(num_steps, batch, -1)


AUX = {"num_latents": 40, "sparsity": cc.BatchTopK(k=1.0), "warmup_steps": 0}
"""With 40 latents and k 1 some are silent in every batch, and dead at once."""

RECIPES = {
    "norm": recipe(num_steps=6, warmup_steps=2, decay_fraction=0.5, aux_k=None),
    "squared, not clipped": recipe(num_steps=6, loss=cc.SquaredError(), clip_norm=None, aux_k=None),
    "fractional k, always clipped, other Adam": recipe(
        num_steps=6,
        warmup_steps=1,
        sparsity=cc.BatchTopK(k=1.7),
        clip_norm=1e-3,
        optimizer=cc.Adam(b1=0.5, b2=0.9, eps=1e-6),
        aux_k=None,
    ),
    "L1": recipe(
        num_steps=6,
        warmup_steps=1,
        sparsity=cc.ReLU(),
        l1=cc.L1OfNorms(0.05, warmup_steps=3),
        aux_k=None,
        decoder_norm=0.3,
    ),
    "AuxK all dead fit": recipe(num_steps=6, aux_k=cc.AuxK(0.5, k_aux=40, dead_after_tokens=BATCH), **AUX),
    "AuxK ranked": recipe(num_steps=6, aux_k=cc.AuxK(0.5, k_aux=2, dead_after_tokens=BATCH), **AUX),
    "mixed norms": recipe(num_steps=6, warmup_steps=0, code_norm=cc.MixedNorms(), aux_k=None),
    "a code for each source": recipe(num_steps=6, warmup_steps=0, code_norm=cc.Decoupled(), aux_k=None),
    "a code for each source, AuxK ranked": recipe(
        num_steps=6, code_norm=cc.Decoupled(), aux_k=cc.AuxK(0.5, k_aux=2, dead_after_tokens=BATCH), **AUX
    ),
}

BASE = recipe(num_steps=150, warmup_steps=0)
"""What most tests use, so that it is compiled once."""
SPARSE = recipe(num_latents=40, sparsity=cc.BatchTopK(k=0.5), warmup_steps=0, aux_k=None)
"""A recipe under which many latents are silent in a batch."""


@pytest.mark.parametrize("name", ["norm", "L1", "AuxK ranked", "a code for each source, AuxK ranked"])
def test_six_steps_in_float64_are_the_oracle_s(name):
    config = RECIPES[name]
    config = dataclasses.replace(config, crosscoder=dataclasses.replace(config.crosscoder, dtype="float64"))
    with jax.enable_x64():
        state = init_state(config)
        oracle = Oracle(config, weights(state))
        for t, batch in enumerate(batches(6)):
            state, metrics = train_step(state, jnp.asarray(batch), config=config)
            expected = oracle.step(batch)
            for key in ("loss", "grad_norm", "lr", "loss/reconstruction", "loss/l1", "loss/aux_k"):
                if key in metrics:
                    assert metrics[key].dtype == np.float64
                    np.testing.assert_allclose(metrics[key], expected[key], rtol=1e-12, err_msg=f"{t} {key}")
        for tensor, value in weights(state).items():
            assert value.dtype == np.float64
            np.testing.assert_allclose(value, oracle.p[tensor], rtol=0, atol=1e-13, err_msg=tensor)
        assert state.threshold.dtype == np.float32


@pytest.mark.parametrize("name", RECIPES)
def test_six_steps_equal_the_oracle(name):
    config = RECIPES[name]
    state = init_state(config)
    oracle = Oracle(config, weights(state))
    for t, batch in enumerate(batches(6)):
        state, metrics = train_step(state, jnp.asarray(batch), config=config)
        expected = oracle.step(batch)
        # Sums of a few hundred float32 terms, each rounded by 6e-8: 1e-5 leaves a wide margin.
        for key in ("loss", "grad_norm", "lr", "loss/reconstruction"):
            np.testing.assert_allclose(
                metrics[key], expected[key], rtol=2e-5, atol=1e-9, err_msg=f"{t} {key}"
            )
        for key in ("loss/l1", "loss/aux_k"):
            if key in metrics:
                np.testing.assert_allclose(metrics[key], expected[key], rtol=5e-5, atol=1e-9)
        assert float(metrics["l0"]) == expected["kept"].sum() / BATCH / len(expected["kept"])
        np.testing.assert_array_equal(state.tokens_since_fired, oracle.since_fired)
        if "AuxK" in name:
            assert expected["loss/aux_k"] > 0
            assert (oracle.since_fired >= BATCH).sum() > 2
        # Adam divides the moments: an update is off by the gradient's relative error times the rate,
        # 1e-2; entries whose gradient nearly cancels are off by more, hence not 1e-7.
        for key in NAMES:
            np.testing.assert_allclose(
                weights(state)[key], oracle.p[key], rtol=0, atol=2e-5, err_msg=f"step {t} {key}"
            )


def test_the_step_is_in_normalised_units():
    """Raw activations with a normaliser give what normalised ones give without."""
    config = BASE
    raw = activations(4 * BATCH).reshape(4, BATCH, -1)
    mean, scale = np.arange(11, dtype=np.float32) / 4, np.array([0.5, 0.25], np.float32)
    normalized = (raw - mean) * np.repeat(scale, (6, 5))
    with_normaliser, without = init_state(config, mean=mean, scale=scale), init_state(config)
    for acts, other in zip(raw, normalized, strict=True):
        with_normaliser, ours = train_step(with_normaliser, jnp.asarray(acts), config=config)
        without, theirs = train_step(without, jnp.asarray(other), config=config)
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-6)
    # Powers of two scale exactly, so nothing but the subtraction rounds.
    for name in NAMES:
        np.testing.assert_allclose(weights(with_normaliser)[name], weights(without)[name], atol=2e-6)


def test_the_loss_goes_down():
    config = BASE
    state = init_state(config)
    losses, explained = [], []
    for batch in batches(150):
        state, metrics = train_step(state, jnp.asarray(batch), config=config)
        losses.append(float(metrics["loss"]))
        explained.append(float(metrics["fve"]))
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    assert np.mean(explained[-10:]) > 0.8


def test_metrics_are_those_of_the_batch_before_the_update():
    config = BASE
    state = init_state(config)
    before, batch = init_state(config).crosscoder(), batches(1)[0]
    _, metrics = train_step(state, jnp.asarray(batch), config=config)
    code = config.crosscoder.sparsity(before.pre_acts(jnp.asarray(batch)), before.score_weights()).code
    error = batch - np.asarray(before.decode_normalized(code))
    for name, part in zip(("base", "chat"), (slice(0, 6), slice(6, 11)), strict=True):
        variance = np.sum((batch[:, part] - batch[:, part].mean(axis=0)) ** 2)
        expected = 1 - np.sum(error[:, part] ** 2) / variance
        np.testing.assert_allclose(metrics[f"fve/{name}"], expected, rtol=1e-4, atol=1e-5)
    pooled = 1 - np.sum(error**2) / np.sum((batch - batch.mean(axis=0)) ** 2)
    np.testing.assert_allclose(metrics["fve"], pooled, rtol=1e-4, atol=1e-5)


def test_the_threshold_is_a_bias_corrected_mean_of_the_smallest_kept_scores():
    config, decay = BASE, 0.99
    state = init_state(config)
    assert float(state.threshold) == 0
    smallest = []
    for batch in batches(5):
        crosscoder = state.crosscoder()
        scores = np.maximum(np.asarray(crosscoder.pre_acts(jnp.asarray(batch))), 0) * np.asarray(
            crosscoder.score_weights()
        )
        smallest.append(np.sort(scores, axis=None)[-3 * BATCH])
        state, metrics = train_step(state, jnp.asarray(batch), config=config)
        powers = decay ** np.arange(len(smallest))[::-1]
        # A weighted mean with weights that sum to one, so that the first value counts in full.
        expected = np.sum(powers * smallest) / np.sum(powers)
        np.testing.assert_allclose(state.threshold, expected, rtol=1e-6)
        np.testing.assert_allclose(metrics["threshold"], state.threshold, rtol=1e-6)
    assert len({round(float(s), 4) for s in smallest}) == 5
    assert float(state.crosscoder().threshold[...]) == float(state.threshold)


def test_each_source_with_its_own_code_has_its_own_threshold():
    config = recipe(threshold=cc.CorrectedThreshold(0.0), code_norm=cc.Decoupled())
    state = init_state(config)
    oracle = Oracle(config, weights(state))
    batch = batches(1)[0]
    scores = np.maximum(batch @ oracle.p["w_enc"] + oracle.p["b_enc"], 0) * oracle.weights()[:, None]
    smallest = np.sort(scores.reshape(2, -1), axis=1)[:, -3 * BATCH]
    state, metrics = train_step(state, jnp.asarray(batch), config=config)
    np.testing.assert_allclose(state.threshold, smallest, rtol=1e-5)
    np.testing.assert_allclose([metrics["threshold/base"], metrics["threshold/chat"]], smallest, rtol=1e-5)
    # The mean over the sources, each of which keeps 3 latents per token.
    measured = eval_step(init_state(config).crosscoder(), jnp.asarray(batch), jnp.ones(BATCH, bool))
    assert measured.active_training == 3 * BATCH


def test_a_batch_that_keeps_nothing_leaves_the_threshold_as_it_is():
    config = BASE
    state, _ = train_step(init_state(config), jnp.asarray(batches(1)[0]), config=config)
    threshold = float(state.threshold)
    # Tokens at the encoder's blind spot: with all activations zero no latent has a positive score.
    crosscoder = state.crosscoder()
    b_enc = -jnp.abs(crosscoder.b_enc[...]) - 1
    state = _with(state, b_enc=b_enc)
    state, metrics = train_step(state, jnp.zeros((BATCH, 11)), config=config)
    assert float(metrics["l0"]) == 0
    assert float(state.threshold) == threshold > 0


def _with(state, **values):
    for name, value in values.items():
        state.params[name] = state.params[name].replace(value)
    return state


def test_dead_counters_are_in_tokens_and_exact():
    config = SPARSE
    state = init_state(config)
    expected = np.zeros(40, np.int64)
    # Batches of two sizes: the counter is in tokens, not in steps.
    sizes = (32, 48, 32, 32)
    acts = activations(sum(sizes)) / 3.0
    for start, size in zip(np.cumsum((0, *sizes[:-1])), sizes, strict=True):
        batch = acts[start : start + size]
        crosscoder = state.crosscoder()
        code = config.crosscoder.sparsity(
            crosscoder.pre_acts(jnp.asarray(batch)), crosscoder.score_weights()
        ).code
        expected = np.where((np.asarray(code) > 0).any(axis=0), 0, expected + size)
        state, _ = train_step(state, jnp.asarray(batch), config=config)
        np.testing.assert_array_equal(state.tokens_since_fired, expected)
    assert state.tokens_since_fired.dtype == jnp.int32
    assert 0 < (expected == sum(sizes)).sum() < 40


def test_dead_counters_stop_before_they_overflow():
    config = SPARSE
    state = init_state(config)
    state = dataclasses.replace(state, tokens_since_fired=jnp.full(40, TOKENS_CAP - 5, jnp.int32))
    for batch in batches(3):
        state, metrics = train_step(state, jnp.asarray(batch), config=config)
    values = set(np.asarray(state.tokens_since_fired).tolist())
    assert TOKENS_CAP in values
    assert min(values) >= 0
    assert max(values) == TOKENS_CAP
    assert 0 < float(metrics["dead"]) < 1


def test_measuring_gives_no_state_back():
    """``eval_step`` is given the crosscoder alone and returns sums: nothing of a run is in its reach."""
    assert list(inspect.signature(eval_step).parameters) == ["crosscoder", "acts", "is_valid"]
    config = BASE
    state = init_state(config)
    before = to_numpy(state)
    crosscoder = state.crosscoder()
    measured = eval_step(crosscoder, jnp.asarray(batches(1)[0]), jnp.ones(BATCH, bool))
    assert set(measured._fields) == {"inference", "training", "active_inference", "active_training", "fired"}
    for name, value in to_numpy(state).items():
        np.testing.assert_array_equal(value, before[name])


def test_the_next_step_does_not_depend_on_measuring_in_between():
    config = BASE
    results = []
    for is_measured in (False, True):
        state = init_state(config)
        for batch in batches(3):
            state, _ = train_step(state, jnp.asarray(batch), config=config)
            if is_measured:
                eval_step(state.crosscoder(), jnp.asarray(batch), jnp.ones(BATCH, bool))
        results.append(to_numpy(state))
    for name, value in results[0].items():
        np.testing.assert_array_equal(value, results[1][name])


@pytest.mark.parametrize(
    ("bad", "named"),
    [("batch", "is_finite/batch"), ("weights", "is_finite/loss")],
)
def test_what_is_not_finite_is_named(bad, named):
    config = BASE
    state, batch = init_state(config), batches(1)[0]
    if bad == "batch":
        batch = batch.copy()
        batch[5, 3] = np.nan
    else:
        state = _with(state, w_dec=jnp.full((NUM_LATENTS, 11), jnp.inf))
    _, metrics = train_step(state, jnp.asarray(batch), config=config)
    assert not metrics[named]
    assert bool(metrics["is_finite/batch"]) == (bad != "batch")


def test_an_update_that_is_not_finite_is_named_in_its_own_step():
    """The loss and the gradients are fine, the weights after them are not: nobody may save these."""
    state = init_state(BASE)
    full = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.inf) if jnp.issubdtype(x.dtype, jnp.floating) else x, state.opt_state
    )
    state = dataclasses.replace(state, opt_state=full)
    _, metrics = train_step(state, jnp.asarray(batches(1)[0]), config=BASE)
    wrong = {name for name, value in metrics.items() if name.startswith("is_finite/") and not value}
    assert wrong == {f"is_finite/{name} after the update" for name in NAMES}


def test_finite_steps_report_everything_finite():
    config = BASE
    _, metrics = train_step(init_state(config), jnp.asarray(batches(1)[0]), config=config)
    flags = {name: bool(value) for name, value in metrics.items() if name.startswith("is_finite/")}
    assert all(flags.values())
    assert set(NAMES) == {n.split()[-1] for n in flags if "gradient" in n}


BF16 = recipe(dtype="bfloat16", num_steps=150, warmup_steps=0)


def test_bfloat16_compute_keeps_float32_masters_and_moments():
    config = BF16
    state = init_state(config)
    losses = []
    for batch in batches(150):
        state, metrics = train_step(state, jnp.asarray(batch), config=config)
        losses.append(float(metrics["loss"]))
    floats = {str(leaf.dtype) for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert floats == {"float32"}
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    # The masters hold values that bf16 cannot.
    changed = weights(state)["w_dec"]
    assert np.mean(changed == changed.astype(jnp.bfloat16).astype(np.float32)) < 0.05


def test_bfloat16_products_accumulate_in_float32():
    hlo = train_step.lower(init_state(BF16), jnp.asarray(batches(1)[0]), config=BF16).as_text()
    products = [line.split(" : ")[1] for line in hlo.splitlines() if "dot_general" in line]
    assert sum(product.count("xbf16>") == 2 for product in products) >= 2, "encoder and decoder"
    assert all("xf32>" in product.split("->")[1] for product in products)


@pytest.mark.parametrize(
    ("steps", "warmup", "fraction"),
    [(20, 3, 0.2), (10, 0, 0.5), (10, 10, 0.2), (10, 4, 1.0), (7, 2, 0.0), (1, 0, 0.2)],
)
def test_the_rate_the_step_uses_is_the_schedule(steps, warmup, fraction):
    config = recipe(num_steps=steps, warmup_steps=warmup, decay_fraction=fraction)
    oracle = Oracle(config, {})
    for oracle.t in range(steps):
        np.testing.assert_allclose(learning_rate_schedule(config)(oracle.t), oracle.rate(), rtol=1e-6)


def test_a_step_moves_weights_by_the_rate_of_its_own_number():
    """Adam's first update has size lr for every entry, so the weights show which rate was used."""
    for config, expected in ((BASE, 1e-2), (RECIPES["norm"], 0.0)):
        state = init_state(config)
        before = weights(state)["b_dec"]
        state, metrics = train_step(state, jnp.asarray(batches(1)[0]), config=config)
        np.testing.assert_allclose(np.abs(weights(state)["b_dec"] - before), expected, rtol=1e-4)
        np.testing.assert_allclose(metrics["lr"], expected)
