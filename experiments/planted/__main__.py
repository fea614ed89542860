"""What four sparsities make of planted features: ``python -m experiments.planted``."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.console import Console

from crosscoder_jax.terminal import print_table, progress_bar
from experiments.planted.methods import ABLATIONS, METHODS, ablated, recipe
from experiments.planted.scores import claims, recovery
from experiments.planted.tables import Row, update_readme, write_results
from experiments.planted.trial import measure, train_seeds
from experiments.planted.world import WORLDS


@dataclasses.dataclass(frozen=True)
class Planted:
    """Train every method on planted worlds and compare what it calls chat-only with the truth."""

    worlds: tuple[Literal["small", "hard", "reference"], ...] = ("small", "hard")
    """Which worlds; `reference` has the size on which the reference library was measured, and takes long."""
    methods: tuple[Literal["L1", "TopK", "BatchTopK", "JumpReLU"], ...] = METHODS
    """Which sparsities."""
    num_seeds: int = 5
    """Seeds, each a world, tokens and a crosscoder of its own."""
    num_tokens: int | None = None
    """Training tokens of each crosscoder; 600,000 by default, 2,300,000 in the world `reference`."""
    ablation: bool = False
    """Change one thing at a time in the BatchTopK recipe in place of comparing methods."""
    update_readme: bool = False
    """Put the table and the figure into the README of this experiment, too."""
    output: Path = Path("results/planted")
    """Folder of the table and the figure."""

    @property
    def section(self) -> str:
        """The section of the README that these settings fill."""
        if self.ablation:
            return "ablation"
        return "reference" if self.worlds == ("reference",) else "methods"


def main() -> None:
    """Run, print the table, and fail if a method fails what is expected of it."""
    config = tyro.cli(Planted)
    rows: list[Row] = []
    methods = ("BatchTopK", *ABLATIONS) if config.ablation else config.methods
    for world_name in config.worlds:
        for method in methods:
            rows += run(config, world_name, method)
    write_results(rows, config.output)
    if config.update_readme:
        update_readme(rows, config.section)
    columns = ("method", "by", "FVE", "L0", "dead", "precision", "recall", "F1")
    for world_name in config.worlds:
        cells = [row.short_cells() for row in rows if row.world == world_name]
        print_table(f"chat-only latents in the world {world_name}, mean and 95 % interval", columns, cells)
    failed = [row for row in rows if row.is_below_expectation]
    for row in failed:
        Console(stderr=True).print(
            f"{row.world}, {row.method}: F1 {row.f1} is below what is expected", style="red"
        )
    sys.exit(1 if failed else 0)


def run(config: Planted, world_name: str, method: str) -> list[Row]:
    """Train and measure one method on one world, all seeds."""
    world = WORLDS[world_name]
    num_tokens = config.num_tokens or (2_300_000 if world_name == "reference" else 600_000)
    num_latents = 2 * sum(world.counts) if world_name != "reference" else 1024
    base = "BatchTopK" if method in ABLATIONS else method
    train_config = recipe(base, world, num_latents=num_latents, num_tokens=num_tokens)
    if method in ABLATIONS:
        train_config = ablated(train_config, method)
    started = time.monotonic()
    with progress_bar(f"{world_name}, {method}") as progress:
        trained = train_seeds(train_config, world, range(config.num_seeds), progress=progress)
    measured = [measure(one, world) for one in trained]
    seconds = time.monotonic() - started
    judged = [claims(m, one.truth, world) for m, one in zip(measured, trained, strict=True)]
    found = [recovery(m, one.truth, world) for m, one in zip(measured, trained, strict=True)]
    common = {
        "fve": [m.fve for m in measured],
        "l0": [m.l0 for m in measured],
        "dead": [float(np.mean(m.fired == 0)) for m in measured],
        "mean_max_cosine": [f["mean max cosine"] for f in found],
        "matched": [f["matched"] for f in found],
    }
    return [
        Row.of_seeds(world_name, method, by, [j[by] for j in judged], common, seconds) for by in judged[0]
    ]


if __name__ == "__main__":
    main()
