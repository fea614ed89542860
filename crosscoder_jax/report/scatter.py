"""The plane of Latent Scaling as a figure: every claimed latent in sight, by its number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from crosscoder_jax.report.content import Cutoffs
from crosscoder_jax.report.figures import axis, layout
from crosscoder_jax.report.labels import place_labels
from crosscoder_jax.report.names import (
    BOTH,
    CHAT_ONLY,
    CONFIRMED,
    DECOUPLING,
    NOT_TESTED,
    SHARED,
    SHRINKAGE,
    UNDETERMINED,
)
from crosscoder_jax.report.palette import (
    CLASS_COLOURS,
    MUTED,
    PAPER,
    VERDICT_COLOURS,
    VERDICT_SYMBOLS,
    VERDICT_TEXT,
    translucent,
)

NU = "\N{GREEK SMALL LETTER NU}"
FRAME = (-0.16, 1.32)
"""What an axis shows at least: nu runs from 0 (absent from base) to 1 (as strong there as in chat)."""
WIDEST_FRAME = (-0.5, 2.0)
"""What it shows at most, for claimed latents that lie further out; beyond, they stand at its edge."""
_TICKS = (-0.5, -0.25, 0.0, 0.2, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
_MARGIN = 0.06
_EDGE = 0.025
"""How far from the edge of the frame, as a share of it, stand the arrows of what lies outside ..."""
_BOTTOM = 0.075
"""... and from its lower one, above the names of the regions."""

_MARK, _ARROW = 10, 16
"""Pixels across a mark and an arrow."""

Range = tuple[float, float]


@dataclass(frozen=True)
class ScatterPoints:
    """Latents of one kind in the plane of the two ratios."""

    nu_error: np.ndarray
    nu_recon: np.ndarray
    half_error: np.ndarray
    """Half the width of each 95 % interval."""
    half_recon: np.ndarray
    hover: tuple[str, ...]
    """Escaped hover text a latent."""
    names: tuple[str, ...] = ()
    """What each is labelled with; nothing where the latents are only a ground for others."""

    def __len__(self) -> int:
        return len(self.nu_error)

    def is_defined(self) -> np.ndarray:
        """Tell which points have a place in the plane at all."""
        return np.isfinite(self.nu_error) & np.isfinite(self.nu_recon)

    def is_inside(self, across: Range, up: Range) -> np.ndarray:
        """Tell which points lie within a frame; NaN does not."""
        x, y = self.nu_recon, self.nu_error
        return (x >= across[0]) & (x <= across[1]) & (y >= up[0]) & (y <= up[1])

    def take(self, rows: np.ndarray) -> "ScatterPoints":
        """Give some of the points."""
        chosen = np.flatnonzero(rows).tolist()
        return ScatterPoints(
            *(values[rows] for values in (self.nu_error, self.nu_recon, self.half_error, self.half_recon)),
            hover=tuple(self.hover[i] for i in chosen),
            names=tuple(self.names[i] for i in chosen) if self.names else (),
        )


@dataclass(frozen=True)
class _Label:
    """What stands beside a mark."""

    name: str
    verdict: str
    mark: int
    """Pixels across the mark."""


def frame_of(values: np.ndarray) -> Range:
    """Give the range of an axis that shows the claimed latents, within what is still readable.

    >>> frame_of(np.array([-0.3, 0.4, 7.0, np.nan]))
    (-0.42, 2.0)
    """
    finite = values[np.isfinite(values)]
    low = round(float(finite.min(initial=FRAME[1])) - 2 * _MARGIN, 3)
    high = round(float(finite.max(initial=FRAME[0])) + _MARGIN, 3)
    return max(min(low, FRAME[0]), WIDEST_FRAME[0]), min(max(high, FRAME[1]), WIDEST_FRAME[1])


def frames(points: Mapping[str, ScatterPoints]) -> tuple[Range, Range]:
    """Give the ranges of the two axes, nu_recon across and nu_error up, that show all points if they can."""
    empty = [np.zeros(0)]
    across = frame_of(np.concatenate(empty + [group.nu_recon for group in points.values()]))
    return across, frame_of(np.concatenate(empty + [group.nu_error for group in points.values()]))


def scatter(
    points: Mapping[str, ScatterPoints],
    shared: ScatterPoints,
    leaning: ScatterPoints,
    cutoffs: Cutoffs,
    latent_class: str = CHAT_ONLY,
) -> go.Figure:
    """Draw nu_error against nu_recon for the candidates of a class by verdict, before other latents."""
    figure = go.Figure()
    across, up = frames(points)
    _mark_corner(figure, cutoffs, across, up)
    figure.add_trace(_ground(shared, SHARED, CLASS_COLOURS[SHARED], 4, 0.22))
    figure.add_trace(_ground(leaning, "leaning to chat", CLASS_COLOURS[CHAT_ONLY], 5, 0.35))
    _add_candidates(figure, points, across, up)
    _name_regions(figure, latent_class)
    figure.update_layout(**layout(height=520, top=30), hovermode="closest")
    other = "base" if latent_class == CHAT_ONLY else "chat"
    ticks = {*_TICKS, cutoffs.max_nu_error, cutoffs.max_nu_recon}
    for update, name, meaning, shown in (
        (figure.update_xaxes, "recon", "shared through other latents", across),
        (figure.update_yaxes, "error", f"hidden in the {other} error", up),
    ):
        update(
            **axis(f"{NU}<sub>{name}</sub> : {meaning} \N{RIGHTWARDS ARROW}"),
            range=list(shown),
            tickvals=sorted(tick for tick in ticks if shown[0] <= tick <= shown[1]),
        )
    return figure


def _mark_corner(figure: go.Figure, cutoffs: Cutoffs, across: Range, up: Range) -> None:
    """Shade where claims are confirmed and draw the cut-offs around it."""
    figure.add_shape(
        type="rect",
        x0=across[0],
        x1=cutoffs.max_nu_recon,
        y0=up[0],
        y1=cutoffs.max_nu_error,
        layer="below",
        line={"width": 0},
        fillcolor=translucent(VERDICT_COLOURS[CONFIRMED], 0.10),
    )
    for at, is_vertical in ((cutoffs.max_nu_recon, True), (cutoffs.max_nu_error, False)):
        add = figure.add_vline if is_vertical else figure.add_hline
        add(at, line={"color": MUTED, "width": 1.2, "dash": "6px,4px"}, layer="above")


def _ground(points: ScatterPoints, name: str, colour: str, size: int, opacity: float) -> go.Scatter:
    return go.Scatter(
        x=points.nu_recon,
        y=points.nu_error,
        mode="markers",
        name=name,
        hovertext=points.hover,
        hovertemplate="%{hovertext}<extra></extra>",
        marker={"color": colour, "size": size, "opacity": opacity, "line": {"width": 0}},
    )


def _add_candidates(figure: go.Figure, points: Mapping[str, ScatterPoints], across: Range, up: Range) -> None:
    """Draw the claimed latents: those inside the frame with their intervals, others as arrows at its edge."""
    groups = [(verdict, group.take(group.is_inside(across, up)), False) for verdict, group in points.items()]
    groups += [
        (verdict, group.take(group.is_defined() & ~group.is_inside(across, up)), True)
        for verdict, group in points.items()
    ]
    places = [np.zeros((0, 2))]
    labels: list[_Label] = []
    for verdict, group, is_outside in groups:
        if len(group):
            places.append(_place(group, across, up))
            size = _ARROW if is_outside else _MARK
            labels += [_Label(name, verdict, size) for name in group.names or ("",) * len(group)]
            figure.add_trace(_candidate_trace(verdict, group, places[-1], is_outside))
    _add_labels(figure, np.concatenate(places), labels, across, up)


def _add_labels(
    figure: go.Figure,
    places: Float[np.ndarray, "latent 2"],
    labels: Sequence[_Label],
    across: Range,
    up: Range,
) -> None:
    """Write each latent's number beside its mark, or further off at the end of a line."""
    low, high = np.array([across, up]).T
    offsets = place_labels(
        (places - low) / (high - low),
        [label.name for label in labels],
        np.array([label.mark / 2 + 1 for label in labels]),
    )
    for label, (x, y), offset in zip(labels, places.tolist(), offsets, strict=True):
        if offset is None:
            continue
        colour = VERDICT_TEXT[label.verdict]
        figure.add_annotation(
            x=x,
            y=y,
            ax=offset[0],
            ay=-offset[1],
            text=label.name,
            font={"size": 11, "color": colour},
            bgcolor=translucent(PAPER, 0.7),
            xanchor="center",
            yanchor="middle",
            borderpad=0,
            standoff=label.mark / 2,
            arrowhead=0,
            arrowwidth=0.8,
            arrowcolor=translucent(colour, 0.6),
        )


