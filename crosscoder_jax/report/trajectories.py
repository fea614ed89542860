"""Figures of crosscoders of three sources or more: when latents appear, how strong they are and turn."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from crosscoder_jax.report.content import Method
from crosscoder_jax.report.figures import axis, layout
from crosscoder_jax.report.numbers import plural
from crosscoder_jax.report.palette import INK, PAPER, RULE, method_colour
from crosscoder_jax.report.plots import Plot
from crosscoder_jax.report.text import hover_safe

MAX_LATENTS = 40
"""Rows of the figure of strengths: those with the most energy."""
_ROW_PIXELS = 13


def trajectory_plots(method: Method) -> tuple[Plot, ...]:
    """Build the figures of a run whose table tells in which source each latent appears; else none."""
    if not method.latents.has("appears_in"):
        return ()
    names = method.latents.suffixes("norm_")
    return (_appearance_plot(method, names), _strength_plot(method, names))


def _appearance_plot(method: Method, names: Sequence[str]) -> Plot:
    first = method.latents.words("appears_in")[_live(method)]
    counts = [int(np.sum(first == name)) for name in names]
    listed = ", ".join(f"{count:,} in {name}" for name, count in zip(names, counts, strict=True))
    figure = go.Figure(
        go.Bar(
            x=[hover_safe(name) for name in names],
            y=counts,
            marker={"color": method_colour(method.slot), "line": {"width": 0.6, "color": PAPER}},
            text=[f"{count:,}" for count in counts],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y:,} latents appear in %{x}<extra></extra>",
        )
    )
    figure.update_layout(**layout(height=300, top=30), bargap=0.35)
    figure.update_xaxes(**axis("source in which a latent appears first"), type="category")
    figure.update_yaxes(**axis("latents"), rangemode="tozero")
    return Plot(
        key=f"appearance-{method.slot}",
        title=method.name,
        description=f"Bars of {plural(len(first), 'live latent')} by where each appears: {listed}.",
        note="A latent appears where its decoder first has half of its largest norm.",
        figure=figure,
    )


def _strength_plot(method: Method, names: Sequence[str]) -> Plot:
    rows = _strongest(method, names)
    norms = np.stack([method.latents.numbers(f"norm_{name}")[rows] for name in names], axis=1)
    relative = norms / np.maximum(norms.max(axis=1, keepdims=True), np.finfo(float).tiny)
    labels = [f"{latent:,}" for latent in method.latents.numbers("latent")[rows].astype(int)]
    figure = go.Figure(
        go.Heatmap(
            z=relative,
            x=[hover_safe(name) for name in names],
            y=labels,
            customdata=_cosines(method, names, rows),
            zmin=0,
            zmax=1,
            colorscale=[[0, PAPER], [1, method_colour(method.slot)]],
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": "norm / largest"}, "thickness": 12, "outlinecolor": RULE},
            hovertemplate="latent %{y} in %{x}<br>norm %{z:.2f} of its largest<br>"
            "cosine with its last decoder %{customdata}<extra></extra>",
        )
    )
    figure.update_layout(**layout(height=110 + _ROW_PIXELS * max(len(rows), 8), top=30))
    figure.update_xaxes(**axis("source"), type="category")
    small = {**axis("latent"), "tickfont": {"size": 10, "color": INK}}
    figure.update_yaxes(**small, type="category", autorange="reversed")
    return Plot(
        key=f"strength-{method.slot}",
        title=method.name,
        description=f"Heat map of the decoder norms of {plural(len(rows), 'latent')} over "
        f"{len(names)} sources, each relative to its largest.",
        note=f"The {plural(len(rows), 'latent')} with the most energy, in the order in which they appear. "
        "Hover for the cosine of a decoder with the last one: how far the latent has turned.",
        figure=figure,
    )


def _live(method: Method) -> np.ndarray:
    return method.latents.numbers("active_tokens") > 0


def _strongest(method: Method, names: Sequence[str]) -> np.ndarray:
    """Choose the live latents with the most energy, in the order in which they appear."""
    live = np.flatnonzero(_live(method))
    strongest = live[np.argsort(-method.latents.numbers("energy")[live], kind="stable")][:MAX_LATENTS]
    first = [list(names).index(name) for name in method.latents.words("appears_in")[strongest]]
    return strongest[np.argsort(first, kind="stable")]


def _cosines(method: Method, names: Sequence[str], rows: np.ndarray) -> list[list[str]]:
    if not method.latents.has(f"turning_{names[0]}"):
        return [["n/a"] * len(names)] * len(rows)
    columns = [method.latents.numbers(f"turning_{name}")[rows] for name in names]
    return [
        ["n/a" if np.isnan(value) else f"{value:.2f}" for value in row] for row in zip(*columns, strict=True)
    ]
