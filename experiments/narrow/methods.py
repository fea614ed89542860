"""The methods that are compared: one trainer, one analysis, and what each plugs into them."""

import dataclasses
from collections.abc import Callable, Mapping

import crosscoder_jax as cc
from crosscoder_jax.training.config import TrainConfig
from experiments.planted.methods import recipe
from experiments.planted.world import World

NUM_LATENTS = 128
"""Fewer than the features there are, as dictionaries of real models have."""
DIFFERENCE_SHARE = 0.2
"""Of k, that of the difference SAE, whose source holds little but drift and the change."""


def _crosscoder(config: TrainConfig) -> TrainConfig:
    return config


def _difference_sae(config: TrainConfig) -> TrainConfig:
    base, chat = config.crosscoder.sources
    sparsity = config.crosscoder.sparsity
    assert isinstance(sparsity, cc.BatchTopK)
    return _with(
        config,
        sources=cc.Sources((cc.difference(chat, base),)),
        sparsity=sparsity.with_k(DIFFERENCE_SHARE * sparsity.k),
    )


def _delta_basis(config: TrainConfig) -> TrainConfig:
    base, chat = config.crosscoder.sources
    return _with(config, sources=cc.Sources((base, cc.difference(chat, base))))


def _delta_loss(config: TrainConfig) -> TrainConfig:
    base, chat = config.crosscoder.sources.names
    return dataclasses.replace(config, delta=cc.DeltaLoss(10.0, base, chat))


def _dedicated(config: TrainConfig) -> TrainConfig:
    return _with(config, groups=cc.exclusive_groups(config.crosscoder.sources, 1 / 16))


def _designated_shared(config: TrainConfig) -> TrainConfig:
    return _with(config, groups=(cc.LatentGroup("shared", 0.75, is_tied=True, cost=0.2),))


def _dedicated_delta(config: TrainConfig) -> TrainConfig:
    """Return the delta basis with a quarter of the latents writing to the difference alone."""
    basis = _delta_basis(config)
    change = basis.crosscoder.sources.names[1]
    return _with(basis, groups=(cc.LatentGroup("change", 0.25, writes=(change,)),))


def _parted_delta(config: TrainConfig) -> TrainConfig:
    """Return the delta basis in two halves: the difference alone, with a part of k, and what is shared."""
    basis = _delta_basis(config)
    (shared, change), sparsity = basis.crosscoder.sources.names, config.crosscoder.sparsity
    assert isinstance(sparsity, cc.BatchTopK)
    own_k = DIFFERENCE_SHARE * sparsity.k
    own = cc.LatentGroup("change", 0.5, reads=(change,), writes=(change,), k=own_k)
    groups = own, cc.LatentGroup("shared", 0.5, writes=(shared,))
    return _with(basis, groups=groups, sparsity=sparsity.with_k(sparsity.k - own_k))


def _with(config: TrainConfig, **changes: object) -> TrainConfig:
    return dataclasses.replace(config, crosscoder=dataclasses.replace(config.crosscoder, **changes))


METHODS: Mapping[str, Callable[[TrainConfig], TrainConfig]] = {
    "crosscoder": _crosscoder,
    "difference SAE": _difference_sae,
    "delta basis": _delta_basis,
    "delta loss": _delta_loss,
    "dedicated latents": _dedicated,
    "designated shared": _designated_shared,
    "delta basis, dedicated": _dedicated_delta,
    "delta basis, parted": _parted_delta,
}


def method_recipe(name: str, world: World, num_tokens: int) -> TrainConfig:
    """Return the recipe of a method."""
    shared = recipe("BatchTopK", world, num_latents=NUM_LATENTS, num_tokens=num_tokens)
    return METHODS[name](shared)