def _candidate_trace(
    verdict: str, group: ScatterPoints, place: Float[np.ndarray, "latent 2"], is_outside: bool
) -> go.Scatter:
    return go.Scatter(
        x=place[:, 0],
        y=place[:, 1],
        mode="markers",
        name=verdict,
        hovertext=group.hover,
        hovertemplate="%{hovertext}<extra></extra>",
        marker=_arrows(verdict, group, place) if is_outside else _marker(verdict),
        **({} if is_outside else _bars(verdict, group)),
    )


def _bars(verdict: str, group: ScatterPoints) -> dict[str, Any]:
    colour = translucent(VERDICT_COLOURS[verdict], 0.25 if verdict == UNDETERMINED else 0.6)
    bars = {"type": "data", "visible": True, "thickness": 1.1, "width": 0, "color": colour}
    return {"error_x": {**bars, "array": group.half_recon}, "error_y": {**bars, "array": group.half_error}}


def _marker(verdict: str) -> dict[str, Any]:
    colour = VERDICT_COLOURS[verdict]
    is_open = verdict in (UNDETERMINED, NOT_TESTED)
    line = {"width": 1.2, "color": colour if is_open else PAPER}
    return {"color": colour, "size": _MARK, "symbol": VERDICT_SYMBOLS[verdict], "line": line}


