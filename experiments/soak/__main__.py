"""Killed at random, on ever other meshes, and still the same run: ``python -m experiments.soak``."""

import sys
import time

import jax
import tyro
from rich.console import Console

from crosscoder_jax.terminal import print_table
from experiments.soak.config import Soak
from experiments.soak.rounds import Outcome, play_round


def main() -> None:
    """Play rounds until the minutes are over; exit with 1 if what must hold does not."""
    config = tyro.cli(Soak)
    jax.config.update("jax_enable_x64", True)  # to read the weights as they are
    began = time.monotonic()
    outcomes: list[Outcome] = []
    while not outcomes or time.monotonic() - began < 60 * config.minutes:
        outcomes.append(play_round(config, len(outcomes)))
        Console(stderr=True).print(f"round {len(outcomes)}: {time.monotonic() - began:.0f} s")
    rows = [(str(i), *described(outcome)) for i, outcome in enumerate(outcomes)]
    columns = ("round", "starts", "all killed", "one killed", "told to end", "meshes", "tokens", "difference")
    print_table("killed at random, against the run that was not", columns, rows)
    sys.exit(0 if all(holds(outcome, config) for outcome in outcomes) else 1)


def described(outcome: Outcome) -> tuple[str, ...]:
    """Return the row of a round."""
    ended = (str(number) for number in outcome.kills.values())
    tokens = "each once an epoch" if outcome.is_covered else "NOT EVEN"
    return str(outcome.starts), *ended, str(len(set(outcome.meshes))), tokens, f"{outcome.difference:.1e}"


def holds(outcome: Outcome, config: Soak) -> bool:
    """Tell whether a round was killed as often as asked, and ended as the run that was not."""
    is_killed = sum(outcome.kills.values()) == config.kills
    is_the_run = outcome.is_covered and outcome.is_logged and outcome.difference <= config.tolerance
    return is_killed and is_the_run


if __name__ == "__main__":
    main()
