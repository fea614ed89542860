"""What a recipe accepts, the law of its rate, and its optimiser against Adam written out."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import recipe

import crosscoder_jax as cc
from crosscoder_jax.configs import config_from_json, config_to_json
from crosscoder_jax.training.config import learning_rate_schedule, make_optimizer
from crosscoder_jax.training.loop import RunOptions


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_steps", 0),
        ("batch_size", -1),
        ("warmup_steps", -1),
        ("warmup_steps", 21),
        ("decay_fraction", 1.5),
        ("decay_fraction", -0.1),
        ("threshold_decay", 1.0),
        ("threshold_decay", -0.5),
        ("clip_norm", 0.0),
        ("learning_rate", 0.0),
        ("learning_rate", -1e-3),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("adam_b1", 1.0),
        ("adam_b2", -0.1),
        ("adam_eps", 0.0),
        ("decoder_norm", 0.0),
    ],
)
def test_values_that_make_no_run_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        recipe(**{field: value})


@pytest.mark.parametrize("field", ["window_tokens", "log_every", "checkpoint_every"])
def test_options_that_make_no_run_are_refused_by_name(field):
    with pytest.raises(ValueError, match=f"{field}=0 must be positive"):
        RunOptions(**{field: 0})


def test_a_dead_latent_needs_a_count_that_the_counter_can_reach():
    with pytest.raises(ValueError, match="dead_after_tokens=2000000000"):
        recipe(aux_k=cc.AuxK(dead_after_tokens=2_000_000_000))


@pytest.mark.parametrize("field", ["warmup_steps", "clip_norm"])
def test_the_limits_themselves_are_accepted(field):
    accepted = {"warmup_steps": 20, "clip_norm": None}[field]
    assert getattr(recipe(num_steps=20, **{field: accepted}), field) == accepted


def test_a_recipe_is_frozen_and_hashable():
    config = recipe()
    assert hash(config) == hash(recipe())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_a_recipe_goes_through_json_unchanged():
    config = recipe(
        sparsity=cc.BatchTopK(2.5, initial_k=8.0, anneal_steps=10),
        loss=cc.SquaredError(),
        l1=cc.L1OfNorms(0.1),
        aux_k=None,
        clip_norm=None,
    )
    again = config_from_json(type(config), json.loads(json.dumps(config_to_json(config))))
    assert again == config


def test_the_rate_rises_stays_and_falls():
    """The law of the golden runs: 10 steps up, constant until 80, down to zero at 120."""
    config = recipe(num_steps=120, warmup_steps=10, decay_fraction=1 / 3, learning_rate=1e-3)
    schedule = learning_rate_schedule(config)
    steps = np.arange(121)
    law = 1e-3 * np.where(steps < 10, steps / 10, np.where(steps < 80, 1.0, (120 - steps) / 40))
    np.testing.assert_allclose([schedule(step) for step in steps], law, rtol=1e-5, atol=1e-12)


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
    config = recipe(warmup_steps=0, clip_norm=clip_norm, adam_eps=1.0, decay_fraction=0.0)
    gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
    # First step: both moments corrected for their start are g and g^2, so the update is g / (|g| + eps).
    for name, value in gradients.items():
        g = np.asarray(value) * factor
        np.testing.assert_allclose(updates[name], -1e-2 * g / (np.abs(g) + 1.0), rtol=1e-5, atol=1e-12)
