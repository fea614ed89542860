"""Train crosscoders on a planted world, many seeds at once, and measure them on fresh tokens."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

import crosscoder_jax as cc
from crosscoder_jax.crosscoder import Crosscoder
from crosscoder_jax.metrics import ReconstructionSums, explained_variance, fired_counts, reconstruction_sums
from crosscoder_jax.sparsity import BatchTopK, top_scores_cut
from crosscoder_jax.training.config import TrainConfig
from crosscoder_jax.training.state import TrainState
from crosscoder_jax.training.statistics import data_statistics
from crosscoder_jax.typing import Progress
from experiments.planted.world import Truth, World, plant, sample, sample_jit

Tree = TypeVar("Tree")

STATISTICS_TOKENS = 8_192
MEASURED_BATCHES = 32
MEASURED_BATCH = 2_048
_STEPS_PER_CALL = 100


class Trained(NamedTuple):
    """One seed's crosscoder beside the world that it was trained on."""

    crosscoder: Crosscoder
    truth: Truth
    key: Key[Array, ""]
    """Of the tokens; fold in 2 for tokens that training has not seen."""


class Measured(NamedTuple):
    """What a crosscoder does on fresh tokens."""

    fve: float
    l0: float
    fired: np.ndarray
    """Tokens on which each latent fires, at the inference rule."""
    w_dec: Float[np.ndarray, "latent width"]
    """Raw activation units."""
    nu_error: Float[np.ndarray, "latent"]
    nu_recon: Float[np.ndarray, "latent"]
    has_evidence: np.ndarray


def train_seeds(
    config: TrainConfig, world: World, seeds: range, *, progress: Progress | None = None
) -> list[Trained]:
    """Train one crosscoder per seed, each on a world of its own, all in one compiled program."""
    keys = [jax.random.key(seed) for seed in seeds]
    truths = [plant(world, jax.random.fold_in(key, 0)) for key in keys]
    return train_on(config, world, truths, keys, first_seed=seeds.start, progress=progress)


def train_on(
    config: TrainConfig,
    world: World,
    truths: Sequence[Truth],
    keys: Sequence[Key[Array, ""]],
    *,
    first_seed: int = 0,
    progress: Progress | None = None,
) -> list[Trained]:
    """Train one crosscoder on each of some planted truths, all in one compiled program.

    A recipe whose sources are derived from base and chat trains on what they derive.

    Args:
        config: the recipe.
        world: how features fire, and the noise; the truths may differ in all else.
        truths: of equally many features each.
        keys: of the tokens of each.
        first_seed: of the initial directions; each crosscoder has the next one.
        progress: told the steps done.
    """
    states = [
        _start(config, world, truth, key, first_seed + i)
        for i, (truth, key) in enumerate(zip(truths, keys, strict=True))
    ]
    stacked, truth, key = (
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *t) for t in (states, truths, keys)
    )
    done = 0
    while done < config.num_steps:
        count = min(_STEPS_PER_CALL, config.num_steps - done)
        stacked = _steps(stacked, truth, key, config=config, world=world, count=count)
        jax.block_until_ready(stacked.step)
        done += count
        if progress is not None:
            progress(done, config.num_steps, "steps")
    return [
        Trained(_pick(stacked, i).crosscoder(), truth, key)
        for i, (truth, key) in enumerate(zip(truths, keys, strict=True))
    ]


def measure(trained: Trained, world: World) -> Measured:
    """Measure variance explained, L0 and Latent Scaling on tokens that training has not seen."""
    key = jax.random.fold_in(trained.key, 2)
    batches = [
        sample_jit(trained.truth, jax.random.fold_in(key, i), num_tokens=MEASURED_BATCH, world=world)
        for i in range(MEASURED_BATCHES)
    ]
    crosscoder = _calibrated(trained.crosscoder, batches)
    sums, fired = zip(*(_measure_batch(crosscoder, acts) for acts in batches), strict=True)
    fired = np.sum([np.asarray(counts) for counts in fired], axis=0)
    total = jax.tree.map(lambda *leaves: sum(leaves), *sums)
    w_dec, _ = crosscoder.raw_decoder()
    scaling = cc.latent_scaling(crosscoder, batches)
    return Measured(
        fve=float(explained_variance(total, world.sources)["fve"]),
        l0=float(fired.sum()) / (MEASURED_BATCHES * MEASURED_BATCH),
        fired=fired,
        w_dec=np.asarray(w_dec),
        nu_error=np.asarray(scaling.nu_error),
        nu_recon=np.asarray(scaling.nu_recon),
        has_evidence=np.asarray(scaling.has_evidence),
    )


def _start(config: TrainConfig, world: World, truth: Truth, key: Array, seed: int) -> TrainState:
    acts = sample_jit(truth, jax.random.fold_in(key, 1), num_tokens=STATISTICS_TOKENS, world=world)
    acts = config.crosscoder.sources.derive(acts, world.sources)
    statistics = data_statistics(np.asarray(acts), config)
    return cc.init_state(dataclasses.replace(config, seed=seed), **statistics._asdict())


@functools.partial(jax.jit, static_argnames=("config", "world", "count"), donate_argnames="states")
def _steps(
    states: TrainState, truths: Truth, keys: Array, *, config: TrainConfig, world: World, count: int
) -> TrainState:
    def step(state: TrainState, truth: Truth, key: Array) -> TrainState:
        key = jax.random.fold_in(jax.random.fold_in(key, 3), state.step)
        acts = sample(truth, key, config.batch_size, world)
        acts = config.crosscoder.sources.derive(acts, world.sources)
        return cc.train_step(state, acts, config=config)[0]

    together = jax.vmap(step)
    return lax.fori_loop(0, count, lambda _, states: together(states, truths, keys), states)


def _calibrated(crosscoder: Crosscoder, batches: list[Array]) -> Crosscoder:
    """Set the threshold of a BatchTopK crosscoder so that its L0 on one large batch is its k."""
    sparsity = crosscoder.config.sparsity
    if not isinstance(sparsity, BatchTopK):
        return crosscoder
    acts = jnp.concatenate(batches[: len(batches) // 4])
    scores = jax.nn.relu(crosscoder.pre_acts(crosscoder.normalize(acts))) * crosscoder.score_weights()
    cut = top_scores_cut(scores, jnp.int32(round(sparsity.k * len(acts))))
    crosscoder.threshold[...] = jnp.nextafter(cut, jnp.float32(0))  # the inference rule is strict
    return crosscoder


@jax.jit
def _measure_batch(crosscoder: Crosscoder, acts: Array) -> tuple[ReconstructionSums, Array]:
    normalized, code = crosscoder.normalize(acts), crosscoder.encode(acts)
    recon = crosscoder.decode_normalized(code)
    return reconstruction_sums(normalized, recon, crosscoder.config.sources), fired_counts(code)


def _pick(tree: Tree, index: int) -> Tree:
    return jax.tree.map(lambda leaf: leaf[index], tree)
