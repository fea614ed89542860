"""What a recipe accepts, and how it is written down."""

import dataclasses
import json

import pytest
from training_cases import recipe

import crosscoder_jax as cc
from crosscoder_jax.configs import config_from_json, config_to_json
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
        ("clip_norm", 0.0),
        ("learning_rate", 0.0),
        ("learning_rate", -1e-3),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
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


@pytest.mark.parametrize("weights", [(1.0,), (1.0, -1.0), (0.0, 0.0)])
def test_weights_of_sources_must_fit_the_sources(weights):
    with pytest.raises(ValueError, match=r"source_weights=.* must be one for each of the sources"):
        recipe(loss=cc.MeanSquaredError(weights))


def test_a_delta_loss_needs_sources_to_take_a_difference_of():
    delta = cc.DeltaLoss(1.0, "base", "chat")
    with pytest.raises(ValueError, match="needs two sources of one width, not 'base' of width 6 and 'chat'"):
        recipe(delta=delta)
    assert recipe(widths=(6, 6), delta=delta).delta == delta


def test_a_dead_latent_needs_a_count_that_the_counter_can_reach():
    with pytest.raises(ValueError, match="dead_after_tokens=2000000000"):
        recipe(aux_k=cc.AuxK(dead_after_tokens=2_000_000_000))


@pytest.mark.parametrize("field", ["warmup_steps", "clip_norm"])
def test_the_limits_themselves_are_accepted(field):
    accepted = {"warmup_steps": 20, "clip_norm": None}[field]
    assert getattr(recipe(num_steps=20, **{field: accepted}), field) == accepted


@pytest.mark.parametrize(
    ("sparsity", "l1"), [(cc.ReLU(), None), (cc.Gated(), None), (cc.BatchTopK(k=3), cc.L1OfNorms(0.1))]
)
def test_a_penalty_on_the_norms_goes_with_relu_and_with_nothing_else(sparsity, l1):
    with pytest.raises(ValueError, match=r"sparsity=.* and l1=.* do not go together: ReLU and Gated"):
        recipe(sparsity=sparsity, l1=l1)
    assert recipe(sparsity=sparsity, l1=None if l1 else cc.L1OfNorms(0.1)).num_steps == 20


@pytest.mark.parametrize("sparsity", [cc.BatchTopK(k=17.0), cc.TopK(k=17)])
def test_more_active_latents_than_there_are_are_refused(sparsity):
    with pytest.raises(
        ValueError, match=r"k=17\S* active latents per token are more than num_latents=16: take"
    ):
        recipe(num_latents=16, sparsity=sparsity)
    assert recipe(num_latents=17, sparsity=sparsity).crosscoder.sparsity == sparsity


def test_more_active_latents_than_there_are_are_no_target_of_thresholds():
    with pytest.raises(ValueError, match=r"k=17.0 active latents per token are more than num_latents=16"):
        recipe(num_latents=16, sparsity=cc.JumpReLU(), l0=cc.L0Penalty(1.0, target=17.0))


def test_a_budget_is_of_no_more_latents_than_are_ranked_for_it():
    """Half of 16 latents have a budget of their own; the other 8 are ranked for the sparsity's k."""

    def parted(own, k):
        group = cc.LatentGroup("own", 0.5, k=own)
        return recipe(num_latents=16, sparsity=cc.BatchTopK(k), groups=(group,))

    assert parted(8.0, 8.0).crosscoder.sparsity == cc.BatchTopK(8.0)
    with pytest.raises(ValueError, match=r"k=8.5 of group 'own' is more than its 8 latents: take fewer"):
        parted(8.5, 8.0)
    with pytest.raises(
        ValueError, match=r"k=8.5 active .* are more than the 8 latents of num_latents=16 that"
    ):
        parted(8.0, 8.5)
    # With budgets for all of them the sparsity's own k is of no latent.
    everything = (cc.LatentGroup("a", 0.5, k=1.0), cc.LatentGroup("b", 0.5, k=1.0))
    assert recipe(num_latents=16, sparsity=cc.BatchTopK(20.0), groups=everything).crosscoder.groups


def test_a_recipe_is_frozen_and_hashable():
    config = recipe()
    assert hash(config) == hash(recipe())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_the_data_is_in_the_order_of_the_seed_unless_it_has_its_own():
    assert recipe(seed=3).order_seed == 3
    assert recipe(seed=3, data_seed=0).order_seed == 0


def test_recipes_of_all_seeds_compile_to_one():
    assert recipe(seed=3, data_seed=7).without_seeds() == recipe(seed=4).without_seeds() == recipe()
    assert recipe(seed=3, num_steps=21).without_seeds() != recipe()


def test_a_recipe_goes_through_json_unchanged():
    config = recipe(
        sparsity=cc.BatchTopK(2.5, initial_k=8.0, anneal_steps=10),
        loss=cc.SquaredError(),
        aux_k=None,
        clip_norm=None,
        data_seed=2,
        widths=(6, 6),
        delta=cc.DeltaLoss(2.0, "chat", "base"),
    )
    again = config_from_json(type(config), json.loads(json.dumps(config_to_json(config))))
    assert again == config
