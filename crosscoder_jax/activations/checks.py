"""What is refused before it reaches a store; every message names source and token range."""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from crosscoder_jax.activations.layout import COLUMNS
from crosscoder_jax.activations.manifest import StoredSource, StoreError
from crosscoder_jax.activations.setting import Setting
from crosscoder_jax.activations.statistics import finite_rows

_NUMPY_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


def checked_columns(
    columns: Mapping[str, np.ndarray], setting: Setting, count: int, where: str
) -> dict[str, np.ndarray]:
    """Return the columns in the types they are stored in.

    Args:
        columns: by name.
        setting: of the store.
        count: how many tokens there must be.
        where: folder and token range, for messages.

    Raises:
        StoreError: if a column has another length or a value that cannot be stored.
    """
    stored = {}
    for name, dtype in COLUMNS.items():
        values = columns[name]
        top = len(setting.labels) - 1 if name == "labels" else np.iinfo(dtype).max
        if values.shape != (count,):
            raise StoreError(f"{where}: {name} has shape {values.shape}, not ({count},)")
        if count and (values.min() < 0 or values.max() > top):
            raise StoreError(
                f"{where}: {name} lie between {values.min()} and {values.max()}, "
                f"but must lie between 0 and {top}"
            )
        stored[name] = values.astype(dtype)
    return stored


def checked_acts(
    acts: Mapping[str, np.ndarray], setting: Setting, columns: Mapping[str, np.ndarray], where: str
) -> dict[str, np.ndarray]:
    """Return the activations in the type they are stored in.

    Raises:
        StoreError: if a source is missing, unknown or of another width, or if an activation is not
            finite in the stored type.
    """
    names, count = [source.name for source in setting.sources], len(columns["tokens"])
    if sorted(acts) != sorted(names):
        raise StoreError(f"{where}: acts has the sources {sorted(acts)}, but the store has {names}")
    stored = {}
    for source in setting.sources:
        values = acts[source.name]
        if values.shape != (count, source.width):
            raise StoreError(
                f"{where}, source {source.name!r}: activations have shape {values.shape}, "
                f"but the store expects {(count, source.width)}: is this another model or layer?"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            rows = np.ascontiguousarray(values, _NUMPY_DTYPES[setting.dtype])
        _require_finite(source, rows, values, columns, where)
        stored[source.name] = rows
    return stored


def new_documents(documents: np.ndarray, seen: set[int], last: int | None, where: str) -> list[int]:
    """Return the documents that begin among these tokens.

    Args:
        documents: document of each token.
        seen: the documents before.
        last: the document that the last token before belonged to.
        where: folder and token range, for messages.

    Raises:
        StoreError: if a document comes back after another one.
    """
    if not len(documents):
        return []
    runs = documents[np.flatnonzero(np.diff(documents, prepend=-1))].tolist()
    if runs[0] == last:
        runs = runs[1:]
    fresh: set[int] = set()
    for document in runs:
        if document in seen or document in fresh:
            raise StoreError(
                f"{where}: document {document} comes back after another document: "
                "append the tokens of a document one after another"
            )
        fresh.add(document)
    return runs


def _require_finite(
    source: StoredSource, rows: np.ndarray, values: np.ndarray, columns: Mapping[str, np.ndarray], where: str
) -> None:
    bad = np.flatnonzero(~finite_rows(rows))
    if not len(bad):
        return
    row = int(bad[0])
    coordinate = int(np.flatnonzero(~np.isfinite(rows[row].astype(np.float64)))[0])
    raise StoreError(
        f"{where}, source {source.name!r}: {len(bad)} rows are not finite as {rows.dtype.name}; "
        f"the first is document {columns['documents'][row]}, position {columns['positions'][row]}, "
        f"where coordinate {coordinate} is {float(values[row, coordinate])}; "
        "none of these tokens were stored"
    )
