"""What the soak trains, how long, and how often it is killed."""

import dataclasses
import math
from pathlib import Path

import crosscoder_jax as cc
from crosscoder_jax.activations import Split
from crosscoder_jax.training.config import TrainConfig
from crosscoder_jax.training.options import RunOptions

DEVICES = 8
"""CPU devices of a run, over all of its processes."""
SPLIT = Split(0.2)


@dataclasses.dataclass(frozen=True)
class Soak:
    """Kill a run at random, go on with it elsewhere, and compare its end with that of an uninterrupted one.

    Raises:
        ValueError: if the kills do not fit between the steps.
    """

    output: Path = Path("soak")
    """Folder of all rounds."""
    minutes: float = 30.0
    """Rounds are begun until these are over."""
    kills: int = 20
    """In each round."""
    epochs: int = 24
    """Of each round: every training token is seen as often."""
    num_tokens: int = 1500
    """Of the store, a fifth of them held out."""
    seed: int = 0
    """Of the first round's kills."""
    tolerance: float = 1e-9
    """Largest difference of a weight, in normalised units. In float64: sums over shards are taken in another
    order on every mesh, which rounds each by 1e-16, and Adam hands that on from step to step."""

    def __post_init__(self) -> None:
        if self.kills < 1 or self.epochs < 1 or not self.minutes >= 0:
            raise ValueError(
                f"kills={self.kills}, epochs={self.epochs} and minutes={self.minutes} must be positive"
            )


BATCH_SIZE, LANES, WIDTHS = 24, 4, (6, 5)
SECONDS_A_STEP = 0.05
"""At least, so that a kill finds the run about where it was to be killed."""
LAST_STEPS = 40
"""At which nothing is killed: JAX looks for a SIGTERM once a second, and the run must not be over by then."""
MESHES = ((8, 1), (4, 2), (2, 4), (1, 8))
PROCESSES = (2, 1)
"""Processes of a start; two are as likely as one is not."""


def sources() -> cc.Sources:
    """Return what the soak's store has."""
    return cc.Sources(tuple(cc.Source(f"model{i}", width) for i, width in enumerate(WIDTHS)))


def num_steps(config: Soak, train_tokens: int) -> int:
    """Return the steps that see every token equally often, at least ``epochs`` times.

    Examples:
        >>> num_steps(Soak(epochs=5), train_tokens=100)  # 24 divides 6 * 100, not 5 * 100
        25
    """
    whole = BATCH_SIZE // math.gcd(BATCH_SIZE, train_tokens)
    return -(-config.epochs // whole) * whole * train_tokens // BATCH_SIZE


def recipe(steps: int) -> TrainConfig:
    """Return what is trained, in float64."""
    return TrainConfig(
        cc.CrosscoderConfig(sources(), num_latents=32, sparsity=cc.BatchTopK(k=2), dtype="float64"),
        num_steps=steps,
        batch_size=BATCH_SIZE,
        learning_rate=1e-3,
        warmup_steps=min(20, steps),
        aux_k=cc.AuxK(0.5, k_aux=8, dead_after_tokens=20 * BATCH_SIZE),
    )


def options() -> RunOptions:
    """Return how it is read and saved; every start takes a while, so that saving often is cheap."""
    return RunOptions(
        split=SPLIT, window_tokens=256, lanes=LANES, log_every=1, checkpoint_every=10, step_timeout=300.0
    )
