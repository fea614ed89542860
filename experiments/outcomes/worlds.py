"""The worlds of the reported outcomes; each is small enough to train in seconds."""

import dataclasses

from experiments.planted.world import World

_NONE = World(
    width=32,
    num_same=0,
    num_rotated=0,
    num_rescaled=0,
    num_weak=0,
    num_split=0,
    num_exclusive=0,
    is_ranked=False,
)
"""No features at all, to add some to; those that there are fire equally often."""

FREQUENT = dataclasses.replace(_NONE, num_same=16, num_exclusive=4, mean_l0=24 * 0.08)
"""16 shared features and 4 exclusive ones of each model, each on 8 % of the tokens."""

RARE = dataclasses.replace(FREQUENT, exclusive_frequency=0.005, mean_l0=16 * 0.08 + 8 * 0.005)
"""The same with the exclusive features on 0.5 % of the tokens."""

MODES = dataclasses.replace(
    _NONE, width=64, num_same=60, num_rotated=20, num_exclusive=12, mean_l0=5.0, is_ranked=True
)
"""Shared features of one strength in both models, and exclusive ones."""

CROWDED = dataclasses.replace(_NONE, width=64, num_same=200, num_exclusive=20, mean_l0=10.0, is_ranked=True)
"""220 features that fire more or less often."""

NARROW = dataclasses.replace(_NONE, width=64, num_same=200, num_exclusive=4, mean_l0=10.0)
NARROW = dataclasses.replace(NARROW, exclusive_frequency=0.005)
"""200 shared features, and 4 rare ones that a narrow change added to chat and 4 that it took away."""


def drifted(angle: float, chat_gain: float) -> World:
    """Return a world of 8 coordinates, 6 shared features and 2 exclusive ones of each model.

    Args:
        angle: degrees by which the shared features drift from base to chat.
        chat_gain: how many times as loud chat is as base.
    """
    return dataclasses.replace(
        _NONE,
        width=8,
        num_rotated=6,
        num_exclusive=2,
        mean_l0=10 * 0.1,
        angle=angle,
        chat_gain=chat_gain,
    )
