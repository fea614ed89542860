"""The one place that speaks to TensorStore: zarr3 arrays whose chunks carry a checksum.

A chunk is one file, written under a temporary name, synced and renamed by TensorStore, so a crash
leaves it old or new. Chunks that are missing are errors, not zeros.
"""

import collections
import contextlib
import dataclasses
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Shaped

from crosscoder_jax.activations.manifest import StoreError

_WRITES_IN_FLIGHT = 2
_GROW_CHUNKS = 64
_UNFINISHED_SUFFIX = ".__lock"
"""What TensorStore calls a file until it is renamed."""
_REASONS = (
    ("Digest mismatch", "its checksum is wrong: the file was damaged after it was written"),
    ("Not enough data", "it is truncated"),
    ("Unexpected end of input", "it is truncated"),
    ("is missing", "it is missing"),
    ("No space left", os.strerror(errno.ENOSPC)),
)


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Where an array of a store lies and what it holds."""

    store: Path
    """Folder of the store."""
    name: str
    """Folder of the array inside the store, such as ``acts/base``."""
    what: str
    """How messages call it, such as ``source 'base'``."""
    dtype: str
    chunk_tokens: int
    width: int | None = None
    """Length of the second axis; ``None`` for a column of one number per token."""

    @property
    def folder(self) -> Path:
        """Folder of the array."""
        return self.store / self.name

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one token's entry."""
        return () if self.width is None else (self.width,)

    def chunk_file(self, chunk: int) -> Path:
        """Return the file of one chunk."""
        return self.folder.joinpath("c", str(chunk), *("0" for _ in self.row_shape))

    def tokens(self, start: int, stop: int) -> str:
        """Name a token range of this array in the words of every message."""
        return f"{self.what}, tokens {start} to {stop}"


