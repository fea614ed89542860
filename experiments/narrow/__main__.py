"""Which method finds which narrow change: ``python -m experiments.narrow``."""

import csv
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from crosscoder_jax.terminal import print_table, progress_bar
from experiments.narrow.changes import CHANGES, Change
from experiments.narrow.measure import Found, measure_change
from experiments.narrow.methods import METHODS, method_recipe
from experiments.planted.tables import Interval
from experiments.planted.trial import train_seeds
from experiments.readme import markdown_table, replace_section

README = Path(__file__).with_name("README.md")
COLUMNS = ("change", "method", "best latent", "top ten", "delta_norm", "FVE", "dead")


@dataclasses.dataclass(frozen=True)
class Narrow:
    """Train every method on planted narrow changes; see which finds the changed tokens."""

    num_seeds: int = 3
    """Seeds, each a world, tokens and a crosscoder of its own."""
    num_tokens: int = 1_200_000
    """Training tokens of each."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which methods."""
    update_readme: bool = False
    """Replace the table in the README of the experiment."""
    output: Path = Path("results/narrow")
    """Folder of the table as csv."""


def main() -> None:
    """Run, print the table and write it."""
    config, started = tyro.cli(Narrow), time.monotonic()
    rows = [row(config, change, name) for change in CHANGES for name in config.methods]
    print_table("changed tokens: average precision, mean and 95 % interval over seeds", COLUMNS, rows)
    write_csv(rows, config.output / "narrow.csv")
    minutes = f"{config.num_seeds} seeds, {(time.monotonic() - started) / 60:.0f} minutes in all."
    if config.update_readme:
        replace_section(README, "table", f"{markdown_table(COLUMNS, rows)}\n{minutes}\n")
    Console().print(minutes)


def row(config: Narrow, change: Change, name: str) -> tuple[str, ...]:
    """Train and measure one method on one change, all seeds."""
    recipe = method_recipe(name, change.world, config.num_tokens)
    with progress_bar(f"{change.name}: {name}") as progress:
        trained = train_seeds(recipe, change.world, range(config.num_seeds), progress=progress)
    return cells(change.name, name, [measure_change(one, change.world) for one in trained])


def cells(change: str, name: str, found: Sequence[Found]) -> tuple[str, ...]:
    """Return a row of the table."""
    values = (
        Interval.over([getattr(one, field) for one in found])
        for field in ("best", "top", "delta_norm", "fve", "dead")
    )
    return (change, name, *(str(value).replace("nan", "-") for value in values))


def write_csv(rows: Sequence[Sequence[str]], path: Path) -> None:
    """Write the table as csv."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
