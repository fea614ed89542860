"""Write an activation store; stop at any moment and go on later."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Integer

from crosscoder_jax.activations.arrays import AppendedArray
from crosscoder_jax.activations.atomic import (
    is_temporary,
    read_json,
    remove_temporary_files,
    write_json_atomically,
)
from crosscoder_jax.activations.layout import COLUMNS, VOCABULARY_NAME, column_spec, source_spec
from crosscoder_jax.activations.manifest import (
    DTYPES,
    FORMAT_VERSION,
    MANIFEST_NAME,
    PARTIAL_NAME,
    Manifest,
    StoredSource,
    StoreError,
    describe_differences,
)
from crosscoder_jax.activations.statistics import MomentAccumulator, finite_rows

Column = Integer[np.ndarray, "token"]
_NUMPY_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


@dataclasses.dataclass(frozen=True)
class _Setting:
    """Everything a store is written under; two writers with equal settings may share a folder."""

    sources: tuple[StoredSource, ...]
    dtype: str
    labels: tuple[str, ...]
    chunk_tokens: int
    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"sources={names} must be at least one, with names that differ")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {DTYPES}: float16 overflows")
        if self.chunk_tokens <= 0:
            raise ValueError(f"chunk_tokens={self.chunk_tokens} must be positive")
        if not self.labels or len(self.labels) > np.iinfo(np.int16).max:
            raise ValueError(f"labels={self.labels} must name between 1 and {np.iinfo(np.int16).max} texts")

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "sources": {source.name: dataclasses.asdict(source) for source in self.sources},
            "source_order": [source.name for source in self.sources],
            "dtype": self.dtype,
            "labels": list(self.labels),
            "chunk_tokens": self.chunk_tokens,
            "config": dict(self.config),
        }

    @classmethod
    def of(cls, manifest: Manifest) -> "_Setting":
        return cls(manifest.sources, manifest.dtype, manifest.labels, manifest.chunk_tokens, manifest.config)


class StoreWriter:
    """Appends tokens to a store; made by :meth:`create_or_resume`, used as a context manager.

    Everything up to the last :meth:`checkpoint` survives a crash. What was appended after it is
    forgotten: the next writer starts at the checkpoint's ``cursor``. Leaving the ``with`` block
    without :meth:`finish` leaves the store half-written and ready to be completed.
    """

    def __init__(self, folder: Path, setting: _Setting, lock: int, manifest: Manifest | None):
        self._folder = folder
        self._setting = setting
        self._lock: int | None = lock
        self._manifest = manifest
        self._failure: str | None = None
        self._cursor: Any = None
        self._num_tokens = 0 if manifest is None else manifest.num_tokens
        if manifest is None:
            self._resume()

    @classmethod
    def create_or_resume(
        cls,
        path: str | os.PathLike[str],
        *,
        sources: Sequence[StoredSource],
        dtype: str,
        labels: Sequence[str],
        config: Mapping[str, Any],
        chunk_tokens: int = 4096,
    ) -> "StoreWriter":
        """Begin a store, go on with a half-written one, or find that it is finished.

        Args:
            path: folder of the store; made if it does not exist.
            sources: what is stored of each token, in the order in which readers concatenate it.
            dtype: ``bfloat16`` or ``float32``; other float types are converted on the way in.
            labels: names of the texts that documents come from.
            config: JSON data that determines what will be appended. The store is only taken up
                again by a writer with the same, so nothing is mixed.
            chunk_tokens: tokens per file of activations.

        Raises:
            StoreError: if the folder holds something else, a store written under other settings
                (saying which), or a store that another process is writing.
        """
        setting = _Setting(tuple(sources), dtype, tuple(labels), chunk_tokens, dict(config))
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        try:
            return cls(folder, setting, lock, _begin(folder, setting))
        except BaseException:
            os.close(lock)
            raise

    @property
    def cursor(self) -> Any:
        """What the last :meth:`checkpoint` was given; ``None`` before the first."""
        return self._cursor

    @property
    def num_tokens(self) -> int:
        """Tokens appended so far, those of earlier writers included."""
        return self._num_tokens

    @property
    def num_documents(self) -> int:
        """Documents with at least one token so far."""
        return len(self._seen) if self._manifest is None else self._manifest.num_documents

    @property
    def is_finished(self) -> bool:
        """Whether the store is complete and there is nothing left to do."""
        return self._manifest is not None

    @property
    def manifest(self) -> Manifest:
        """The manifest of the finished store.

        Raises:
            ValueError: if it is not finished.
        """
        if self._manifest is None:
            raise ValueError(f"{self._folder}: the store is not finished: call finish() first")
        return self._manifest

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes write the store; what was not checkpointed is forgotten."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def append(
        self,
        acts: Mapping[str, Float[np.ndarray, "token _"]],
        *,
        tokens: Column,
        documents: Column,
        positions: Column,
        labels: Column,
    ) -> None:
        """Append tokens: all of them, or with an error none.

        Args:
            acts: raw activations of every source, ``[token, width]``.
            tokens: token ids.
            documents: index of each token's document, from 0. The tokens of a document follow one
                another; the documents may come in any order.
            positions: position of each token in its document.
            labels: index into the store's ``labels``.

        Raises:
            StoreError: if a source is missing or of another width, if an activation is NaN,
                infinite or too large for the stored type (naming document and position), if a
                document comes back after another one, or if the disk is full.
        """
        self._require_open()
        columns = {"tokens": tokens, "documents": documents, "positions": positions, "labels": labels}
        count = len(tokens)
        span = f"tokens {self._num_tokens} to {self._num_tokens + count}"
        stored_columns = {name: self._checked_column(name, columns[name], count, span) for name in COLUMNS}
        stored = self._checked_acts(acts, count, span, stored_columns)
        new_documents = self._new_documents(stored_columns["documents"], span)
        with self._poisoned_by_failure():
            self._write(stored, stored_columns)
        self._seen.update(new_documents)
        self._num_tokens += count
        if count:
            self._last_document = int(stored_columns["documents"][-1])

    def checkpoint(self, cursor: Any) -> None:
        """Bring everything appended to the disk and note that it is there to stay.

        Args:
            cursor: JSON data from which the caller can go on, such as how many rows it has read.

        Raises:
            StoreError: if the disk is full; the previous checkpoint stays valid.
        """
        self._require_open()
        with self._poisoned_by_failure():
            for array in self._arrays.values():
                array.flush()
            self._write_partial(cursor)
        self._cursor = cursor

    def finish(
        self, provenance: Mapping[str, Any], vocabulary: Mapping[int, bytes] | None = None
    ) -> Manifest:
        """Complete the store and write its manifest, last and atomically.

        Args:
            provenance: JSON data to be kept in the manifest: versions, filters, times.
            vocabulary: the raw bytes of each token id, for those who show text.

        Raises:
            StoreError: if nothing was appended or the disk is full; the store stays resumable.
        """
        self._require_open()
        if self._num_tokens == 0:
            raise StoreError(f"{self._folder}: no token was appended: there is nothing to finish")
        manifest = self._make_manifest(provenance)
        with self._poisoned_by_failure():
            for array in self._arrays.values():
                array.finish()
            if vocabulary is not None:
                text = {str(token): raw.decode("latin-1") for token, raw in sorted(vocabulary.items())}
                write_json_atomically(self._folder / VOCABULARY_NAME, text)
            write_json_atomically(self._folder / MANIFEST_NAME, manifest.to_json())
        (self._folder / PARTIAL_NAME).unlink(missing_ok=True)
        self._manifest = manifest
        self.close()
        return manifest

    def _resume(self) -> None:
        path = self._folder / PARTIAL_NAME
        state = read_json(path)
        try:
            self._num_tokens, self._cursor = int(state["num_tokens"]), state["cursor"]
            self._moments = {
                source.name: MomentAccumulator.from_json(state["moments"][source.name])
                for source in self._setting.sources
            }
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{path}: is malformed ({error!r}): delete the store and begin anew") from error
        specs = [source_spec(self._folder, s, self._setting) for s in self._setting.sources]
        specs += [column_spec(self._folder, name, self._setting) for name in COLUMNS]
        self._arrays = {spec.name: AppendedArray(spec, self._num_tokens) for spec in specs}
        documents = self._arrays["documents"].read_all()
        self._seen = set(np.unique(documents).tolist())
        self._last_document = int(documents[-1]) if len(documents) else None

    def _require_open(self) -> None:
        if self._manifest is not None:
            raise ValueError(f"{self._folder}: the store is finished: choose another folder for more tokens")
        if self._failure is not None:
            raise StoreError(f"{self._failure} (this writer gave up: make a new one to go on)")
        if self._lock is None:
            raise ValueError(f"{self._folder}: this writer is closed: call create_or_resume again")

    @contextlib.contextmanager
    def _poisoned_by_failure(self):
        """After a failed write nothing is known of what is in flight: use no such writer again."""
        try:
            yield
        except (StoreError, OSError) as error:
            text = str(error) if isinstance(error, StoreError) else f"{error.filename}: {error.strerror}"
            safe = read_json(self._folder / PARTIAL_NAME)["num_tokens"]
            self._failure = (
                f"{text}; the first {safe} tokens of the store are safe: remedy this and run the same again"
            )
            raise StoreError(self._failure) from error

    def _checked_column(self, name: str, values: np.ndarray, count: int, span: str) -> np.ndarray:
        dtype = np.dtype(COLUMNS[name])
        top = len(self._setting.labels) - 1 if name == "labels" else np.iinfo(dtype).max
        if values.shape != (count,):
            raise StoreError(f"{self._folder}: {span}: {name} has shape {values.shape}, not ({count},)")
        if count and (values.min() < 0 or values.max() > top):
            raise StoreError(
                f"{self._folder}: {span}: {name} lie between {values.min()} and {values.max()}, "
                f"but must lie between 0 and {top}"
            )
        return values.astype(dtype)

    def _checked_acts(
        self, acts: Mapping[str, np.ndarray], count: int, span: str, columns: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        names = [source.name for source in self._setting.sources]
        if sorted(acts) != sorted(names):
            raise StoreError(f"{self._folder}: {span}: acts has sources {sorted(acts)}, the store {names}")
        stored = {}
        for source in self._setting.sources:
            values = acts[source.name]
            if values.shape != (count, source.width):
                raise StoreError(
                    f"{self._folder}: source {source.name!r}, {span}: activations have shape {values.shape}, "
                    f"but the store expects ({count}, {source.width}): is this another model or layer?"
                )
            with np.errstate(over="ignore", invalid="ignore"):
                rows = np.ascontiguousarray(values, _NUMPY_DTYPES[self._setting.dtype])
            self._require_finite(source.name, rows, values, span, columns)
            stored[source.name] = rows
        return stored

    def _require_finite(
        self,
        name: str,
        rows: np.ndarray,
        values: np.ndarray,
        span: str,
        columns: Mapping[str, np.ndarray],
    ) -> None:
        bad = np.flatnonzero(~finite_rows(rows))
        if not len(bad):
            return
        row = int(bad[0])
        coordinate = int(np.flatnonzero(~np.isfinite(rows[row].astype(np.float64)))[0])
        raise StoreError(
            f"{self._folder}: source {name!r}, {span}: {len(bad)} rows are not finite as "
            f"{self._setting.dtype}; the first is document {columns['documents'][row]}, "
            f"position {columns['positions'][row]}, where coordinate {coordinate} is "
            f"{float(values[row, coordinate])}; nothing of these tokens was stored"
        )

    def _new_documents(self, documents: np.ndarray, span: str) -> list[int]:
        """Return the documents that begin here; refuse one that had ended before."""
        if not len(documents):
            return []
        starts = np.flatnonzero(np.diff(documents, prepend=-1))
        runs = documents[starts].tolist()
        if runs[0] == self._last_document:
            runs = runs[1:]
        fresh: set[int] = set()
        for document in runs:
            if document in self._seen or document in fresh:
                raise StoreError(
                    f"{self._folder}: {span}: document {document} comes back after another document: "
                    "append the tokens of a document one after another"
                )
            fresh.add(document)
        return runs

    def _write(self, stored: Mapping[str, np.ndarray], columns: Mapping[str, np.ndarray]) -> None:
        for name, rows in stored.items():
            for chunk in self._arrays[f"acts/{name}"].append(rows):
                self._moments[name] = self._moments[name].update(chunk)
        for name, values in columns.items():
            self._arrays[name].append(values)

    def _write_partial(self, cursor: Any) -> None:
        moments = {name: value.to_json() for name, value in self._moments.items()}
        _write_partial(self._folder, self._setting, self._num_tokens, cursor, moments)

    def _make_manifest(self, provenance: Mapping[str, Any]) -> Manifest:
        statistics = {
            name: moments.update(self._arrays[f"acts/{name}"].tail()).finalize()
            for name, moments in self._moments.items()
        }
        setting = self._setting
        return Manifest(
            format_version=FORMAT_VERSION,
            sources=setting.sources,
            dtype=setting.dtype,
            num_tokens=self._num_tokens,
            num_documents=len(self._seen),
            chunk_tokens=setting.chunk_tokens,
            labels=setting.labels,
            statistics=statistics,
            config=setting.config,
            provenance=dict(provenance),
        )


def _begin(folder: Path, setting: _Setting) -> Manifest | None:
    """Return the manifest of a finished store, or make sure that there is a ``partial.json``."""
    remove_temporary_files(folder)
    if (folder / MANIFEST_NAME).is_file():
        manifest = Manifest.read(folder)
        _require_same(folder, _Setting.of(manifest).to_json(), setting)
        (folder / PARTIAL_NAME).unlink(missing_ok=True)
        return manifest
    if (folder / PARTIAL_NAME).is_file():
        state = read_json(folder / PARTIAL_NAME)
        _require_same(folder, state.get("setting") if isinstance(state, dict) else None, setting)
        return None
    if strangers := sorted(path.name for path in folder.iterdir() if not is_temporary(path)):
        raise StoreError(
            f"{folder}: holds {strangers[:3]} but neither {MANIFEST_NAME} nor {PARTIAL_NAME}: "
            "it is no store, or its manifest was lost; choose another folder"
        )
    moments = {source.name: MomentAccumulator.empty(source.width).to_json() for source in setting.sources}
    _write_partial(folder, setting, 0, None, moments)
    return None


def _write_partial(
    folder: Path, setting: _Setting, num_tokens: int, cursor: Any, moments: Mapping[str, Any]
) -> None:
    state = {"num_tokens": num_tokens, "cursor": cursor, "setting": setting.to_json(), "moments": moments}
    write_json_atomically(folder / PARTIAL_NAME, state)


def _require_same(folder: Path, found: Any, setting: _Setting) -> None:
    differences = describe_differences(found or {}, setting.to_json(), "", ("stored", "asked for"))
    if differences:
        raise StoreError(
            f"{folder}: was written under other settings ({'; '.join(differences)}): "
            "use the same settings, choose another folder, or delete this one"
        )


def _lock(folder: Path) -> int:
    """Lock the folder for this process; the lock goes away with it, however it ends."""
    import fcntl  # absent on Windows, where stores can be read but not written

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise StoreError(f"{folder}: another process is writing this store: wait until it ends") from error
    return descriptor