class StoredArray:
    """An array of a store, read by token range."""

    def __init__(self, spec: ArraySpec, array: Any):
        self.spec = spec
        self._array = array

    @classmethod
    def open(cls, spec: ArraySpec, *, cache_bytes: int = 0) -> "StoredArray":
        """Open an array for reading.

        Args:
            spec: what the array must be.
            cache_bytes: memory that decoded chunks may keep.

        Raises:
            StoreError: if it is missing, unreadable or not what ``spec`` says.
        """
        array = cls(spec, _open(spec, cache_bytes))
        array._check()
        return array

    @property
    def num_tokens(self) -> int:
        """Length of the first axis."""
        return int(self._array.shape[0])

    def start_read(self, start: int, stop: int) -> Callable[[], Shaped[np.ndarray, "token ..."]]:
        """Begin to read tokens ``start`` to ``stop``; the function returned waits for them."""
        future = self._array[start:stop].read()

        def wait() -> Shaped[np.ndarray, "token ..."]:
            try:
                return future.result()
            except ValueError as error:
                raise self._read_error(error, start, stop) from error

        return wait

    def read(self, start: int, stop: int) -> Shaped[np.ndarray, "token ..."]:
        """Read tokens ``start`` to ``stop``.

        Raises:
            StoreError: naming the first bad file, what it holds and which tokens.
        """
        return self.start_read(start, stop)()

    def _check(self) -> None:
        spec, array = self.spec, self._array
        found = (array.dtype.name, tuple(array.shape[1:]), array.chunk_layout.read_chunk.shape[0])
        expected = (spec.dtype, spec.row_shape, spec.chunk_tokens)
        if found != expected:
            raise StoreError(
                f"{spec.folder / 'zarr.json'}: {spec.what} has (dtype, shape of a row, chunk) {found}, "
                f"but {expected} is expected: the array belongs to another store"
            )

    def _read_error(self, error: ValueError, start: int, stop: int) -> StoreError:
        # TensorStore's message names the file; the chunk is found by reading each one alone.
        chunk = self.spec.chunk_tokens
        for low in range(start - start % chunk, stop, chunk):
            high = min(low + chunk, self.num_tokens)
            try:
                self._array[low:high].read().result()
            except ValueError as cause:
                file = self.spec.chunk_file(low // chunk)
                return StoreError(
                    f"{file}: {self.spec.tokens(low, high)}: {_reason(cause)}; "
                    "restore this file from a copy or write the store again"
                )
        return StoreError(f"{self.spec.folder}: {self.spec.tokens(start, stop)}: {_reason(error)}")


class AppendedArray:
    """An array that grows at its end, always by whole chunks.

    The tokens of the last, unfinished chunk are kept in memory too. Every write therefore replaces
    a chunk's file as a whole and holds all tokens that the file held before: nothing that was
    written can be lost by a crash, and what a crash leaves behind the last checkpoint is
    overwritten.
    """

    def __init__(self, spec: ArraySpec, num_tokens: int):
        self.spec = spec
        self.num_tokens = num_tokens
        self._array = _open(spec, 0) if (spec.folder / "zarr.json").is_file() else _create(spec)
        self._futures: collections.deque[tuple[Any, int]] = collections.deque()
        self._buffer = self._new_buffer()
        self._drop_after(num_tokens)

    @property
    def _filled(self) -> int:
        return self.num_tokens % self.spec.chunk_tokens

    def append(self, rows: Shaped[np.ndarray, "token ..."]) -> list[Shaped[np.ndarray, "chunk ..."]]:
        """Add rows of the stored type; return the chunks that this completed.

        Raises:
            StoreError: if a chunk cannot be written.
        """
        completed = []
        while len(rows):
            room = self.spec.chunk_tokens - self._filled
            part, rows = rows[:room], rows[room:]
            self._buffer[self._filled : self._filled + len(part)] = part
            self.num_tokens += len(part)
            if self._filled == 0:
                self._write(self.num_tokens - self.spec.chunk_tokens)
                completed.append(self._buffer)
                self._buffer = self._new_buffer()
        return completed

    def tail(self) -> Shaped[np.ndarray, "token ..."]:
        """Return the tokens of the unfinished chunk."""
        return self._buffer[: self._filled]

    def read_all(self) -> Shaped[np.ndarray, "token ..."]:
        """Read everything that was on the disk when this was opened."""
        return StoredArray(self.spec, self._array).read(0, self.num_tokens)

    def flush(self) -> None:
        """Bring everything appended to the disk.

        Raises:
            StoreError: if a chunk cannot be written.
        """
        if self._filled:
            # A copy, since the buffer goes on being filled. What follows the tail is zero.
            self._write(self.num_tokens - self._filled, self._buffer.copy())
        self._wait(0)

    def settle(self) -> None:
        """Wait until no write is under way, whatever became of them."""
        while self._futures:
            with contextlib.suppress(StoreError):
                self._wait(0)

    def finish(self) -> None:
        """Bring everything to the disk and set the final length."""
        self.flush()
        self._resize(self.num_tokens, is_metadata_only=True)

    def _new_buffer(self) -> Shaped[np.ndarray, "chunk ..."]:
        return np.zeros((self.spec.chunk_tokens, *self.spec.row_shape), ts.dtype(self.spec.dtype).numpy_dtype)

    def _drop_after(self, num_tokens: int) -> None:
        """Forget what a killed writer left behind its last checkpoint; read the tail back."""
        chunk = self.spec.chunk_tokens
        for unfinished in self.spec.folder.rglob(f"*{_UNFINISHED_SUFFIX}"):
            unfinished.unlink()
        if self._array.shape[0] < num_tokens:
            raise StoreError(
                f"{self.spec.folder}: {self.spec.what} has {self._array.shape[0]} tokens, but {num_tokens} "
                "were written: files were lost; delete the store and write it again"
            )
        start = num_tokens - self._filled
        if self._filled:
            self._buffer[: self._filled] = StoredArray(self.spec, self._array).read(start, num_tokens)
        self._resize(start + (chunk if self._filled else 0), is_metadata_only=False)

    def _write(self, start: int, rows: Shaped[np.ndarray, "chunk ..."] | None = None) -> None:
        stop = start + self.spec.chunk_tokens
        if stop > self._array.shape[0]:
            self._resize(start + _GROW_CHUNKS * self.spec.chunk_tokens, is_metadata_only=True)
        data = self._buffer if rows is None else rows
        future = self._array[start:stop].write(data, can_reference_source_data_indefinitely=True)
        self._futures.append((future, start))
        self._wait(_WRITES_IN_FLIGHT)

    def _wait(self, allowed: int) -> None:
        while len(self._futures) > allowed:
            future, start = self._futures.popleft()
            try:
                future.result()
            except ValueError as error:
                file = self.spec.chunk_file(start // self.spec.chunk_tokens)
                tokens = self.spec.tokens(start, start + self.spec.chunk_tokens)
                raise StoreError(f"{file}: {tokens} could not be written: {_reason(error)}") from error

    def _resize(self, num_tokens: int, *, is_metadata_only: bool) -> None:
        if num_tokens == self._array.shape[0]:
            return
        shape = [num_tokens, *self.spec.row_shape]
        try:
            future = self._array.resize(exclusive_max=shape, resize_metadata_only=is_metadata_only)
            self._array = future.result()
        except ValueError as error:
            file = self.spec.folder / "zarr.json"
            raise StoreError(f"{file}: {self.spec.what} could not be written: {_reason(error)}") from error


def _open(spec: ArraySpec, cache_bytes: int) -> Any:
    try:
        return ts.open(_base_spec(spec), context=_context(cache_bytes), open=True).result()
    except ValueError as error:
        file = spec.folder / "zarr.json"
        raise StoreError(f"{file}: {spec.what} cannot be opened: {_reason(error)}") from error


def _create(spec: ArraySpec) -> Any:
    chunk_shape = [spec.chunk_tokens, *spec.row_shape]
    metadata = {
        "data_type": spec.dtype,
        "shape": [0, *spec.row_shape],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "fill_value": 0,
        "dimension_names": ["token", "width"][: len(chunk_shape)],
    }
    try:
        return ts.open({**_base_spec(spec), "metadata": metadata}, context=_context(0), create=True).result()
    except ValueError as error:
        raise StoreError(f"{spec.folder}: {spec.what} cannot be created: {_reason(error)}") from error


def _base_spec(spec: ArraySpec) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{spec.folder.absolute()}/"},
        # Both keep a lost file from passing for a chunk of zeros.
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }


def _context(cache_bytes: int) -> Any:
    return ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})


def _reason(error: Exception) -> str:
    """Say in a few words what TensorStore's message means; pass on what is unknown."""
    text = str(error)
    for part, meaning in _REASONS:
        if part in text:
            return meaning
    return re.sub(r"\s*\[\w+=.*", "", text, flags=re.DOTALL)
