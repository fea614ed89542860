"""Planted narrow changes: everything drifts a little, and chat gains four features of its own."""

import dataclasses

from experiments.planted.world import World

_DRIFT_DEGREES = 12.0
"""The difference of two models then has 0.2 of their size, as on a real pair after a LoRA fine-tune."""


@dataclasses.dataclass(frozen=True)
class Change:
    """How often the new features fire, and how strong they are next to the others."""

    frequency: float
    """Share of the tokens on which each new feature fires."""
    strength: float
    """Times that of other features."""

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.frequency:.1%} of tokens, strength {self.strength:g}"

    @property
    def world(self) -> World:
        """200 features that drift, and 4 that only chat has (and 4 that only base has)."""
        return World(
            width=64,
            num_same=0,
            num_rotated=200,
            num_rescaled=0,
            num_weak=0,
            num_split=0,
            num_exclusive=4,
            mean_l0=10.0,
            angle=_DRIFT_DEGREES,
            exclusive_frequency=self.frequency,
            exclusive_strength=self.strength,
        )


CHANGES = (Change(0.02, 1.0), Change(0.005, 1.0), Change(0.02, 0.3))
"""From plain to hidden: often and strong, rare, weak."""
