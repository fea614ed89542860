"""One pair from harvest to report: ``python -m experiments.minder2025 --pair gemma-2-2b --on h200``."""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

import tyro

from crosscoder_jax import cli
from crosscoder_jax.activations import ActivationStore
from crosscoder_jax.commands import Calibrate, Diff, Evaluate, Processes, Report
from crosscoder_jax.report import ReportConfig
from crosscoder_jax.sharding import from_first
from crosscoder_jax.training.preemption import PREEMPTED, PreemptedError
from experiments.minder2025.pairs import HARDWARE, PAIRS, harvest_command, train_command
from experiments.minder2025.smoke import small_harvest, small_pair, small_train


@dataclasses.dataclass(frozen=True)
class Minder2025(Processes):
    """Harvest, train, calibrate, evaluate, diff and report one pair of the paper; what is done is kept.

    Several processes (--distributed, given on every host) begin with what was harvested before.
    """

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
    """Parse the options and run; exit with 75 when told to end while training, which is saved."""
    try:
        run(tyro.cli(Minder2025))
    except PreemptedError as told:
        print(f"{told}: give the same command again", file=sys.stderr)
        sys.exit(PREEMPTED)


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
    processes = _processes(config)
    if config.is_distributed:
        ActivationStore.open(harvest.store)  # or else it says what is missing
    else:
        cli.harvest(harvest)
    if config.until == "harvest":
        return report
    cli.train(dataclasses.replace(train, **processes))
    if config.until == "train":
        return report
    shards = {"data_shards": train.data_shards, "latent_shards": train.latent_shards}
    cli.calibrate(Calibrate(train.output, **shards, **processes))
    cli.evaluate(Evaluate(train.output, **shards, **processes))
    cli.diff(Diff(train.output, **shards, **processes))
    from_first(lambda: _write_report(train.output, report))
    return report


def _processes(config: Processes) -> dict[str, Any]:
    """Return the options of every command that say in which processes it runs."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(Processes)}


def _write_report(run_folder: Path, report: Path) -> bytes:
    cli.report(Report(ReportConfig((run_folder,)), report))
    return b""


if __name__ == "__main__":
    main()
