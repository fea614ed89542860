"""The law of the learning rate, and the optimiser against Adam written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_cases import recipe

from crosscoder_jax.training.adam import Adam
from crosscoder_jax.training.optimizer import (
    clip_by_global_norm,
    learning_rate_schedule,
    make_optimizer,
)


def test_the_rate_rises_stays_and_falls():
    """The law of the golden runs: 10 steps up, constant until 80, down to zero at 120."""
    config = recipe(num_steps=120, warmup_steps=10, decay_fraction=1 / 3, learning_rate=1e-3)
    schedule = learning_rate_schedule(config)
    steps = np.arange(121)
    law = 1e-3 * np.where(steps < 10, steps / 10, np.where(steps < 80, 1.0, (120 - steps) / 40))
    np.testing.assert_allclose([schedule(step) for step in range(121)], law, rtol=3e-7, atol=1e-12)


def test_the_first_rate_is_zero_with_a_warm_up_and_full_without():
    assert float(learning_rate_schedule(recipe(warmup_steps=5))(0)) == 0
    assert float(learning_rate_schedule(recipe(warmup_steps=0))(0)) == pytest.approx(1e-2)


def test_the_last_step_still_moves():
    config = recipe(num_steps=10, warmup_steps=0, decay_fraction=0.5)
    assert float(learning_rate_schedule(config)(9)) == pytest.approx(1e-2 / 5)


def test_a_decay_longer_than_what_the_warm_up_leaves_is_shortened():
    schedule = learning_rate_schedule(recipe(num_steps=10, warmup_steps=8, decay_fraction=1.0))
    np.testing.assert_allclose([schedule(s) for s in (7, 8, 9, 10)], [0.00875, 0.01, 0.005, 0.0], atol=1e-9)


@pytest.mark.parametrize(("clip_norm", "factor"), [(None, 1.0), (0.5, 0.1), (5.0, 1.0), (100.0, 1.0)])
def test_the_optimiser_clips_by_the_global_norm_then_applies_adam(clip_norm, factor):
    """The gradients have the global norm 5 = sqrt(3^2 + 4^2): a clip to 0.5 multiplies them by 0.1."""
    config = recipe(warmup_steps=0, clip_norm=clip_norm, optimizer=Adam(eps=1.0), decay_fraction=0.0)
    gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
    # First step: both moments corrected for their start are g and g^2, so the update is g / (|g| + eps).
    for name, value in gradients.items():
        g = np.asarray(value) * factor
        np.testing.assert_allclose(updates[name], -1e-2 * g / (np.abs(g) + 1.0), rtol=1e-5, atol=1e-12)


def test_the_clip_adds_a_millionth_to_the_norm():
    clip = clip_by_global_norm(1.0)
    for length, expected in ((1.0, 1 - 1e-6), (5.0, 1 - 2e-7), (0.5, 0.5), (3e-6, 3e-6)):
        clipped, _ = clip.update({"a": jnp.array([length])}, clip.init({}))
        np.testing.assert_allclose(clipped["a"], expected, rtol=1.2e-7)
    zero, _ = clip.update({"a": jnp.zeros(2)}, clip.init({}))
    assert not zero["a"].any()


def adam_by_hand(gradients, b1, b2, eps):
    """The last update, in float64."""
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        update = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
    return update


def updates_of(adam, gradients):
    step, state = jax.jit(adam.update), adam.init(jnp.zeros_like(gradients[0]))
    for gradient in gradients:
        update, state = step(gradient, state)
    return np.asarray(update, np.float64)


@pytest.mark.parametrize("num_steps", [1, 2, 30])
@pytest.mark.parametrize("decays", [(0.9, 0.999), (0.9, 0.99999), (0.0, 0.5)])
def test_adam_is_exact_to_the_rounding_of_its_moments(num_steps, decays):
    gradients = np.random.default_rng(0).normal(size=(num_steps, 50)).astype(np.float32)
    expected = adam_by_hand(gradients.astype(np.float64), *decays, 1e-8)
    found = updates_of(Adam(*decays).transformation(), jnp.asarray(gradients))
    # Each of the roundings of a moment, 6e-8, counts for about ten steps, and moments may cancel.
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    theirs = updates_of(optax.scale_by_adam(*decays, 1e-8), jnp.asarray(gradients))
    np.testing.assert_allclose(found, theirs, rtol=5e-3, atol=1e-6)


def test_no_bias_correction_is_rounded_to_one_side():
    """Of equal gradients every update is 1, however far Adam has come."""
    for num_steps in (1, 10, 100):
        found = updates_of(Adam(eps=1e-12).transformation(), jnp.full((num_steps, 1), 0.3))
        np.testing.assert_allclose(found, 1.0, rtol=1e-6)


def test_in_float64_rates_and_updates_are_exact():
    with jax.enable_x64():
        config = recipe(num_steps=120, warmup_steps=7, decay_fraction=1 / 3, dtype="float64")
        rates = [float(learning_rate_schedule(config)(step)) for step in (3, 50, 97)]
        np.testing.assert_allclose(rates, [1e-2 * 3 / 7, 1e-2, 1e-2 * 23 / 40], rtol=1e-15)
        gradients = np.random.default_rng(0).normal(size=(20, 50))
        found = updates_of(Adam().transformation(), jnp.asarray(gradients))
    np.testing.assert_allclose(found, adam_by_hand(gradients, 0.9, 0.999, 1e-8), rtol=1e-12)
