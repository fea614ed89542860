"""The reference library's training runs, and the same steps taken by this package."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import crosscoder_jax as cc
from crosscoder_jax.training.statistics import geometric_medians
from experiments.parity.golden import FOLDER, NUM_LATENTS, SOURCES, TENSORS, read, tensors, training_batches

_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class GoldenRun:
    """One run of theirs and the recipe that repeats it."""

    kind: str
    """``batchtopk``, ``batchtopk_aux`` or ``l1``."""
    recipe: cc.TrainConfig
    allowed: float
    """The largest relative difference that counts as the same."""

    @property
    def dtype(self) -> str:
        """What both compute in."""
        return self.recipe.crosscoder.dtype

    @property
    def file(self) -> str:
        """Name of the file of their numbers."""
        return f"training_{self.kind}_{self.dtype}"

    @property
    def initial_file(self) -> str:
        """Name of the file with the weights before the first step; float64 runs start from float32."""
        return "training_l1_float32" if self.kind == "l1" else "training_batchtopk_float32"


class Snapshot(NamedTuple):
    """Our state after some steps, on the host."""

    weights: dict[str, np.ndarray]
    second_moments: dict[str, np.ndarray]
    tokens_since_fired: np.ndarray


class Replay(NamedTuple):
    """What our hundred steps gave."""

    metrics: dict[str, np.ndarray]
    """Of each step, before its update."""
    after: dict[int, Snapshot]
    """After so many steps."""
    initial_b_dec: np.ndarray


def golden_runs() -> tuple[GoldenRun, ...]:
    """Return every run there are numbers of.

    AuxK is allowed a millionth even in float64: the reference library sums it in float32 always.
    """
    return (
        GoldenRun("batchtopk", _batch_top_k("float64"), 1e-9),
        GoldenRun("batchtopk_aux", _batch_top_k("float64", dead_after_tokens=_AT_ONCE), 1e-6),
        GoldenRun("l1", _l1("float64"), 1e-9),
        GoldenRun("batchtopk", _batch_top_k("float32"), 1e-5),
        GoldenRun("l1", _l1("float32"), 1e-5),
    )


def _batch_top_k(dtype: str, dead_after_tokens: int = cc.AuxK.dead_after_tokens) -> cc.TrainConfig:
    return cc.TrainConfig(
        cc.CrosscoderConfig(SOURCES, NUM_LATENTS, cc.BatchTopK(k=8.0), dtype=dtype),
        num_steps=120,  # of which 100 are recorded
        decay_fraction=1 / 3,
        aux_k=cc.AuxK(dead_after_tokens=dead_after_tokens),
        threshold=cc.DelayedThreshold(decay=0.999, start_step=5),
        **_SHARED,
    )


def _l1(dtype: str) -> cc.TrainConfig:
    return cc.TrainConfig(
        cc.CrosscoderConfig(SOURCES, NUM_LATENTS, cc.ReLU(), dtype=dtype),
        num_steps=100,
        decay_fraction=0.0,
        l1=cc.L1OfNorms(0.05),
        aux_k=None,
        clip_norm=None,
        **_SHARED,
    )


_SHARED: dict[str, Any] = {"batch_size": 64, "learning_rate": 1e-3, "warmup_steps": 10}


def precision(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which JAX computes in a dtype."""
    return jax.enable_x64() if dtype == "float64" else contextlib.nullcontext()


def replay(run: GoldenRun, folder: Path = FOLDER, *, keep: Sequence[int] = (100,)) -> Replay:
    """Take the hundred steps from their initial weights on; nothing else of theirs is looked at.

    Args:
        run: which.
        folder: of the golden numbers.
        keep: steps after which to take a snapshot.
    """
    batches = training_batches(folder)
    start = tensors(read(run.initial_file, folder), "init")
    if run.kind != "l1":
        # In its first step their trainer puts the batch's geometric median into the bias.
        medians = geometric_medians(SOURCES.split(batches[0].astype(run.dtype)))
        start["b_dec"] = np.concatenate(medians)
    with precision(run.dtype):
        state = cc.init_state(run.recipe)
        for name, value in start.items():
            state.params[name][...] = jnp.asarray(value, run.dtype)
        metrics, after = [], {}
        for step, batch in enumerate(batches, start=1):
            state, measured = cc.train_step(state, jnp.asarray(batch), config=run.recipe)
            metrics.append(measured)
            if step in keep:
                after[step] = _snapshot(state)
        stacked = {name: np.array([float(each[name]) for each in metrics]) for name in metrics[0]}
    return Replay(stacked, after, start["b_dec"])


def _snapshot(state: cc.TrainState) -> Snapshot:
    moments = state.opt_state[1].nu  # pyright: ignore - the chain of make_optimizer
    return Snapshot(
        {name: np.array(state.params[name][...]) for name in TENSORS},
        {name: np.array(moments[name][...]) for name in TENSORS},
        np.array(state.tokens_since_fired),
    )
