"""Write an activation store; stop at any moment and go on later."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from crosscoder_jax.activations.arrays import AppendedArray
from crosscoder_jax.activations.atomic import read_json, write_json_atomically
from crosscoder_jax.activations.checks import checked_acts, checked_columns, new_documents
from crosscoder_jax.activations.layout import COLUMNS, VOCABULARY_NAME, column_spec, source_spec
from crosscoder_jax.activations.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    PARTIAL_NAME,
    Manifest,
    StoredSource,
    StoreError,
)
from crosscoder_jax.activations.setting import Setting, begin, lock_folder, write_partial
from crosscoder_jax.activations.statistics import MomentAccumulator

# Lengths and widths are checked with messages of our own.
Column = Integer[np.ndarray, "_"]


class StoreWriter:
    """Appends tokens to a store; made by :meth:`create_or_resume`, used as a context manager.

    Everything up to the last :meth:`checkpoint` survives a crash. What was appended after it is
    forgotten: the next writer starts at the checkpoint's ``cursor``. Leaving the ``with`` block
    without :meth:`finish` leaves the store half-written and ready to be completed.
    """

    def __init__(self, folder: Path, setting: Setting, lock: int, manifest: Manifest | None):
        self._folder = folder
        self._setting = setting
        self._lock: int | None = lock
        self._manifest = manifest
        self._failure: str | None = None
        self._cursor: Any = None
        self._arrays: dict[str, AppendedArray] = {}
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
        setting = Setting(tuple(sources), dtype, tuple(labels), chunk_tokens, dict(config))
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
        try:
            return cls(folder, setting, lock, begin(folder, setting))
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
        if self._lock is None:
            return
        for array in self._arrays.values():
            array.settle()
        os.close(self._lock)
        self._lock = None

    def append(
        self,
        acts: Mapping[str, Float[np.ndarray, "_ _"]],
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
        where = f"{self._folder}: tokens {self._num_tokens} to {self._num_tokens + len(tokens)}"
        stored_columns = checked_columns(columns, self._setting, len(tokens), where)
        stored_acts = checked_acts(acts, self._setting, stored_columns, where)
        documents = stored_columns["documents"]
        fresh = new_documents(documents, self._seen, self._last_document, where)
        with self._poisoned_by_failure():
            self._write(stored_acts, stored_columns)
        self._num_tokens += len(tokens)
        self._seen.update(fresh)
        if len(documents):
            self._last_document = int(documents[-1])

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
            moments = {name: value.to_json() for name, value in self._moments.items()}
            write_partial(self._folder, self._setting, self._num_tokens, cursor, moments)
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
        folder, dtype, chunk = self._folder, self._setting.dtype, self._setting.chunk_tokens
        specs = [source_spec(folder, source, dtype, chunk) for source in self._setting.sources]
        specs += [column_spec(folder, name, chunk) for name in COLUMNS]
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
    def _poisoned_by_failure(self) -> Iterator[None]:
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

    def _write(self, stored: Mapping[str, np.ndarray], columns: Mapping[str, np.ndarray]) -> None:
        for name, rows in stored.items():
            for chunk in self._arrays[f"acts/{name}"].append(rows):
                self._moments[name] = self._moments[name].update(chunk)
        for name, values in columns.items():
            self._arrays[name].append(values)

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
