"""Where metrics go: JSON lines always, anything else through one small protocol."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from crosscoder_jax.activations.atomic import write_bytes_atomically


@runtime_checkable
class Tracker(Protocol):
    """Receives the metrics of logged steps; W&B or any other service is one such class."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step."""
        ...

    def close(self) -> None:
        """Write what is still held back."""
        ...


class JsonLinesTracker:
    """Append one JSON object per logged step to a file.

    Args:
        path: made if missing.
        first_step: lines of later steps are dropped, so that a resumed run has each step once.

    Raises:
        ValueError: if a line that is there is damaged; as :func:`read_metrics`.
    """

    def __init__(self, path: Path, *, first_step: int = 0):
        kept = [line for line, row in _complete_rows(path) if row["step"] <= first_step]
        write_bytes_atomically(path, "".join(line + "\n" for line in kept).encode())
        self._file: IO[str] = path.open("a")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append and flush one line; values that are not finite become ``null``."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardTracker:
    """Write TensorBoard scalars; needs the extra ``tensorboard``."""

    def __init__(self, folder: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "TensorBoard is not installed: pip install 'crosscoder-jax[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(folder))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one scalar per metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics file, in its order; none if there is no file.

    A last line without its line feed is what a killed process leaves, and is left out.

    Raises:
        ValueError: if another line is no JSON object with a step, naming the line.
    """
    return [row for _, row in _complete_rows(path)]


def _complete_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each whole line and what it holds."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text[: text.rfind("\n") + 1].split("\n"), start=1):
        if line.strip():
            yield line, _parsed(line, path, number)


def _parsed(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {number} is not JSON ({error.msg}): remove the line") from error
    if not isinstance(row, dict) or "step" not in row:
        raise ValueError(f"{path} line {number} is no object with a 'step': remove the line")
    return row
