"""Choose from the tables what each figure shows, and describe it in words for those who cannot see it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from crosscoder_jax.report import figures
from crosscoder_jax.report.cards import top_tokens
from crosscoder_jax.report.content import Method, live_delta_norms
from crosscoder_jax.report.names import BASE_ONLY, CHAT_ONLY, DEAD, OTHER, SHARED, VERDICTS
from crosscoder_jax.report.numbers import decimal, interval, plural
from crosscoder_jax.report.outcomes import verdict_words
from crosscoder_jax.report.palette import method_colour
from crosscoder_jax.report.scatter import NU, ScatterPoints, frames, scatter
from crosscoder_jax.report.text import hover_safe

MAX_GROUND_POINTS = 1_500
"""Shared latents drawn behind the candidates; more would only make the page heavy."""
MAX_NAMED = 6
"""Latents outside a figure's frame whose ratios are written below it; all are in the table."""
MAX_CURVE_POINTS = 400
"""Steps drawn of each training curve, evenly spread."""


@dataclass(frozen=True)
class Plot:
    """A figure with its heading and a description in words."""

    key: str
    title: str
    description: str
    note: str
    figure: go.Figure


def histogram_plot(method: Method) -> Plot:
    """Build the decoder norm histogram of a crosscoder."""
    values = live_delta_norms(method)
    counts = method.class_counts
    parts = ", ".join(f"{counts.get(name, 0):,} {name}" for name in (BASE_ONLY, SHARED, CHAT_ONLY, OTHER))
    return Plot(
        key=f"histogram-{method.slot}",
        title=method.name,
        description=f"Histogram of delta_norm, {plural(len(values), 'live latent')}: {parts}.",
        note=f"Between classes: {counts.get(OTHER, 0):,}. Dead, not drawn: {counts.get(DEAD, 0):,}."
        + (f" Exclusive by design: {designed}." if (designed := _designed(method)) else ""),
        figure=figures.histogram(values, method.cutoffs, counts),
    )


def _designed(method: Method) -> str:
    parts = {name: method.designed[name].claimed for name in (BASE_ONLY, CHAT_ONLY)}
    return ", ".join(f"{number:,} {name}" for name, number in parts.items() if number)


def scatter_plots(method: Method) -> tuple[Plot, ...]:
    """Build the plane of Latent Scaling for chat-only candidates and, if there are any, base-only ones."""
    is_asked = (True, method.claimed(BASE_ONLY) > 0)
    return tuple(
        scatter_plot(method, name)
        for name, asked in zip((CHAT_ONLY, BASE_ONLY), is_asked, strict=True)
        if asked
    )


def scatter_plot(method: Method, latent_class: str = CHAT_ONLY) -> Plot:
    """Build the plane of Latent Scaling for the candidates of one class.

    Ratios compare the other model with the one whose decoder was the direction. Of the latents of other
    classes, those measured from the side of chat are a ground for chat-only candidates; the rest hold the
    inverse ratio and are left out.
    """
    classes, verdicts = method.latents.words("latent_class"), verdict_words(method.latents)
    candidates = method.is_claimed(latent_class)
    groups = {v: _points(method, np.flatnonzero(candidates & (verdicts == v))) for v in VERDICTS}
    groups = {verdict: group for verdict, group in groups.items() if len(group)}
    is_ground = _is_measured_from_chat(method) & (latent_class == CHAT_ONLY)
    shared = _points(method, _spread(np.flatnonzero((classes == SHARED) & is_ground), MAX_GROUND_POINTS))
    is_leaning = (classes == OTHER) & (method.latents.numbers("delta_norm") > method.cutoffs.shared_max)
    leaning = _points(method, _spread(np.flatnonzero(is_leaning & is_ground), MAX_GROUND_POINTS))
    listed = ", ".join(f"{len(group):,} {verdict}" for verdict, group in groups.items()) or "none"
    number = plural(int(candidates.sum()), f"{latent_class} candidate")
    return Plot(
        key=f"scatter-{method.slot}-{latent_class}",
        title=f"{method.name}: {latent_class}",
        description=f"Scatter of nu_error against nu_recon of {number}: {listed}; "
        f"{plural(len(shared), 'shared latent')} in the background.",
        note=_scatter_note(groups, method.designed[latent_class].claimed),
        figure=scatter(groups, shared, leaning, method.cutoffs, latent_class),
    )


def _is_measured_from_chat(method: Method) -> np.ndarray:
    """Tell which latents were tested with the chat decoder, source 1, as the direction."""
    chat = method.files.summary.get("sources", ())[1:2]
    return np.isin(method.latents.words("reference").astype(str), chat)


