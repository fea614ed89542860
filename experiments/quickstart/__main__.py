"""Run the main job end to end on real models and text: ``python -m experiments.quickstart``."""

import os
import sys
import time
from pathlib import Path

import tyro
from rich.console import Console

from crosscoder_jax import cli
from crosscoder_jax.commands import Calibrate, Diff, Evaluate, Report, Train
from crosscoder_jax.language_models import HarvestConfig, TextSource
from crosscoder_jax.report import ReportConfig
from crosscoder_jax.terminal import print_table, progress_bar
from experiments.quickstart.config import (
    FineTuneConfig,
    Quickstart,
    crosscoder_command,
    difference_command,
    l1_command,
    runs_to_show,
)
from experiments.quickstart.table import COLUMNS, table_rows
from experiments.quickstart.texts import LABELS, write_texts

_LAYER = 14


def main() -> None:
    """Parse the options and run; every mistake of the user is one line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when transformers is imported; our bars show more
    try:
        run(tyro.cli(Quickstart))
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False)
        sys.exit(1)


def run(config: Quickstart) -> None:
    """Make what is missing, then print the table and the path of the report."""
    started = time.monotonic()
    packages, texts = config.output / "packages", config.output / "texts"
    write_texts(texts, packages)
    base, chat = _models(config, packages, texts)
    cli.harvest(_harvest_command(config, base, chat, texts))
    commands = [crosscoder_command(config)]
    if base != chat:
        commands.append(difference_command(config))
    if config.compare_l1:
        commands.append(l1_command(config))
    for command in commands:
        _run_and_diff(command)
    report = config.folder / "report.html"
    runs = runs_to_show(config, commands)
    cli.report(Report(ReportConfig(runs), report))
    # A method a column: there are few of them, and a terminal is 80 characters wide.
    head, *lines = zip(COLUMNS, *table_rows(runs), strict=True)
    print_table("held-out text", head, lines)
    Console().print(f"{time.monotonic() - started:.0f} s in all. Open {report}", soft_wrap=True)


def _models(config: Quickstart, packages: Path, texts: Path) -> tuple[str, str]:
    """Return the two models, made on the spot unless they were named."""
    if config.base is not None:
        return config.base, config.chat or config.base
    from experiments.quickstart.finetune import write_after_model
    from experiments.quickstart.models import write_before_model

    before = config.output / "models" / "SmolLM2-135M-Instruct"
    after = config.output / "models" / f"SmolLM2-135M-Pig-Latin-{config.fine_tune_steps}-{config.seed}"
    with progress_bar("convert the model before"):
        write_before_model(before, packages)
    with progress_bar("fine-tune on Pig Latin") as progress:
        recipe = FineTuneConfig(num_steps=config.fine_tune_steps, seed=config.seed)
        write_after_model(after, before, texts, recipe, progress)
    return str(before), str(after)


def _harvest_command(config: Quickstart, base: str, chat: str, texts: Path) -> HarvestConfig:
    layer = config.layer if config.layer is not None or config.base else _LAYER
    return HarvestConfig(
        store=str(config.folder / "store"),
        base=base,
        chat=chat,
        texts=tuple(TextSource(label, str(texts / f"{label}.compare.jsonl")) for label in LABELS),
        layers=None if layer is None else (layer,),
        max_tokens=config.tokens,
        skip_positions=4,  # the first words of a text are unlike all others, and so is the change there
        context=256,  # one window a document: many documents, so that errors between them can be told
        outlier_multiple=5.0,
    )


def _run_and_diff(command: Train) -> None:
    """Train, calibrate, measure and diff one run; a run already diffed is kept."""
    run = command.output
    if (run / "diff" / "summary.json").is_file():
        return
    cli.train(command)
    if command.l1 is None:
        cli.calibrate(Calibrate(run))
    cli.evaluate(Evaluate(run))
    cli.diff(Diff(run))


if __name__ == "__main__":
    main()
