"""Figures as pure functions from numbers to plotly figures.

Text that comes from data must be escaped by the caller with `text.hover_safe`: plotly reads a small dialect
of HTML in labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import plotly.graph_objects as go

from crosscoder_jax.diffing.decoder_norms import class_labels, classify_latents
from crosscoder_jax.report.content import Cutoffs
from crosscoder_jax.report.names import BASE_ONLY, CHAT_ONLY, SHARED
from crosscoder_jax.report.palette import CLASS_COLOURS, CLASS_TEXT, INK, MUTED, PAPER, RULE, translucent


@dataclass(frozen=True)
class Curve:
    """One line of a training panel."""

    name: str
    colour: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    """One small multiple of the training curves."""

    title: str
    unit: str
    """How its values are written: `number`, `share` or `log`."""
    curves: tuple[Curve, ...]


def histogram(
    delta_norms: np.ndarray, cutoffs: Cutoffs, class_counts: Mapping[str, int], *, num_bins: int = 50
) -> go.Figure:
    """Draw how many live latents have each decoder norm difference, with the classes shaded and named."""
    counts, edges = np.histogram(delta_norms, bins=num_bins, range=(0.0, 1.0))
    centres = (edges[:-1] + edges[1:]) / 2
    figure = go.Figure(
        go.Bar(
            x=centres,
            y=counts,
            width=1 / num_bins,
            marker={
                "color": [CLASS_COLOURS[name] for name in class_names(centres, cutoffs)],
                "line": {"width": 0.6, "color": PAPER},
            },
            customdata=np.stack([edges[:-1], edges[1:]], axis=1),
            hovertemplate="%{y:,} latents<br>delta_norm %{customdata[0]:.2f}"
            " to %{customdata[1]:.2f}<extra></extra>",
        )
    )
    _shade_classes(figure, cutoffs, class_counts)
    figure.update_layout(**layout(height=330, top=64), bargap=0)
    bounds = (cutoffs.base_only_max, cutoffs.shared_min, cutoffs.shared_max, cutoffs.chat_only_min)
    ticks = sorted({0.0, 0.5, 1.0, *bounds})
    figure.update_xaxes(**axis("decoder norm difference, delta_norm"), range=[-0.005, 1.005], tickvals=ticks)
    highest = max(1, int(counts.max(initial=0)))
    figure.update_yaxes(**axis("latents, log scale"), **log_count_axis(highest))
    # The page's switch between the two scales reads them from here.
    figure.update_layout(
        meta={"axes": {"log": log_count_axis(highest), "linear": linear_count_axis(highest)}}
    )
    return figure


def log_count_axis(highest: int) -> dict[str, Any]:
    """Give a log axis for counts that shows a single latent as a bar of some height."""
    top = np.log10(highest * 1.6)
    return {
        "type": "log",
        "range": [-0.35, max(1.0, float(top))],
        "tickvals": [10**k for k in range(7)],
        "ticktext": _POWERS,
    }


def linear_count_axis(highest: int) -> dict[str, Any]:
    """Give the same axis with linear counts."""
    return {"type": "linear", "range": [0, max(4.0, highest * 1.06)], "tickvals": None, "ticktext": None}


def class_names(delta_norms: np.ndarray, cutoffs: Cutoffs) -> list[str]:
    """Name the class of each decoder norm difference."""
    return class_labels(classify_latents(jnp.asarray(delta_norms, jnp.float32), cutoffs))


def training_panel(panel: Panel) -> go.Figure:
    """Draw one small multiple of the training curves."""
    figure = go.Figure()
    for curve in panel.curves:
        figure.add_trace(
            go.Scatter(
                x=curve.steps,
                y=curve.values,
                mode="lines",
                name=curve.name,
                line={"color": curve.colour, "width": 2},
                hovertemplate=f"{curve.name}<br>step %{{x:,}}: %{{y:{_HOVER[panel.unit]}}}<extra></extra>",
            )
        )
    common = layout(height=210, top=34)
    common["margin"]["l"] = 52
    figure.update_layout(
        **common,
        title={
            "text": panel.title,
            "font": {"size": 13.5},
            "x": 0,
            "xref": "container",
            "y": 0.97,
            "yanchor": "top",
        },
    )
    figure.update_xaxes(**axis("step"), tickformat="~s", nticks=5)
    figure.update_yaxes(**axis(""), **_panel_axis(panel))
    return figure


def log_ticks(values: Sequence[float], *, most: int = 6) -> list[float]:
    """Give few round ticks that span positive values: 1, 2 and 5 of each decade, or the decades alone.

    >>> log_ticks([70.0, 950.0])
    [50.0, 100.0, 200.0, 500.0, 1000.0]
    """
    positive = [value for value in values if value > 0]
    if not positive:
        return [1.0]
    low, high = int(np.floor(np.log10(min(positive)))), int(np.ceil(np.log10(max(positive))))
    fine = [digit * 10.0**k for k in range(low, high + 1) for digit in (1, 2, 5)]
    below = max((tick for tick in fine if tick <= min(positive)), default=fine[0])
    above = min((tick for tick in fine if tick >= max(positive)), default=fine[-1])
    spanning = [tick for tick in fine if below <= tick <= above]
    if len(spanning) <= most:
        return spanning
    return [10.0**k for k in range(low, high + 1, max(1, (high - low) // (most - 1)))]


def _panel_axis(panel: Panel) -> dict[str, Any]:
    values = [v for curve in panel.curves for v in curve.values if np.isfinite(v)]
    if panel.unit == "log":
        ticks = log_ticks(values)
        return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,g}" for tick in ticks]}
    if panel.unit == "share":
        is_small = panel.title.startswith("Dead")
        top = max(0.01, 1.15 * max(values, default=0)) if is_small else 1.0
        return {"range": [0, top], "tickformat": ".0%" if top > 0.04 else ".1%", "nticks": 5}
    return {"range": [0, 1.12 * max(values, default=1.0)], "nticks": 5}


def _shade_classes(figure: go.Figure, cutoffs: Cutoffs, class_counts: Mapping[str, int]) -> None:
    regions = {
        BASE_ONLY: (0.0, cutoffs.base_only_max, "left"),
        SHARED: (cutoffs.shared_min, cutoffs.shared_max, "center"),
        CHAT_ONLY: (cutoffs.chat_only_min, 1.0, "right"),
    }
    for name, (low, high, anchor) in regions.items():
        figure.add_vrect(
            low, high, fillcolor=translucent(CLASS_COLOURS[name], 0.11), line={"width": 0}, layer="below"
        )
        figure.add_annotation(
            x={"left": low, "center": (low + high) / 2, "right": high}[anchor],
            y=1.01,
            yref="paper",
            yanchor="bottom",
            xanchor=anchor,
            align=anchor,
            showarrow=False,
            font={"color": CLASS_TEXT[name], "size": 13},
            text=f"<b>{name}</b><br>{class_counts.get(name, 0):,}",
        )


def layout(*, height: int, top: int) -> dict[str, Any]:
    """Give what every figure has in common."""
    return {
        "height": height,
        "autosize": True,
        "margin": {"l": 62, "r": 14, "t": top, "b": 50},
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "font": {
            "family": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif",
            "size": 13,
            "color": INK,
        },
        "showlegend": False,
        "hoverlabel": {
            "bgcolor": PAPER,
            "bordercolor": RULE,
            "font": {"color": INK, "size": 13},
            "align": "left",
        },
        "dragmode": False,
        "template": "none",
    }


def axis(title: str) -> dict[str, Any]:
    """Give what every axis has in common."""
    return {
        "title": {"text": title, "font": {"size": 13, "color": MUTED}, "standoff": 8},
        "gridcolor": "#eceff2",
        "zeroline": False,
        "linecolor": RULE,
        "showline": True,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": RULE,
        "tickfont": {"size": 12, "color": MUTED},
        "fixedrange": True,
    }


_POWERS = ["1", "10", "100", "1,000", "10k", "100k", "1M"]
_HOVER = {"share": ".1%", "log": ".3g", "number": ".3g"}
