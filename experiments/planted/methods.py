"""The recipes that are compared, at one size, one number of tokens and one L0."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import crosscoder_jax as cc
from crosscoder_jax.training.config import TrainConfig
from experiments.planted.world import World

BATCH_SIZE = 512
"""Small batches: for a given number of tokens, more steps."""

METHODS = ("L1", "TopK", "BatchTopK", "JumpReLU")

ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "initial decoder norm 1": {"decoder_norm": 1.0},
    "batches of 2,048": {"batch_size": 2048},
    "error norm as loss": {"loss": cc.ErrorNorm()},
    "without AuxK": {"aux_k": None},
    "rate 1e-4": {"learning_rate": 1e-4},
}
"""What is changed in the BatchTopK recipe, one thing at a time; the tokens stay the same."""


def recipe(method: str, world: World, *, num_latents: int, num_tokens: int) -> TrainConfig:
    """Return the recipe of a method for an L0 of the world's; that of L1 follows from its weight."""
    k = world.mean_l0
    num_steps = num_tokens // BATCH_SIZE
    warmup_steps = num_steps // 20
    shared = TrainConfig(
        crosscoder=cc.CrosscoderConfig(world.sources, num_latents, sparsity=cc.BatchTopK(k)),
        num_steps=num_steps,
        batch_size=BATCH_SIZE,
        learning_rate=1e-3,
        warmup_steps=warmup_steps,
        decoder_norm=0.1,
        loss=cc.MeanSquaredError(),
        aux_k=cc.AuxK(dead_after_tokens=50_000),
    )
    sparsity, changes = {
        "L1": (
            cc.ReLU(),
            {"l1": cc.L1OfNorms(1.0, warmup_steps), "aux_k": None, "loss": cc.SquaredError()},
        ),
        "TopK": (cc.TopK(round(k)), {}),
        "BatchTopK": (cc.BatchTopK(k), {}),
        "JumpReLU": (cc.JumpReLU(), {"l0": cc.L0Penalty(1.0, target=k, warmup_steps=warmup_steps)}),
    }[method]
    crosscoder = dataclasses.replace(shared.crosscoder, sparsity=sparsity)
    return dataclasses.replace(shared, crosscoder=crosscoder, **changes)


def ablated(config: TrainConfig, name: str) -> TrainConfig:
    """Return the recipe with the change of this name, on as many tokens."""
    changed = dataclasses.replace(config, **ABLATIONS[name])
    num_steps = config.num_steps * config.batch_size // changed.batch_size
    return dataclasses.replace(changed, num_steps=num_steps, warmup_steps=num_steps // 20)
