"""Where a result may be written: asked before the work begins, so that no path costs the work."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def check_file(path: str | os.PathLike[str]) -> None:
    """Refuse to write a file where there is a folder, or below a file.

    Raises:
        ValueError: naming what is in the way.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder: name a file to write, such as {path / 'result'}{path.suffix}")
    check_folder(path.parent)


def check_folder(path: str | os.PathLike[str]) -> None:
    """Refuse to write into a folder that is a file, or lies below one.

    Raises:
        ValueError: naming the file that is in the way.
    """
    path = Path(path)
    for place in (path, *path.parents):
        if place.is_dir():
            return
        if os.path.lexists(place):
            raise ValueError(f"{path}: cannot be a folder, since {place} is a file: choose another path")


def check_vacant(folder: str | os.PathLike[str]) -> None:
    """Refuse to write into a folder that holds anything.

    Raises:
        ValueError: naming the folder and what it holds.
    """
    folder = Path(folder)
    check_folder(folder)
    if folder.is_dir() and (held := sorted(path.name for path in folder.iterdir())):
        raise ValueError(f"{folder}: already holds {listed(held)}: choose another output folder")


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder for what is written inside; work that fails leaves none that it has not filled."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # one that is not empty stays, and with it those it lies in
            for path in made:
                path.rmdir()
        raise


def listed(names: list[str], most: int = 3) -> str:
    """Name the first few of a folder's files.

    Examples:
        >>> listed(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
