"""Where the arrays of a store lie."""

from pathlib import Path

from crosscoder_jax.activations.arrays import ArraySpec
from crosscoder_jax.activations.manifest import StoredSource

VOCABULARY_NAME = "vocabulary.json"
COLUMNS = {"tokens": "int32", "documents": "int32", "positions": "int32", "labels": "int16"}
"""What is stored of each token besides its activations."""
_COLUMN_CHUNKS = 16
"""A column's file covers so many times more tokens than one of activations: it would be tiny."""


def source_spec(folder: Path, source: StoredSource, dtype: str, chunk_tokens: int) -> ArraySpec:
    """Return where the activations of a source lie in the store at ``folder``."""
    what = f"source {source.name!r}"
    return ArraySpec(folder, f"acts/{source.name}", what, dtype, chunk_tokens, source.width)


def column_spec(folder: Path, name: str, chunk_tokens: int) -> ArraySpec:
    """Return where a column of :data:`COLUMNS` lies; ``chunk_tokens`` is that of the activations."""
    return ArraySpec(folder, name, f"column {name!r}", COLUMNS[name], _COLUMN_CHUNKS * chunk_tokens)