def _arrows(verdict: str, group: ScatterPoints, place: Float[np.ndarray, "latent 2"]) -> dict[str, Any]:
    """Point from each mark at the edge to where its latent lies, in degrees clockwise from up."""
    beyond = np.sign(np.stack([group.nu_recon, group.nu_error], axis=1) - place)
    angles = np.degrees(np.arctan2(beyond[:, 0], beyond[:, 1]))
    line = {"width": 1, "color": PAPER}
    return {
        "color": VERDICT_COLOURS[verdict],
        "size": _ARROW,
        "symbol": "arrow",
        "angle": angles.tolist(),
        "line": line,
    }


def _place(group: ScatterPoints, across: Range, up: Range) -> Float[np.ndarray, "latent 2"]:
    """Give where each latent is drawn: its own place, or the nearest at the edge of the frame."""
    own = np.stack([group.nu_recon, group.nu_error], axis=1)
    low, high = np.array([across, up]).T
    at_low, at_high = low + np.array([_EDGE, _BOTTOM]) * (high - low), high - _EDGE * (high - low)
    return np.where(own < low, at_low, np.where(own > high, at_high, own))


def _name_regions(figure: go.Figure, latent_class: str) -> None:
    """Name the four corners on the rim of the frame, where they hide no latent."""
    corners = (
        (f"confirmed {latent_class}", 0, 0, VERDICT_TEXT[CONFIRMED]),
        (SHRINKAGE, 0, 1, VERDICT_TEXT[SHRINKAGE]),
        (DECOUPLING, 1, 0, VERDICT_TEXT[DECOUPLING]),
        ("both artefacts", 1, 1, VERDICT_TEXT[BOTH]),
    )
    for text, x, y, colour in corners:
        figure.add_annotation(
            x=x,
            y=y,
            xref="paper",
            yref="paper",
            xanchor="right" if x else "left",
            yanchor="bottom",
            yshift=2,
            text=f"<b>{text}</b>",
            showarrow=False,
            font={"color": colour, "size": 13},
        )
