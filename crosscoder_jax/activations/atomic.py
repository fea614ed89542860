"""Files that are either whole or not there: written under a temporary name, synced and renamed."""

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_TEMPORARY_SUFFIX = ".tmp"


def write_bytes_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path`` so that a crash leaves the old file or the new one, never a part.

    The data reach the disk before the rename, and the rename before the function returns.

    Raises:
        OSError: if the folder does not exist or the disk is full; the old file is then untouched
            and no temporary file is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}{_TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_json_atomically(path: str | os.PathLike[str], obj: Any) -> None:
    """Write ``obj`` as indented JSON, lists of plain values on one line each.

    NumPy scalars are written as numbers; floats are written so that they read back exactly.

    Raises:
        ValueError: if ``obj`` holds a NaN, an infinity or something that JSON cannot express.
        OSError: as :func:`write_bytes_atomically`.
    """
    try:
        text = _format(obj, "")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: cannot be written as JSON: {error}") from error
    write_bytes_atomically(path, (text + "\n").encode())


def as_read_back(obj: Any) -> Any:
    """Return what reading ``obj`` back from JSON would give: lists for tuples, plain numbers.

    Raises:
        ValueError: if ``obj`` holds something that JSON cannot express.
    """
    try:
        return json.loads(_format(obj, ""))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{obj!r} cannot be written as JSON: {error}") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: if the file is not JSON, naming it and the line.
        OSError: if it cannot be read.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not valid JSON ({error}): restore it from a copy") from error


def remove_temporary_files(folder: str | os.PathLike[str]) -> None:
    """Remove what a killed :func:`write_bytes_atomically` left in ``folder``."""
    for path in Path(folder).glob(f".*{_TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Tell whether ``path`` is a leftover of a killed :func:`write_bytes_atomically`."""
    return path.name.startswith(".") and path.name.endswith(_TEMPORARY_SUFFIX)


def _sync_folder(folder: Path) -> None:
    # Without this the rename itself may be lost when the power fails. Some network file systems
    # refuse to sync a folder; they order renames themselves.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _format(value: Any, indent: str) -> str:
    deeper = indent + "  "
    if isinstance(value, Mapping) and value:
        lines = [f"{deeper}{json.dumps(_key(k))}: {_format(v, deeper)}" for k, v in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and any(isinstance(v, Mapping | list | tuple) for v in value):
        return "[\n" + ",\n".join(deeper + _format(v, deeper) for v in value) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False, default=_plain)


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"key {key!r} must be a string")
    return key


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} is a {type(value).__name__}")
