"""Where metrics go: JSON lines always, anything else through one small protocol."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Protocol, runtime_checkable

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
    """

    def __init__(self, path: Path, *, first_step: int = 0):
        kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= first_step]
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


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read a metrics file; a last line cut off by a killed process is left out."""
    return [json.loads(line) for line in _complete_lines(path)]


def _complete_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    text = path.read_text()
    return [line for line in text[: text.rfind("\n") + 1].splitlines() if line]
