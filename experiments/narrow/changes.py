"""Planted narrow changes: everything drifts a little, and chat gains four features of its own."""

import dataclasses
import tempfile
from pathlib import Path

import jax
import numpy as np

from crosscoder_jax.activations import TokenView
from experiments.narrow.measure import Found, measure
from experiments.nulls.data import write_store
from experiments.planted.trial import Trained
from experiments.planted.world import CHAT_ONLY, World, sample_with_strengths

NUM_TOKENS = 65_536
"""Fresh tokens on which a crosscoder is measured."""
_DRIFT_DEGREES = 12.0
"""The difference of two models then has 0.2 of their size, as on a real pair after a LoRA fine-tune."""


@dataclasses.dataclass(frozen=True)
class Change:
    """How often the new features fire, and how strong they are next to the others."""

    frequency: float
    """Share of the tokens on which each new feature fires."""
    strength: float
    """Times that of other features."""
    drift: float = _DRIFT_DEGREES
    """Degrees that every shared feature turns by."""

    @property
    def name(self) -> str:
        """How tables call it."""
        if not self.frequency:
            return "nothing new" if self.drift else "the same model twice"
        return f"{self.frequency:.1%} of tokens, strength {self.strength:g}"

    @property
    def world(self) -> World:
        """200 features that drift, and 4 that only chat has (and 4 that only base has)."""
        return World(
            width=64,
            num_same=0 if self.drift else 200,
            num_rotated=200 if self.drift else 0,
            num_rescaled=0,
            num_weak=0,
            num_split=0,
            num_exclusive=4 if self.frequency else 0,
            mean_l0=10.0,
            angle=self.drift,
            exclusive_frequency=self.frequency or None,
            exclusive_strength=self.strength,
        )


CHANGES = (
    Change(0.02, 1.0),
    Change(0.005, 1.0),
    Change(0.02, 0.3),
    Change(0.0, 0.0),
    Change(0.0, 0.0, drift=0.0),
)
"""From plain to hidden: often and strong, rare, weak; as nulls, nothing but the drift, and nothing at all."""


def measure_change(trained: Trained, world: World) -> Found:
    """Measure a crosscoder on fresh tokens, of which it is known where the new features fire."""
    key = jax.random.fold_in(trained.key, 2)
    acts, strengths = sample_with_strengths(trained.truth, key, NUM_TOKENS, world)
    is_new = np.asarray(strengths)[:, np.asarray(trained.truth.kind) == CHAT_ONLY] > 0
    with tempfile.TemporaryDirectory() as folder:
        parts = np.stack(world.sources.split(np.asarray(acts)), axis=1)
        return measure(trained.crosscoder, TokenView(write_store(Path(folder) / "store", parts)), is_new)[0]
