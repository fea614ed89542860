"""Means and intervals over seeds; the table as csv and markdown, the figure as PNG."""

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from experiments.planted.scores import Claims
from experiments.readme import markdown_table, replace_section

README = Path(__file__).with_name("README.md")

_MARKERS = {"delta_norm": "o", "Latent Scaling": "^", "both": "s"}

EXPECTED_F1 = {("reference", "BatchTopK", "both"): 0.95}
"""What must be reached: the reference library has 0.77 there."""


class Interval(NamedTuple):
    """A mean over seeds and half of its 95 % interval (Student's t); NaN with a single seed."""

    mean: float
    half_width: float

    @classmethod
    def over(cls, values: Sequence[float]) -> "Interval":
        """Return mean and interval of one value per seed."""
        array = np.asarray(values, np.float64)
        if len(array) < 2:
            return cls(float(array.mean()), float("nan"))
        spread = array.std(ddof=1) / np.sqrt(len(array))
        return cls(float(array.mean()), float(stats.t.ppf(0.975, len(array) - 1) * spread))

    def __str__(self) -> str:
        """Write mean ± half width."""
        return f"{self.mean:.3f}" if np.isnan(self.half_width) else f"{self.mean:.3f} ± {self.half_width:.3f}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One method on one world, judged in one way."""

    world: str
    method: str
    by: str
    """What called latents chat-only."""
    num_seeds: int
    fve: Interval
    l0: Interval
    dead: Interval
    mean_max_cosine: Interval
    matched: Interval
    claimed: Interval
    precision: Interval
    recall: Interval
    f1: Interval
    seconds: float
    """Training and measuring all seeds."""

    @classmethod
    def of_seeds(
        cls,
        world: str,
        method: str,
        by: str,
        claims: Sequence[Claims],
        common: Mapping[str, Sequence[float]],
        seconds: float,
    ) -> "Row":
        """Summarise the seeds."""
        return cls(
            world=world,
            method=method,
            by=by,
            num_seeds=len(claims),
            **{name: Interval.over(values) for name, values in common.items()},
            claimed=Interval.over([c.num_claimed for c in claims]),
            precision=Interval.over([c.precision for c in claims]),
            recall=Interval.over([c.recall for c in claims]),
            f1=Interval.over([c.f1 for c in claims]),
            seconds=seconds,
        )

    @property
    def is_below_expectation(self) -> bool:
        """Whether this row must reach an F1 and does not."""
        return self.f1.mean < EXPECTED_F1.get((self.world, self.method, self.by), -np.inf)

    def cells(self) -> tuple[str, ...]:
        """Return the row as text for a table."""
        numbers = (self.fve, self.l0, self.dead, self.precision, self.recall, self.f1)
        return (self.world, self.method, self.by, *(str(value) for value in numbers))

    def short_cells(self) -> tuple[str, ...]:
        """Return the row for a narrow terminal, without its world."""
        means = (f"{self.fve.mean:.2f}", f"{self.l0.mean:.1f}", f"{self.dead.mean:.2f}")
        by = {"delta_norm": "norms", "Latent Scaling": "scaling"}.get(self.by, self.by)
        judged = (self.precision, self.recall, self.f1)
        return (self.method, by, *means, *(f"{value.mean:.2f}±{value.half_width:.2f}" for value in judged))


def write_results(rows: Sequence[Row], folder: Path) -> None:
    """Write ``planted.csv``, ``planted.md`` and ``planted.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(rows, folder / "planted.csv")
    (folder / "planted.md").write_text(markdown(rows))
    _write_figure(rows, folder / "planted.png")


def markdown(rows: Sequence[Row]) -> str:
    """Return the table as markdown."""
    head = ("world", "method", "claimed by", "FVE", "L0", "dead", "precision", "recall", "F1")
    return markdown_table(head, [row.cells() for row in rows])


def update_readme(rows: Sequence[Row], section: str, readme: Path = README) -> None:
    """Replace a section's table in the README, and its figure beside it.

    Raises:
        ValueError: if the README has no such section.
    """
    seconds = sum({(row.world, row.method): row.seconds for row in rows}.values())
    minutes = f"{rows[0].num_seeds} seeds, {seconds / 60:.0f} minutes in all."
    figure = f"{section}.png"
    replace_section(readme, section, f"{markdown(rows)}\n{minutes}\n\n![precision and recall]({figure})\n")
    _write_figure(rows, readme.with_name(figure))


def _write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        names = [field.name for field in dataclasses.fields(Row)]
        values = [[getattr(row, name) for name in names] for row in rows]
        is_interval = [isinstance(value, Interval) for value in values[0]]
        head = [
            column
            for name, wide in zip(names, is_interval, strict=True)
            for column in ([name, f"{name}_half_width"] if wide else [name])
        ]
        writer.writerow(head)
        for row in values:
            writer.writerow(
                [part for value in row for part in (value if isinstance(value, Interval) else [value])]
            )


def _write_figure(rows: Sequence[Row], path: Path) -> None:
    worlds = list(dict.fromkeys(row.world for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    size = (10, 1.2 + 0.5 * len(methods) * len(worlds))
    figure = Figure(figsize=size)
    axes = figure.subplots(len(worlds), 2, squeeze=False, sharex=True, sharey=True)
    for panels, world in zip(axes, worlds, strict=True):
        for axis, name in zip(panels, ("precision", "recall"), strict=True):
            _draw_dots(axis, [row for row in rows if row.world == world], name, methods)
            axis.set_title(f"{name} of chat-only latents, world {world}", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / size[1]))
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="upper center", ncols=3, fontsize=9, frameon=False
    )
    figure.savefig(path, dpi=130)


def _draw_dots(axis: Axes, rows: Sequence[Row], name: str, methods: Sequence[str]) -> None:
    """Draw one line of dots with intervals per method; what is not a number is left out."""
    for offset, (by, marker) in zip((-0.2, 0.0, 0.2), _MARKERS.items(), strict=True):
        shown = [row for row in rows if row.by == by]
        values: list[Interval] = [getattr(row, name) for row in shown]
        axis.errorbar(
            [value.mean for value in values],
            [methods.index(row.method) + offset for row in shown],
            xerr=[float(np.nan_to_num(value.half_width)) for value in values],
            fmt=marker,
            label=f"claimed by {by}",
            markersize=6,
            linewidth=1.2,
        )
    axis.set(xlim=(-0.03, 1.05), yticks=range(len(methods)), ylim=(len(methods) - 0.5, -0.5))
    axis.set_yticklabels(methods)
    axis.grid(axis="x", alpha=0.3)