def training_plots(methods: Sequence[Method]) -> tuple[Plot, ...]:
    """Build the small multiples of training; quantities that no run logged are left out."""
    sources = dict.fromkeys(
        key.removeprefix("fve/")
        for m in methods
        for row in m.files.metrics[-1:]
        for key in row
        if key.startswith("fve/")
    )
    wanted = [
        ("loss", "Loss, log scale", "log"),
        *[(f"fve/{name}", f"Variance explained: {name}", "share") for name in sources],
        ("l0", "Active latents a token (L0)", "number"),
        ("dead", "Dead latents", "share"),
    ]
    panels = [
        (key, figures.Panel(hover_safe(title), unit, _curves(methods, key))) for key, title, unit in wanted
    ]
    return tuple(_training_plot(i, panel) for i, (_, panel) in enumerate(panels) if panel.curves)


def _training_plot(number: int, panel: figures.Panel) -> Plot:
    ends = "; ".join(f"{curve.name} ends at {curve.values[-1]:.3g}" for curve in panel.curves)
    return Plot(
        f"training-{number}",
        panel.title,
        f"{panel.title} over training steps: {ends}.",
        "",
        figures.training_panel(panel),
    )


def _curves(methods: Sequence[Method], key: str) -> tuple[figures.Curve, ...]:
    curves = []
    for method in methods:
        rows = [
            row
            for row in method.files.metrics
            if isinstance(row.get(key), int | float) and np.isfinite(row[key])
        ]
        rows = [rows[i] for i in _spread(np.arange(len(rows)), MAX_CURVE_POINTS)]
        if rows:
            steps, values = tuple(int(row["step"]) for row in rows), tuple(float(row[key]) for row in rows)
            curves.append(figures.Curve(hover_safe(method.name), method_colour(method.slot), steps, values))
    return tuple(curves)


def _points(method: Method, rows: np.ndarray) -> ScatterPoints:
    ratios = (method.latents.numbers(name)[rows] for name in ("nu_error", "nu_recon"))
    halves = (method.half_interval(name)[rows] for name in ("nu_error", "nu_recon"))
    return ScatterPoints(
        *ratios,
        *halves,
        hover=tuple(_hover(method, int(row)) for row in rows),
        names=tuple(f"{latent:.0f}" for latent in method.latents.numbers("latent")[rows]),
    )


def _hover(method: Method, row: int) -> str:
    def value(name: str) -> float:
        return float(method.latents.numbers(name)[row])

    latent = int(value("latent"))
    tokens = top_tokens((method.files.snippets or {}).get(latent, []), 1)
    lines = [
        f"<b>latent {latent}</b> {hover_safe(str(method.latents.words('latent_class')[row]))}",
        f"top token {hover_safe(tokens[0]) if tokens else 'n/a (no snippets kept)'}",
        f"delta_norm {decimal(value('delta_norm')).text}",
        *(
            f"{NU}_{target} {interval(value(name), method.half_interval(name)[row]).text}"
            for target, name in (("error", "nu_error"), ("recon", "nu_recon"))
        ),
    ]
    return "<br>".join(lines)


def _scatter_note(groups: Mapping[str, ScatterPoints], num_designed: int) -> str:
    """Say what stands at the edge of the frame and what is not drawn at all."""
    across, up = frames(groups)
    is_outside = [g.is_defined() & ~g.is_inside(across, up) for g in groups.values()]
    outside = [part for g, rows in zip(groups.values(), is_outside, strict=True) for part in _places(g, rows)]
    undefined = sum(int(np.sum(~group.is_defined())) for group in groups.values())
    notes = []
    if outside:
        more = f" and {len(outside) - MAX_NAMED:,} more" if len(outside) > MAX_NAMED else ""
        notes.append(f"Arrows point to what lies outside the frame: {'; '.join(outside[:MAX_NAMED])}{more}.")
    if undefined:
        notes.append(f"Not drawn: {plural(undefined, 'candidate')} without a defined ratio.")
    if num_designed:
        notes.append(f"Not drawn: {num_designed:,} exclusive by design.")
    return " ".join(notes)


def _places(group: ScatterPoints, rows: np.ndarray) -> list[str]:
    return [
        f"{group.names[i]} ({NU}_error {decimal(group.nu_error[i]).text}, "
        f"{NU}_recon {decimal(group.nu_recon[i]).text})"
        for i in np.flatnonzero(rows).tolist()
    ]


def _spread(rows: np.ndarray, most: int) -> np.ndarray:
    """Keep at most so many rows, evenly spread and always with the last."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).round().astype(int)]
