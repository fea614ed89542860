"""What is exclusive where nothing is: ``python -m experiments.nulls``."""

import sys
import time
from pathlib import Path

import tyro
from rich.console import Console

from crosscoder_jax.terminal import print_table
from experiments.nulls.config import Nulls
from experiments.nulls.measure import COLUMNS, broken_expectations, measure, table_rows
from experiments.readme import markdown_table, replace_section

README = Path(__file__).with_name("README.md")


def main() -> None:
    """Parse the options, run, and exit with 1 if an exact expectation does not hold."""
    started = time.monotonic()
    config = tyro.cli(Nulls)
    found = measure(config)
    rows = table_rows(found)
    print_table("held-out documents; exclusive latents: claimed / confirmed", COLUMNS, rows)
    if config.update_readme:
        replace_section(README, "table", markdown_table(COLUMNS, rows))
    Console().print(f"{time.monotonic() - started:.0f} s in all")
    broken = broken_expectations(found)
    for sentence in broken:
        Console(stderr=True, soft_wrap=True).print(f"does not hold: {sentence}", style="red", markup=False)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
