"""Where the labels of points go so that none hides another or a point."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

MAX_POINTS = 300
"""More than so many are a crowd in which no label could be read."""
PLOT = (430.0, 430.0)
"""Width and height in pixels of the narrowest plot in which labels must not touch."""
CHARACTER, LINE = 6.8, 12.0
"""Pixels: a character's width and a line's height."""
_DISTANCES = (9.0, 20.0, 34.0, 50.0, 68.0)
"""Pixels from a point to its label, as they are tried; more where the mark is larger than usual."""
_USUAL_MARK = 6.0
_ANGLES = np.radians([0, 180, 90, 270, 45, 315, 135, 225, 22, 338, 158, 202, 67, 293, 113, 247])
"""Directions from a point to its label, as they are tried at each distance."""

Offset = tuple[float, float]


def place_labels(
    points: Float[np.ndarray, "point 2"], names: Sequence[str], marks: Float[np.ndarray, "point"]
) -> list[Offset | None]:
    """Choose a place for each label, or none where every place would hide something.

    Those with most room around them choose first, so that a crowd does not cost a lone point its label.

    Args:
        points: as shares of the plot's width and height, from below on the left.
        names: what is written.
        marks: half the size of each point's mark in pixels.

    Returns:
        From each point to the middle of its label, in pixels to the right and up.

    Examples:
        >>> place_labels(np.array([[0.5, 0.5], [0.99, 0.5]]), ["1", "2"], np.array([6.0, 6.0]))
        [(12.4, 0.0), (-12.4, 0.0)]
    """
    if len(names) > MAX_POINTS:
        return [None] * len(names)
    centres = points * PLOT
    offsets: list[Offset | None] = [None] * len(names)
    taken = np.zeros((0, 4))
    covered = np.concatenate([centres - marks[:, None], centres + marks[:, None]], axis=1)
    for i in np.argsort(-_room(centres), kind="stable").tolist():
        tried = _offsets(len(names[i]), max(0.0, float(marks[i]) - _USUAL_MARK))
        boxes = _boxes(centres[i] + tried, len(names[i]))
        obstacles = np.concatenate([np.delete(covered, i, axis=0), taken])
        free = np.flatnonzero(_is_within(boxes) & ~_is_hiding(boxes, obstacles))
        if len(free) and names[i]:
            right, up = tried[free[0]].round(1).tolist()
            offsets[i], taken = (right, up), np.concatenate([taken, boxes[free[:1]]])
    return offsets


def _room(centres: Float[np.ndarray, "point 2"]) -> Float[np.ndarray, "point"]:
    """Give each point's distance to its nearest neighbour."""
    distances = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    return distances.min(axis=1, initial=np.inf)


def _offsets(characters: int, further: float) -> Float[np.ndarray, "place 2"]:
    """Give the places that are tried for a label, nearest first."""
    directions = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
    reach = further + np.array(_DISTANCES)[:, None, None] + np.array([characters * CHARACTER, LINE]) / 2
    return (directions * reach).reshape(-1, 2)


def _boxes(middles: Float[np.ndarray, "place 2"], characters: int) -> Float[np.ndarray, "place 4"]:
    """Give left, bottom, right and top of a label at each place."""
    half = np.array([characters * CHARACTER, LINE]) / 2
    return np.concatenate([middles - half, middles + half], axis=1)


def _is_within(boxes: Float[np.ndarray, "place 4"]) -> Bool[np.ndarray, "place"]:
    return np.all(boxes[:, :2] >= 0, axis=1) & np.all(boxes[:, 2:] <= PLOT, axis=1)


def _is_hiding(
    boxes: Float[np.ndarray, "place 4"], others: Float[np.ndarray, "box 4"]
) -> Bool[np.ndarray, "place"]:
    """Tell which boxes overlap any other."""
    starts_before = np.all(boxes[:, None, :2] < others[None, :, 2:], axis=-1)
    ends_after = np.all(boxes[:, None, 2:] > others[None, :, :2], axis=-1)
    return np.any(starts_before & ends_after, axis=1)
