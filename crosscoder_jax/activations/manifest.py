"""What an activation store says about itself: ``manifest.json``."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crosscoder_jax.activations.atomic import read_json
from crosscoder_jax.activations.statistics import SourceStatistics
from crosscoder_jax.configs import differing_leaves

FORMAT_VERSION = 1
"""Raised whenever an older reader would misread a newer store."""
MANIFEST_NAME = "manifest.json"
PARTIAL_NAME = "partial.json"
DTYPES = ("bfloat16", "float32")
"""What activations may be stored as. Never float16: residual streams overflow it."""


class StoreError(ValueError):
    """A store that cannot be read or written; the message names file, source and token range."""


@dataclasses.dataclass(frozen=True)
class StoredSource:
    """Where the activations of one stored source came from.

    Raises:
        ValueError: if the name cannot be a folder's or the width is not positive.
    """

    name: str
    """How the source is called: also its folder below ``acts/``."""
    width: int
    """Number of coordinates."""
    model: str
    """Hub id or folder of the model."""
    revision: str | None
    """Commit of the model, where there is one."""
    hook_point: str
    """Where in the model, such as ``blocks.15.resid_post``."""

    def __post_init__(self) -> None:
        if not self.name or self.name.startswith(".") or set(self.name) & set("/\\"):
            raise ValueError(
                f"name={self.name!r} of a source becomes a folder: "
                "it must not be empty, begin with a dot or hold a slash"
            )
        if self.width <= 0:
            raise ValueError(f"width={self.width} of source {self.name!r} must be positive")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The description of a finished store."""

    format_version: int
    """:data:`FORMAT_VERSION` of the package that wrote it."""
    sources: tuple[StoredSource, ...]
    """What was stored, in the order of the concatenated width axis."""
    dtype: str
    """``bfloat16`` or ``float32``."""
    num_tokens: int
    """Rows of every column."""
    num_documents: int
    """Documents those tokens are of; a document's tokens stand together."""
    chunk_tokens: int
    """Tokens per file of activations: what is read at once."""
    labels: tuple[str, ...]
    """Names of the texts the documents came from; the column ``labels`` holds indices into it."""
    statistics: Mapping[str, SourceStatistics]
    """Per source name, over all tokens."""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The settings the store was written under; another run with them completes or reuses it."""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Whatever else its writer wanted to be known."""

    def identity(self) -> dict[str, Any]:
        """Return what must agree for two stores to hold activations of the same models."""
        return {source.name: dataclasses.asdict(source) for source in self.sources}

    def fingerprint(self) -> str:
        """Return a short hash of the whole manifest: equal for equal stores, statistics included."""
        canonical = json.dumps(self.to_json(), sort_keys=True).encode()
        return hashlib.sha256(canonical).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``manifest.json``."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data["sources"] = [dataclasses.asdict(source) for source in self.sources]
        data["labels"] = list(self.labels)
        data["statistics"] = {name: value.to_json() for name, value in self.statistics.items()}
        return data

    @classmethod
    def from_json(cls, data: Any) -> "Manifest":
        """Rebuild from :meth:`to_json`.

        Raises:
            ValueError: if a field is missing, unknown or of the wrong kind, or if the format is
                another version's.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(data, dict):
            raise ValueError(f"a manifest must be a JSON object, not {type(data).__name__}")
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"format_version={version!r} is not {FORMAT_VERSION}: "
                "read the store with the version of crosscoder_jax that wrote it, or write it again"
            )
        if missing := [name for name in names if name not in data]:
            raise ValueError(f"fields {missing} are missing")
        if unknown := sorted(set(data) - set(names)):
            raise ValueError(f"fields {unknown} are unknown")
        for name in ("num_tokens", "num_documents", "chunk_tokens"):
            if not isinstance(data[name], int) or data[name] <= 0:
                raise ValueError(f"{name}={data[name]!r} must be a positive integer")
        try:
            manifest = cls(**(data | _parsed(data)))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"a field is malformed: {error!r}") from error
        manifest._check()
        return manifest

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of the store in ``folder``.

        Raises:
            StoreError: if the folder holds no finished store, saying what it holds instead.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise StoreError(_why_no_manifest(folder))
        try:
            return cls.from_json(read_json(path))
        except StoreError:
            raise
        except ValueError as error:
            message = str(error)
            raise StoreError(message if str(path) in message else f"{path}: {message}") from error

    def _check(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {DTYPES}")
        for source in self.sources:
            statistics = self.statistics.get(source.name)
            if statistics is None or len(statistics.mean) != source.width:
                raise ValueError(f"statistics of source {source.name!r} are missing or of another width")


def describe_differences(
    expected: Any, found: Any, path: str = "", words: Sequence[str] = ("expected", "found")
) -> list[str]:
    """List where two JSON values differ, one short line per leaf.

    Examples:
        >>> describe_differences({"base": {"width": 4}}, {"base": {"width": 8}})
        ['base.width: expected 4, found 8']
    """
    leaves = differing_leaves(expected, found, absent=_Absent(), path=path)
    return [f"{where}: {words[0]} {left!r}, {words[1]} {right!r}" for where, left, right in leaves]


class _Absent:
    """Stands for a key that one side lacks."""

    def __repr__(self) -> str:
        return "nothing"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Absent)

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def _parsed(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "sources": tuple(StoredSource(**entry) for entry in data["sources"]),
        "labels": tuple(str(label) for label in data["labels"]),
        "statistics": {k: SourceStatistics.from_json(v) for k, v in data["statistics"].items()},
    }


def _why_no_manifest(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: there is no such folder: name a store, or write one with 'crosscoder-jax harvest'"
    if not (folder / PARTIAL_NAME).is_file():
        return (
            f"{folder}: {MANIFEST_NAME} is missing: this is no activation store, or its manifest was lost: "
            "write one with 'crosscoder-jax harvest'"
        )
    state = read_json(folder / PARTIAL_NAME)
    count = state.get("num_tokens") if isinstance(state, dict) else None
    return (
        f"{folder}: the store is half-written ({count} tokens are safe, {MANIFEST_NAME} is missing): "
        "run the command that writes it again and it goes on from there"
    )
