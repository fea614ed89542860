"""Where the arrays of a store lie."""

from pathlib import Path
from typing import Protocol

from crosscoder_jax.activations.arrays import ArraySpec
from crosscoder_jax.activations.manifest import StoredSource

VOCABULARY_NAME = "vocabulary.json"
COLUMNS = {"tokens": "int32", "documents": "int32", "positions": "int32", "labels": "int16"}
"""What is stored of each token besides its activations."""
_COLUMN_CHUNKS = 16
"""A column's file covers so many times more tokens than one of activations: it would be tiny."""


class _Shape(Protocol):
    @property
    def dtype(self) -> str: ...
    @property
    def chunk_tokens(self) -> int: ...


def source_spec(folder: Path, source: StoredSource, shape: _Shape) -> ArraySpec:
    """Return where the activations of a source lie.

    Args:
        folder: of the store.
        source: the source.
        shape: the store's manifest, or whatever knows its ``dtype`` and ``chunk_tokens``.
    """
    what = f"source {source.name!r}"
    return ArraySpec(folder, f"acts/{source.name}", what, shape.dtype, shape.chunk_tokens, source.width)


def column_spec(folder: Path, name: str, shape: _Shape) -> ArraySpec:
    """Return where a column of :data:`COLUMNS` lies; the arguments are those of :func:`source_spec`."""
    return ArraySpec(folder, name, f"column {name!r}", COLUMNS[name], _COLUMN_CHUNKS * shape.chunk_tokens)
