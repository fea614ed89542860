"""Colours of the page: Okabe and Ito's set, told apart with any common colour vision, darkened for text."""

INK = "#1c2127"
MUTED = "#57606a"
RULE = "#d5dae0"
PAPER = "#ffffff"

CLASS_COLOURS = {
    "base-only": "#0072B2",
    "shared": "#8a939e",
    "chat-only": "#D55E00",
    "other": "#c3c9d1",
    "dead": "#e6e9ed",
}
CLASS_TEXT = {"base-only": "#005a8f", "shared": "#4d5661", "chat-only": "#a84800"}

VERDICT_COLOURS = {
    "confirmed": "#007a59",
    "complete shrinkage": "#E69F00",
    "latent decoupling": "#b0559a",
    "shrinkage and decoupling": "#5b3a1e",
    "undetermined": "#6e7781",
    "not tested": "#c3c9d1",
}
VERDICT_SYMBOLS = {
    "confirmed": "circle",
    "complete shrinkage": "triangle-up",
    "latent decoupling": "square",
    "shrinkage and decoupling": "diamond",
    "undetermined": "circle-open",
    "not tested": "x-thin-open",
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
