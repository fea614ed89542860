"""Rows of any dataset that the ``datasets`` library reads, one after the other, never all in memory."""

import contextlib
import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from crosscoder_jax.language_models.config import TextSource
from crosscoder_jax.language_models.loading import first_line, sha256_of_files

_BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".md": "text",
}
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_SHUFFLE_BUFFER = 10_000
_UNITS = {"line": "line", "paragraph": "paragraph", "file": "document"}


def open_rows(source: TextSource, shuffle_seed: int | None = None, skip: int = 0) -> Iterator[dict[str, Any]]:
    """Stream the rows of a text, from row ``skip`` on.

    Raises:
        ValueError: when there is no such file, dataset or split, naming the text.
    """
    try:
        rows = _open(source)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"text {source.label!r} ({source.location}) cannot be read: {first_line(error)}"
        ) from error
    if shuffle_seed is not None:
        rows = rows.shuffle(seed=shuffle_seed, buffer_size=_SHUFFLE_BUFFER)
    return _checked(iter(rows.skip(skip)), source)


def _checked(rows: Iterator[dict[str, Any]], source: TextSource) -> Iterator[dict[str, Any]]:
    """Name the text when one of its files turns out to be broken while it is read."""
    try:
        yield from rows
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ValueError(
            f"text {source.label!r} ({source.location}) cannot be read: {first_line(error)}"
        ) from error


@contextlib.contextmanager
def bars_off() -> Iterator[None]:
    """Keep ``datasets`` from drawing bars: progress is the caller's to show."""
    had_bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            datasets.utils.logging.enable_progress_bar()


def text_fingerprint(source: TextSource) -> str | None:
    """Hash the local files of a text, so that a changed file is noticed; None for a dataset on the hub."""
    files = _local_files(source.location)
    return sha256_of_files(files) if files else None


def _local_files(location: str) -> list[Path]:
    path = Path(location).expanduser()
    if path.is_dir():
        return [file for file in path.rglob("*") if file.is_file()]
    return [Path(name) for name in sorted(glob.glob(str(path)))]


def _open(source: TextSource) -> datasets.IterableDataset:
    files = _local_files(source.location)
    if Path(source.location).expanduser().is_dir():
        return _open_folder(source)
    if files:
        return _open_files(source, [str(file) for file in files])
    if _builder(source.location) or source.location.startswith((".", "/", "~")):
        raise ValueError("there is no such file")
    return datasets.load_dataset(source.location, source.subset, split=source.split, streaming=True)


def _open_folder(source: TextSource) -> datasets.IterableDataset:
    folder = Path(source.location).expanduser()
    if not (folder / "state.json").exists() and not (folder / "dataset_dict.json").exists():
        return datasets.load_dataset(str(folder), source.subset, split=source.split, streaming=True)
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if source.split not in saved:
            raise ValueError(f"there is no split {source.split!r}, only {', '.join(map(str, saved))}")
        saved = saved[source.split]
    return saved.to_iterable_dataset()


def _open_files(source: TextSource, files: list[str]) -> datasets.IterableDataset:
    builder = _builder(files[0])
    if builder is None:
        raise ValueError(f"the ending of {Path(files[0]).name} must be one of {', '.join(_BUILDERS)}")
    options: dict[str, Any] = {}
    if builder == "text":
        options["sample_by"] = _UNITS[source.unit]
    if files[0].endswith(".tsv"):
        options["sep"] = "\t"
    return datasets.load_dataset(builder, data_files=files, split="train", streaming=True, **options)


def _builder(name: str) -> str | None:
    path = Path(name)
    if path.suffix in _COMPRESSED:
        path = path.with_suffix("")
    return _BUILDERS.get(path.suffix.lower())
