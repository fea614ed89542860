"""The tables of the page as rows of formatted numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crosscoder_jax.report.cards import documents, verdict_note
from crosscoder_jax.report.content import Kind, Method
from crosscoder_jax.report.names import EXCLUSIVE_CLASSES, VERDICTS
from crosscoder_jax.report.numbers import Figure, count, decimal, interval, missing, share
from crosscoder_jax.report.outcomes import Outcomes, is_beyond, is_by_design, verdict_words

NOT_EVALUATED = "run crosscoder-jax evaluate"
NOT_SCALED = "Latent Scaling was not run on them"
NO_NULL_RUN = "diffed without a null run"
MAX_LATENT_ROWS = 400
"""Exclusive latents listed in numbers; more would only make the page heavy."""
WHY_NO_CLASSES = {
    Kind.DIFFERENCE: "one decoder only: no norms to compare",
    Kind.ONE: "one decoder only: no norms to compare",
    Kind.MANY: "classes compare two sources",
}
"""Why a run claims nothing for one model, by what it reads."""


@dataclass(frozen=True)
class MethodRow:
    """A line of the table of methods."""

    name: str
    slot: int
    num_latents: Figure
    explained: Figure
    explained_by_source: tuple[tuple[str, Figure], ...]
    mean_active: Figure
    dead: Figure
    why_none: str
    """Why the run claims nothing for one model; empty where two models are compared."""
    claimed: Figure
    confirmed: Figure
    refuted: Figure
    undetermined: Figure


@dataclass(frozen=True)
class Segment:
    """A part of a stacked bar: a verdict, its number and its width in percent."""

    verdict: str
    number: int
    percent: float


@dataclass(frozen=True)
class ClassRow:
    """Latents of one exclusive class before and after Latent Scaling."""

    method: str
    latent_class: str
    is_by_design: bool
    """Whether the recipe, and not the data, makes these latents exclusive."""
    claimed: int
    confirmed: Figure
    null_claimed: Figure
    null_confirmed: Figure
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class LatentRow:
    """One exclusive latent in numbers."""

    latent: int
    latent_class: str
    verdict: str
    note: str
    delta_norm: Figure
    nu_error: Figure
    nu_recon: Figure
    tokens: Figure
    documents: Figure


@dataclass(frozen=True)
class LatentRows:
    """The exclusive latents of a method in numbers, and how many there are of them."""

    method: str
    number: int
    rows: tuple[LatentRow, ...]


def method_rows(methods: Sequence[Method]) -> tuple[MethodRow, ...]:
    """Give a row for each method."""
    return tuple(_method_row(method) for method in methods)


def class_rows(methods: Sequence[Method]) -> tuple[ClassRow, ...]:
    """Give two rows for each crosscoder, chat-only and base-only, and two for what is so by design."""
    return tuple(
        row
        for method in methods
        for row in (
            *(class_row(method, name) for name in EXCLUSIVE_CLASSES),
            *(design_row(method, name) for name in EXCLUSIVE_CLASSES if method.designed[name].claimed),
        )
    )


def class_row(method: Method, latent_class: str) -> ClassRow:
    """Give what Latent Scaling made of the claims of one class."""
    found = method.found[latent_class]
    return ClassRow(
        method=method.name,
        latent_class=latent_class,
        is_by_design=False,
        claimed=found.claimed,
        confirmed=confirmed(found),
        null_claimed=count(method.null_count("counts", latent_class), NO_NULL_RUN),
        null_confirmed=count(method.null_count("confirmed_by_class", latent_class), NO_NULL_RUN),
        segments=_segments(found),
    )


def design_row(method: Method, latent_class: str) -> ClassRow:
    """Give what Latent Scaling made of the latents of one class that are exclusive by design."""
    designed = method.designed[latent_class]
    return ClassRow(
        method=method.name,
        latent_class=latent_class,
        is_by_design=True,
        claimed=designed.claimed,
        confirmed=confirmed(designed),
        null_claimed=missing("by design"),
        null_confirmed=missing("by design"),
        segments=_segments(designed),
    )


def confirmed(found: Outcomes) -> Figure:
    """Give how many are confirmed, and of how many of these the whole interval agrees."""
    if not found.claimed:
        return count(0)
    if found.untested == found.claimed:
        return missing(NOT_SCALED)
    number = count(found.confirmed)
    if found.beyond is None or not found.confirmed:
        return number
    return Figure(number.text, f"{found.beyond:,} beyond the interval")


def _segments(found: Outcomes) -> tuple[Segment, ...]:
    return tuple(
        Segment(verdict, number, round(100 * number / found.claimed, 2))
        for verdict, number in found.verdicts.items()
        if number
    )


def _method_row(method: Method) -> MethodRow:
    keys = [key for key in (method.files.evaluation or {}) if key.startswith("fve/")]
    names = [key.removeprefix("fve/") for key in keys]
    by_source = (
        tuple((name, share(method.fraction_explained(name))) for name in names) if len(names) > 1 else ()
    )
    found = method.all_found()
    reason = WHY_NO_CLASSES.get(method.kind)
    untested = NOT_SCALED if found.claimed and found.untested == found.claimed else ""
    return MethodRow(
        name=method.name,
        slot=method.slot,
        num_latents=count(method.num_latents),
        explained=share(method.fraction_explained(), NOT_EVALUATED),
        explained_by_source=by_source,
        mean_active=decimal(method.mean_active(), 1, NOT_EVALUATED),
        dead=share(method.dead_fraction(), NOT_EVALUATED),
        why_none=reason or "",
        claimed=missing(reason) if reason else count(found.claimed),
        confirmed=missing(reason) if reason else confirmed(found),
        refuted=missing(reason or untested) if reason or untested else count(found.refuted),
        undetermined=missing(reason or untested) if reason or untested else count(found.undetermined),
    )


def latent_rows(method: Method) -> LatentRows:
    """Give a row for each exclusive latent, by verdict and then number, up to `MAX_LATENT_ROWS`."""
    table, words = method.latents, verdict_words(method.latents)
    rows = np.flatnonzero(np.isin(table.words("latent_class").astype(str), EXCLUSIVE_CLASSES))
    rank = np.array([VERDICTS.index(word) for word in words[rows]], np.int64)
    ordered = rows[np.lexsort((table.numbers("latent")[rows], ~is_beyond(table)[rows], rank))]
    shown = tuple(_latent_row(method, row) for row in ordered[:MAX_LATENT_ROWS].tolist())
    return LatentRows(method.name, len(rows), shown)


def _latent_row(method: Method, row: int) -> LatentRow:
    table = method.latents
    by_design = ", by design" if is_by_design(table)[row] else ""

    def ratio(name: str) -> Figure:
        return interval(table.numbers(name)[row], method.half_interval(name)[row], reason="undefined")

    return LatentRow(
        latent=int(table.numbers("latent")[row]),
        latent_class=f"{table.words('latent_class')[row]}{by_design}",
        verdict=str(verdict_words(table)[row]),
        note=verdict_note(method, row),
        delta_norm=decimal(table.numbers("delta_norm")[row]),
        nu_error=ratio("nu_error"),
        nu_recon=ratio("nu_recon"),
        tokens=count(table.numbers("active_tokens")[row]),
        documents=documents(method, row),
    )
