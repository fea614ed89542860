"""Colours of the page: Okabe and Ito's set, told apart with any common colour vision, darkened for text."""

from crosscoder_jax.report.names import (
    BASE_ONLY,
    BOTH,
    CHAT_ONLY,
    CONFIRMED,
    DEAD,
    DECOUPLING,
    NOT_TESTED,
    OTHER,
    SHARED,
    SHRINKAGE,
    UNDETERMINED,
)

INK = "#1c2127"
MUTED = "#57606a"
RULE = "#d5dae0"
PAPER = "#ffffff"

CLASS_COLOURS = {
    BASE_ONLY: "#0072B2",
    SHARED: "#8a939e",
    CHAT_ONLY: "#D55E00",
    OTHER: "#c3c9d1",
    DEAD: "#e6e9ed",
}
CLASS_TEXT = {BASE_ONLY: "#005a8f", SHARED: "#4d5661", CHAT_ONLY: "#a84800"}

VERDICT_COLOURS = {
    CONFIRMED: "#007a59",
    SHRINKAGE: "#E69F00",
    DECOUPLING: "#b0559a",
    BOTH: "#5b3a1e",
    UNDETERMINED: "#6e7781",
    NOT_TESTED: "#c3c9d1",
}
VERDICT_TEXT = VERDICT_COLOURS | {SHRINKAGE: "#8a5f00", DECOUPLING: "#8c3d79", NOT_TESTED: MUTED}
"""The same, dark enough to read."""
VERDICT_SYMBOLS = {
    CONFIRMED: "circle",
    SHRINKAGE: "triangle-up",
    DECOUPLING: "square",
    BOTH: "diamond",
    UNDETERMINED: "circle-open",
    NOT_TESTED: "x-thin-open",
}

METHOD_COLOURS = ("#1b4f72", "#b0559a", "#c77700", "#007a59", "#6e7781", "#a84800")
"""One colour a run in the order given; further runs begin again."""


def method_colour(slot: int) -> str:
    """Give the colour of a run."""
    return METHOD_COLOURS[slot % len(METHOD_COLOURS)]


def translucent(colour: str, alpha: float) -> str:
    """Give a hexadecimal colour as rgba.

    >>> translucent("#D55E00", 0.5)
    'rgba(213,94,0,0.5)'
    """
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"
