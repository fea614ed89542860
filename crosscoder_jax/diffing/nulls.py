"""What a null run yields, to be put beside what a real one does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crosscoder_jax.activations.atomic import read_json
from crosscoder_jax.configs import config_differences
from crosscoder_jax.training.runs import Run

_COUNTED = ("counts", "claimed", "confirmed", "confirmed_by_class", "by_design")
_SEEDS = ("seed", "data_seed")


def read_null_counts(run: Run, folder: Path) -> dict[str, Any]:
    """Read the class counts of a null run, once it is known to be the null of a run.

    The two must agree in recipe, split, window, store and measured tokens; seeds may differ.

    Args:
        run: the real run.
        folder: of the null run, already diffed.

    Returns:
        ``run``, ``kind`` and the counts of the null run's summary.

    Raises:
        ValueError: if the folder holds no diffed null run, or that of another recipe, listing what
            differs.
    """
    recorded = _read(folder / "config.json", f"{folder} is not a run folder; make one with 'train --null'")
    if recorded.get("null") is None:
        raise ValueError(f"{folder}: was trained on the data itself: make a null run with 'train --null'")
    own = read_json(run.folder / "config.json")
    differences = config_differences(_comparable(own), _comparable(recorded))
    if differences:
        raise ValueError(
            f"{folder}: is the null of another run: {'; '.join(differences)}: "
            "train it with the options of the run and --null"
        )
    summary = _read(folder / "diff" / "summary.json", f"run 'diff --run {folder}' first")
    if "counts" not in summary:
        raise ValueError(f"{folder}: reads {summary['sources']}: only two models have exclusive latents")
    if summary["num_tokens"] != run.held_out().num_tokens:
        raise ValueError(
            f"{folder}: was diffed on {summary['num_tokens']} tokens, and {run.folder} is on "
            f"{run.held_out().num_tokens}: diff both on one store"
        )
    counts = {name: summary[name] for name in _COUNTED if name in summary}
    return {"run": str(folder), "kind": recorded["null"], **counts}


def _read(path: Path, remedy: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: is missing: {remedy}")
    return read_json(path)


def _comparable(recorded: Mapping[str, Any]) -> dict[str, Any]:
    recipe = {name: value for name, value in recorded["train"].items() if name not in _SEEDS}
    order = {name: recorded[name] for name in ("split", "window_tokens", "store_identity")}
    return {"train": recipe, **order, "lanes": recorded.get("lanes", 1)}
