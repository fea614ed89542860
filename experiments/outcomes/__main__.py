"""Try what is reported of crosscoders: ``python -m experiments.outcomes``."""

import dataclasses
import time
from pathlib import Path

import tyro
from rich.console import Console

from crosscoder_jax.terminal import print_table, progress_bar
from experiments.outcomes.outcomes import OUTCOMES, Outcome
from experiments.readme import markdown_table, replace_section

README = Path(__file__).with_name("README.md")
COLUMNS = ("what", "reported", "here", "as reported")


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """Train on small planted worlds and compare with what the literature reports."""

    num_seeds: int = 3
    """Seeds of each outcome; the 48 settings of drift and loudness have four each."""
    update_readme: bool = False
    """Replace the table in the README of the experiment."""


def main() -> None:
    """Run all, print the table."""
    config, started, found = tyro.cli(Outcomes), time.monotonic(), list[Outcome]()
    with progress_bar("outcomes") as progress:
        for done, outcome in enumerate(OUTCOMES):
            progress(done, len(OUTCOMES), "outcomes")
            found += outcome(range(config.num_seeds))
    rows = [(o.what, o.reported, o.found, "yes" if o.is_as_reported else "no") for o in found]
    print_table("reported outcomes on planted worlds", COLUMNS, rows)
    if config.update_readme:
        replace_section(README, "table", markdown_table(COLUMNS, rows))
    Console().print(f"{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
