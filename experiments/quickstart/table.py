"""The table that the quickstart prints: what each run found on held-out text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crosscoder_jax.activations.atomic import read_json
from crosscoder_jax.diffing import Verdict

COLUMNS = (
    *("method", "variance explained", "L0", "dead", "claimed by the histogram"),
    *("confirmed", "beyond the interval", "refuted", "undetermined"),
)


def table_rows(runs: Sequence[Path]) -> list[tuple[str, ...]]:
    """Return a row a run, in the order of ``COLUMNS``.

    Args:
        runs: folders, each evaluated and diffed.
    """
    return [_row(run) for run in runs]


def _row(run: Path) -> tuple[str, ...]:
    evaluation, summary = read_json(run / "evaluation.json"), read_json(run / "diff" / "summary.json")
    return (
        run.name,
        f"{evaluation['fve']:.3f}",
        f"{evaluation['l0_inference_rule']:.1f}",
        f"{100 * evaluation['dead']:.1f} %",
        *_claims(summary),
    )


def _claims(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what became of the latents claimed for one model; dashes for what was not compared or tested."""
    verdicts = {Verdict(name): number for name, number in summary.get("verdicts", {}).items()}
    claimed, beyond = summary.get("claimed", "-"), summary.get("confirmed_beyond_interval", "-")
    if not verdicts:
        return (str(claimed), "-", "-", "-", "-")
    refuted = sum(number for verdict, number in verdicts.items() if verdict.is_artefact)
    numbers = (claimed, verdicts[Verdict.CONFIRMED], beyond, refuted, verdicts[Verdict.UNDETERMINED])
    return tuple(str(number) for number in numbers)
