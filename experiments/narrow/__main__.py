"""Which method finds which narrow change: ``python -m experiments.narrow``."""

import csv
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.console import Console

from crosscoder_jax.terminal import print_table, progress_bar
from experiments.narrow.changes import CHANGES, Change, measure_change
from experiments.narrow.measure import Found
from experiments.narrow.methods import METHODS, method_recipe
from experiments.narrow.organisms import ORGANISMS
from experiments.planted.tables import Interval
from experiments.planted.trial import train_seeds
from experiments.readme import markdown_table, replace_section

README = Path(__file__).with_name("README.md")
COLUMNS = (
    "change",
    "method",
    "best latent",
    "top ten",
    "delta_norm",
    "confirmed",
    "by design",
    "of these right",
    "FVE",
    "dead",
    "minutes",
)
REAL_COLUMNS = (*COLUMNS, "KL closed by ten", "KL closed by all")
PLANTED = METHODS
REAL = ("crosscoder", "difference SAE", "delta basis", "delta basis, dedicated", "delta basis, parted")


@dataclasses.dataclass(frozen=True)
class Narrow:
    """Train every method on narrow changes, planted and real; see which finds the changed tokens."""

    part: Literal["planted", "organisms", "all"] = "all"
    """Planted features, fine-tunes of a real model, or both."""
    num_seeds: int = 3
    """Seeds of the planted changes, each a world, tokens and a crosscoder of its own."""
    num_tokens: int = 500_000
    """Training tokens of each planted change."""
    organisms: tuple[Literal["domain", "trigger", "habit"], ...] = ("domain", "trigger", "habit")
    """Fine-tunes to make and compare."""
    organism_seeds: int = 2
    """Seeds of the crosscoders of each organism."""
    organism_tokens: int = 60_000
    """Tokens harvested of each organism."""
    organism_steps: int = 500
    """Training steps on each organism."""
    update_readme: bool = False
    """Replace the tables in the README of the experiment."""
    output: Path = Path("results/narrow")
    """Folder of the tables as csv, and of models, activations and runs, which are kept."""


def main() -> None:
    """Run, print the tables and write them."""
    config = tyro.cli(Narrow)
    if config.part in ("planted", "all"):
        show(config, "planted", COLUMNS, planted_rows)
    if config.part in ("organisms", "all"):
        show(config, "organisms", REAL_COLUMNS, organism_rows)


Row = tuple[str, ...]


def show(config: Narrow, part: str, columns: Sequence[str], make_rows: Callable[[Narrow], list[Row]]) -> None:
    """Print the table of a part, and write it."""
    started = time.monotonic()
    rows = make_rows(config)
    print_table("changed tokens: average precision, mean and 95 % interval over seeds", columns, rows)
    write_csv([columns, *rows], config.output / f"{part}.csv")
    minutes = f"{(time.monotonic() - started) / 60:.0f} minutes."
    if config.update_readme:
        replace_section(README, part, f"{markdown_table(columns, rows)}\n{minutes}\n")
    Console().print(minutes)


def planted_rows(config: Narrow) -> list[Row]:
    """Train and measure every method on every planted change."""
    return [planted_row(config, change, name) for change in CHANGES for name in PLANTED]


def planted_row(config: Narrow, change: Change, name: str) -> Row:
    """Train and measure one method on one planted change, all seeds."""
    recipe = method_recipe(name, change.world, config.num_tokens)
    started = time.monotonic()
    with progress_bar(f"{change.name}: {name}") as progress:
        trained = train_seeds(recipe, change.world, range(config.num_seeds), progress=progress)
    minutes = (time.monotonic() - started) / 60 / config.num_seeds
    found = [measure_change(one, change.world) for one in trained]
    return (change.name, name, *cells(found), f"{minutes:.1f}")


def organism_rows(config: Narrow) -> list[Row]:
    """Make every organism, then train and measure every method on it, all seeds."""
    from experiments.narrow import real  # needs torch, which planted changes do not

    rows = []
    for organism in (known for known in ORGANISMS if known.name in config.organisms):
        store = real.write_store(organism, config.output, config.organism_tokens)
        is_changed = real.changed_tokens(organism, store, config.output / "models" / organism.name)
        change = f"{organism.name} ({is_changed.mean():.0%} of tokens)"
        runs = config.output / "runs" / f"{store.path.name}-{config.organism_steps}"
        for name in REAL:
            found = []
            for seed in range(config.organism_seeds):
                recipe = METHODS[name](real.real_recipe(store, config.organism_steps, seed))
                label = f"{organism.name}: {name}, seed {seed}"
                found.append(
                    real.train_and_measure(recipe, store, is_changed, runs / f"{name}-{seed}", label)
                )
            minutes = f"{np.mean([one.minutes for one in found]):.1f}"
            closed = [
                interval([getattr(one, f"closed_by_{which}") for one in found]) for which in ("top", "all")
            ]
            rows.append((change, name, *cells([one.found for one in found]), minutes, *closed))
    return rows


def cells(found: Sequence[Found]) -> Row:
    """Return what was found, over seeds, in the order of the columns."""
    fields = ("best", "top", "delta_norm", "confirmed", "designed", "precision", "fve", "dead")
    return tuple(interval([getattr(one, field) for one in found]) for field in fields)


def interval(values: Sequence[float]) -> str:
    """Return mean and interval over the seeds that have a value."""
    known = [value for value in values if not math.isnan(value)]
    return str(Interval.over(known)).replace(" ± nan", "") if known else "-"


def write_csv(rows: Sequence[Sequence[str]], path: Path) -> None:
    """Write a table with its head as csv."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main()
