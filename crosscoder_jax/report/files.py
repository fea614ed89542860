"""Read what training, evaluation and diffing left in a run folder, and say plainly what is not there."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crosscoder_jax.activations.atomic import read_json
from crosscoder_jax.training import tracking


@dataclass(frozen=True)
class LatentTable:
    """Columns of `diff/latents.parquet`: numbers as float64 with NaN for null, words as objects."""

    columns: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.columns["latent"])

    def has(self, name: str) -> bool:
        """Tell whether the table has a column."""
        return name in self.columns

    def numbers(self, name: str) -> np.ndarray:
        """Give a numeric column `[latent]`; all NaN when the table has none of that name."""
        if name not in self.columns:
            return np.full(len(self), np.nan)
        return self.columns[name].astype(np.float64, copy=False)

    def words(self, name: str) -> np.ndarray:
        """Give a column of words `[latent]`; all empty when the table has none of that name."""
        if name not in self.columns:
            return np.full(len(self), "", dtype=object)
        return self.columns[name]

    def suffixes(self, prefix: str) -> tuple[str, ...]:
        """Give what follows `prefix` in the names of the columns that begin with it, in order."""
        return tuple(name.removeprefix(prefix) for name in self.columns if name.startswith(prefix))


@dataclass(frozen=True)
class RunFiles:
    """Everything a report reads of one run; `None` or empty where an optional file is missing."""

    folder: Path
    config: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]
    evaluation: dict[str, Any] | None
    summary: dict[str, Any]
    latents: LatentTable
    snippets: dict[int, list[dict[str, Any]]] | None
    provenance: dict[str, Any]
    """What the published crosscoder says of its store and its harvest; empty before training ends."""
    weights_sha256: str = ""
    """Hash by which the published crosscoder names its weights; empty before training ends."""


def read_run(folder: Path) -> RunFiles:
    """Read a run folder.

    Raises:
        ValueError: a required file is missing or any file is damaged; names the file and the command that
            makes it.
    """
    config = _read_json(folder / "config.json", required_command="crosscoder-jax train")
    diff = f"crosscoder-jax diff --run {folder}"
    published = _read_optional(folder / "crosscoder" / "config.json") or {}
    return RunFiles(
        folder=folder,
        config=config,
        metrics=read_metrics(folder / "metrics.jsonl"),
        evaluation=_read_optional(folder / "evaluation.json"),
        summary=_read_json(folder / "diff" / "summary.json", required_command=diff),
        latents=read_latents(folder / "diff" / "latents.parquet", required_command=diff),
        snippets=read_snippets(folder / "diff" / "snippets.json"),
        provenance=published.get("provenance") or {},
        weights_sha256=str(published.get("weights_sha256", "")),
    )


def read_metrics(path: Path) -> tuple[dict[str, Any], ...]:
    """Read a metrics log, one row a step in step order; a resumed run's later row replaces the earlier.

    Raises:
        ValueError: a line other than an unfinished last one is no JSON object with a step.
    """
    rows = {int(row["step"]): row for row in tracking.read_metrics(path)}
    return tuple(rows[step] for step in sorted(rows))


def read_latents(path: Path, *, required_command: str = "crosscoder-jax diff") -> LatentTable:
    """Read the table of latents.

    Raises:
        ValueError: the file is missing, is no parquet file or lacks the column `latent`.
    """
    _require(path, required_command)
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as parquet ({error}): run `{required_command}` again"
        ) from error
    if "latent" not in table.column_names:
        raise ValueError(
            f"{path} has no column 'latent' (it has {table.column_names}): run `{required_command}` again"
        )
    return LatentTable({name: _to_array(table.column(name)) for name in table.column_names})


def read_snippets(path: Path) -> dict[int, list[dict[str, Any]]] | None:
    """Read the snippets of the strongest latents by latent number; `None` when there is no such file.

    Raises:
        ValueError: a snippet has not one activation a token or its peak lies outside it.
    """
    content = _read_optional(path)
    if content is None:
        return None
    for latent, snippets in content.items():
        for snippet in snippets:
            _check_snippet(snippet, path, latent)
    return {int(latent): snippets for latent, snippets in content.items()}


def _check_snippet(snippet: Mapping[str, Any], path: Path, latent: str) -> None:
    tokens, activations = len(snippet["tokens"]), len(snippet["activations"])
    if tokens != activations or not 0 <= snippet["peak"] < tokens:
        raise ValueError(
            f"{path}: a snippet of latent {latent} has {tokens} tokens, {activations} activations and "
            f"its peak at {snippet['peak']}: run `crosscoder-jax diff` again"
        )


def _to_array(column: pa.ChunkedArray) -> np.ndarray:
    values = column.to_pylist()
    if (
        pa.types.is_string(column.type)
        or pa.types.is_large_string(column.type)
        or pa.types.is_dictionary(column.type)
    ):
        return np.array([value or "" for value in values], dtype=object)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _require(path: Path, command: str) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing: make it with `{command}`")


def _read_json(path: Path, *, required_command: str) -> dict[str, Any]:
    _require(path, required_command)
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error.__cause__}): make it again with `{required_command}`"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds {type(content).__name__}, not an object: run `{required_command}` again"
        )
    return content


def _read_optional(path: Path) -> dict[str, Any] | None:
    commands = {"evaluation.json": "evaluate", "config.json": "train"}
    command = f"crosscoder-jax {commands.get(path.name, 'diff')}"
    return _read_json(path, required_command=command) if path.is_file() else None


def source_entries(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give the sources that a run reads, as its config records them; none if it does not."""
    value: Any = config
    for name in ("train", "crosscoder", "sources", "entries"):
        value = value.get(name) if isinstance(value, Mapping) else None
    return list(value or ())


def is_recorded(content: Any, name: str) -> bool:
    """Tell whether nested objects have a field, be it null."""
    if isinstance(content, Mapping):
        return name in content or any(is_recorded(value, name) for value in content.values())
    return isinstance(content, list | tuple) and any(is_recorded(item, name) for item in content)


def find(content: Any, *names: str) -> Any:
    """Give the first value kept under one of `names`, nearest the top of nested objects, or `None`."""
    level = [content]
    while level:
        for name in names:
            for item in level:
                if isinstance(item, Mapping) and item.get(name) is not None:
                    return item[name]
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, Mapping) else item)
            if isinstance(child, (Mapping, list, tuple))
        ]
    return None
