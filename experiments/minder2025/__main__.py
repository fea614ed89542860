"""One pair from harvest to report: ``python -m experiments.minder2025 --pair gemma-2-2b --on h200``."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from crosscoder_jax import cli
from crosscoder_jax.commands import Calibrate, Diff, Evaluate, Report
from crosscoder_jax.report import ReportConfig
from experiments.minder2025.pairs import HARDWARE, PAIRS, harvest_command, train_command
from experiments.minder2025.smoke import small_harvest, small_pair, small_train


@dataclasses.dataclass(frozen=True)
class Minder2025:
    """Harvest, train, calibrate, evaluate, diff and report one pair of the paper; what is done is kept."""

    pair: Literal["gemma-2-2b", "llama-3.2-1b", "llama-3.1-8b"] = "gemma-2-2b"
    """The models."""
    on: Literal["h200", "v6e-8", "v5p-16", "cpu"] = "h200"
    """The chips that training is spread over. Harvest where torch finds a GPU."""
    until: Literal["harvest", "train", "report"] = "report"
    """The last stage to run: activations may be harvested on another machine than they are trained on."""
    smoke: bool = False
    """Run the same commands on tiny random models of the same architectures and a few thousand tokens."""
    output: Path = Path("results/minder2025")
    """Where activations, run and report go."""


def main() -> None:
    """Parse the options and run."""
    run(tyro.cli(Minder2025))


def run(config: Minder2025) -> Path:
    """Run every stage that is not done; return the path of the report."""
    pair, hardware = PAIRS[config.pair], HARDWARE[config.on]
    folder = config.output / ("smoke" if config.smoke else "") / pair.name
    if config.smoke:
        pair = small_pair(pair, config.output / "smoke")
    harvest, train = harvest_command(pair, folder), train_command(pair, folder, hardware)
    if config.smoke:
        harvest, train = small_harvest(harvest, config.output / "smoke" / "texts"), small_train(train)
    report = folder / "report.html"
    cli.harvest(harvest)
    if config.until == "harvest":
        return report
    cli.train(train)
    if config.until == "train":
        return report
    cli.calibrate(Calibrate(train.output))
    cli.evaluate(Evaluate(train.output))
    cli.diff(Diff(train.output))
    cli.report(Report(ReportConfig((train.output,)), report))
    return report


if __name__ == "__main__":
    main()
