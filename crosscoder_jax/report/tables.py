"""The tables of the page as rows of formatted numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

from crosscoder_jax.report.content import (
    Kind,
    Method,
    has_latent_scaling,
)
from crosscoder_jax.report.names import CONFIRMED, EXCLUSIVE_CLASSES, NOT_TESTED, VERDICTS
from crosscoder_jax.report.numbers import Figure, count, decimal, missing, share

NOT_EVALUATED = "run crosscoder-jax evaluate"
NO_NULL_RUN = "diffed without a null run"
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
    claimed: Figure
    confirmed: Figure


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
    claimed: int
    confirmed: Figure
    null_claimed: Figure
    null_confirmed: Figure
    segments: tuple[Segment, ...]


def method_rows(methods: Sequence[Method]) -> tuple[MethodRow, ...]:
    """Give a row for each method."""
    return tuple(_method_row(method) for method in methods)


def class_rows(methods: Sequence[Method]) -> tuple[ClassRow, ...]:
    """Give two rows for each crosscoder: chat-only and base-only."""
    return tuple(class_row(method, name) for method in methods for name in EXCLUSIVE_CLASSES)


def class_row(method: Method, latent_class: str) -> ClassRow:
    """Give what Latent Scaling made of the claims of one class."""
    claimed = method.claimed(latent_class)
    numbers = {verdict: method.verdicts(verdict, latent_class) for verdict in VERDICTS}
    segments = tuple(Segment(verdict, n, round(100 * n / claimed, 2)) for verdict, n in numbers.items() if n)
    return ClassRow(
        method=method.name,
        latent_class=latent_class,
        claimed=claimed,
        confirmed=_confirmed(method, latent_class),
        null_claimed=count(method.null_count("counts", latent_class), NO_NULL_RUN),
        null_confirmed=count(method.null_count("confirmed_by_class", latent_class), NO_NULL_RUN),
        segments=segments,
    )


def _method_row(method: Method) -> MethodRow:
    keys = [key for key in (method.files.evaluation or {}) if key.startswith("fve/")]
    names = [key.removeprefix("fve/") for key in keys]
    by_source = (
        tuple((name, share(method.fraction_explained(name))) for name in names) if len(names) > 1 else ()
    )
    reason = WHY_NO_CLASSES.get(method.kind)
    return MethodRow(
        name=method.name,
        slot=method.slot,
        num_latents=count(method.num_latents),
        explained=share(method.fraction_explained(), NOT_EVALUATED),
        explained_by_source=by_source,
        mean_active=decimal(method.mean_active(), 1, NOT_EVALUATED),
        dead=share(method.dead_fraction(), NOT_EVALUATED),
        claimed=missing(reason) if reason else count(method.claimed()),
        confirmed=missing(reason) if reason else _confirmed(method, None),
    )


def _confirmed(method: Method, latent_class: str | None) -> Figure:
    claimed = method.claimed(latent_class)
    if not claimed:
        return count(0)
    if not has_latent_scaling(method) or method.verdicts(NOT_TESTED, latent_class) == claimed:
        return missing("Latent Scaling was not run on them")
    return count(method.verdicts(CONFIRMED, latent_class))
