"""Gradients from what BatchTopK keeps alone, next to those of the dense code."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import activations, recipe

import crosscoder_jax as cc
from crosscoder_jax.kernels import native
from crosscoder_jax.training.config import TrainConfig
from crosscoder_jax.training.gradients import _gradients_at_once
from crosscoder_jax.training.kept import can_be_listed, gradients_of_kept
from crosscoder_jax.training.state import init_state
from crosscoder_jax.training.step import train_step

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"not compiled: {native.missing()}")

WIDTHS, BATCH = (6, 6), 64
SOURCES = cc.Sources((cc.Source("base", 6), cc.Source("chat", 6)))
PLAIN = recipe(
    widths=WIDTHS, num_latents=48, sparsity=cc.BatchTopK(k=2.0), num_steps=6, batch_size=BATCH, warmup_steps=1
)


def with_(config, **changes):
    of_crosscoder = {
        name: changes.pop(name) for name in ("groups", "sparsity", "code_norm") if name in changes
    }
    crosscoder = dataclasses.replace(config.crosscoder, **of_crosscoder)
    return dataclasses.replace(config, crosscoder=crosscoder, **changes)


CASES: dict[str, TrainConfig] = {
    "plain": with_(PLAIN, aux_k=None),
    "dead latents": with_(PLAIN, aux_k=cc.AuxK(0.5, k_aux=4, dead_after_tokens=BATCH)),
    "error norm": with_(PLAIN, loss=cc.ErrorNorm()),
    "squared error": with_(PLAIN, loss=cc.SquaredError((1.0, 0.5))),
    "annealed": with_(PLAIN, sparsity=cc.BatchTopK(k=1.0, initial_k=5.0, anneal_steps=4)),
    "other code norm": with_(PLAIN, code_norm=cc.NormOfConcatenation()),
    "groups": with_(PLAIN, groups=(*cc.exclusive_groups(SOURCES, 0.25), cc.LatentGroup("s", 0.25, cost=0.5))),
}


def state_and_batch(config):
    """A state in the middle of training, as far as the gradients know, and a batch."""
    state = init_state(config)
    silent = np.random.default_rng(0).integers(0, 2 * BATCH, config.crosscoder.num_latents)
    state = dataclasses.replace(
        state, step=state.step + 2, tokens_since_fired=jnp.asarray(silent, state.tokens_since_fired.dtype)
    )
    return state, state.crosscoder().normalize(jnp.asarray(activations(BATCH, WIDTHS)))


@pytest.mark.parametrize("name", CASES)
def test_the_gradients_are_those_of_the_dense_code(name):
    """To the rounding of sums of at most 64 products: 64 x 6e-8 of the largest."""
    config = CASES[name]
    assert can_be_listed(config)
    state, normalized = state_and_batch(config)
    ours, theirs = (
        jax.jit(functools.partial(function, config=config))(state, normalized)
        for function in (gradients_of_kept, _gradients_at_once)
    )
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert ours[1].smallest_score == theirs[1].smallest_score
    assert ours[1].l0 == theirs[1].l0 > 0
    assert (ours[1].parts.get("loss/aux_k", 0) > 0) == (name == "dead latents")
    np.testing.assert_array_equal(ours[1].tokens_since_fired, theirs[1].tokens_since_fired)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=4e-6 * max(1e-3, np.max(np.abs(other))))


def test_the_step_makes_no_dense_code():
    """After the selection nothing but AuxK has an array of ``[batch, latent]``: the one product of the step
    that does is the encoder's."""
    config = CASES["plain"]
    state = init_state(config)
    lowered = train_step.lower(state, jnp.asarray(activations(BATCH, WIDTHS)), config=config)
    text = lowered.as_text()
    assert text.count("stablehlo.dot_general") == 1
    for name in ("compress", "decode", "value_gradient", "decoder_gradient", "encoder_gradient"):
        assert f"@crosscoder_{name}" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"sparsity": cc.TopK(k=2)},
        {"code_norm": cc.Decoupled()},
        {"matryoshka": cc.Matryoshka((0.5, 1.0))},
        {"groups": (cc.LatentGroup("own", 0.5, k=1.0),)},
        {"pre_acts": "bfloat16"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_recipes_are_left_to_the_dense_code(changes):
    assert not can_be_listed(with_(PLAIN, **changes))
