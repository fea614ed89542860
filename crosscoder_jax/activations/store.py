"""Read an activation store."""

import collections
import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int16, Int32, Integer, Shaped

from crosscoder_jax.activations.arrays import StoredArray
from crosscoder_jax.activations.atomic import read_json
from crosscoder_jax.activations.layout import COLUMNS, VOCABULARY_NAME, column_spec, source_spec
from crosscoder_jax.activations.manifest import Manifest, StoreError, describe_differences
from crosscoder_jax.sources import Source, Sources
from crosscoder_jax.typing import Progress

_COLUMN_CACHE_BYTES = 16 << 20
_READS_IN_FLIGHT = 4


class ActivationStore:
    """A finished store, opened for reading; made by :meth:`open`.

    Nothing is kept in memory but a few recently read pieces of the columns, so a store may be
    larger than memory. Activations come in the stored type (``ml_dtypes.bfloat16`` or
    ``float32``), with the sources concatenated in the manifest's order.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.path = folder
        self.manifest = manifest
        dtype, chunk = manifest.dtype, manifest.chunk_tokens
        specs = [source_spec(folder, source, dtype, chunk) for source in manifest.sources]
        self.arrays = tuple(StoredArray.open(spec) for spec in specs)
        self.columns = {
            name: StoredArray.open(column_spec(folder, name, chunk), cache_bytes=_COLUMN_CACHE_BYTES)
            for name in COLUMNS
        }
        for array in (*self.arrays, *self.columns.values()):
            if array.num_tokens != manifest.num_tokens:
                raise StoreError(
                    f"{array.spec.folder}: {array.spec.what} has {array.num_tokens} tokens, but the "
                    f"manifest says {manifest.num_tokens}: the files belong to different stores"
                )

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "ActivationStore":
        """Open the store in folder ``path``.

        Raises:
            StoreError: if there is none, if it is half-written, or if its arrays are not what its
                manifest says.
        """
        folder = Path(path)
        return cls(folder, Manifest.read(folder))

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return self.manifest.num_tokens

    @property
    def sources(self) -> Sources:
        """The stored sources, in the order in which :meth:`read` concatenates them."""
        return Sources(tuple(Source(source.name, source.width) for source in self.manifest.sources))

    @property
    def dtype(self) -> np.dtype:
        """Type of what :meth:`read` returns."""
        return np.dtype(ml_dtypes.bfloat16 if self.manifest.dtype == "bfloat16" else np.float32)

    def require_identity(self, identity: Mapping[str, Any]) -> None:
        """Refuse a store of other models than those of ``identity``.

        Args:
            identity: what :meth:`Manifest.identity` returned for the store that was used before.

        Raises:
            StoreError: listing what differs.
        """
        differences = describe_differences(identity, self.manifest.identity(), "", ("expected", "stored"))
        if differences:
            raise StoreError(
                f"{self.path}: holds activations of other models: {'; '.join(differences)}; "
                "use the store that was used before, or begin anew with this one"
            )

    def read(self, start: int, stop: int) -> Float[np.ndarray, "token width"]:
        """Read the activations of tokens ``start`` to ``stop``, in raw units.

        Raises:
            StoreError: if a file is damaged, naming it, the source and the tokens it holds.
            ValueError: if the range is not inside the store.
        """
        self._require_range(start, stop)
        return self.read_rows(np.arange(start, stop))

    def read_rows(self, token_index: Integer[np.ndarray, "token"]) -> Float[np.ndarray, "token width"]:
        """Read the activations of any tokens, each file that holds one of them once.

        Raises:
            StoreError: as :meth:`read`.
            ValueError: if an index is outside the store.
        """
        if len(token_index):
            self._require_range(int(token_index.min()), int(token_index.max()) + 1)
        order = np.argsort(token_index, kind="stable")
        # Rows are moved as integers: NumPy copies those faster than ml_dtypes' types.
        moved = np.dtype(f"uint{8 * self.dtype.itemsize}")
        rows = np.empty((len(token_index), self.sources.width), moved)
        for part, low, destination, index, wait in self._pieces(token_index[order], order):
            block = wait().view(moved)
            # Repeated indices may be as many as the rows of a span with gaps, so the length alone
            # does not tell that a span is wanted as it is.
            is_whole = len(index) == len(block) and bool(np.all(np.diff(index) == 1))
            rows[destination, part] = block if is_whole else block[index - low]
        return rows.view(self.dtype)

    def tokens(self, start: int, stop: int) -> Int32[np.ndarray, "token"]:
        """Read the token ids of tokens ``start`` to ``stop``."""
        return self._column("tokens", start, stop)

    def documents(self, start: int, stop: int) -> Int32[np.ndarray, "token"]:
        """Read the document index of tokens ``start`` to ``stop``."""
        return self._column("documents", start, stop)

    def positions(self, start: int, stop: int) -> Int32[np.ndarray, "token"]:
        """Read the position in their document of tokens ``start`` to ``stop``."""
        return self._column("positions", start, stop)

    def labels(self, start: int, stop: int) -> Int16[np.ndarray, "token"]:
        """Read which text tokens ``start`` to ``stop`` are from: indices into the manifest's labels."""
        return self._column("labels", start, stop)

    def vocabulary(self) -> dict[int, bytes]:
        """Read the raw bytes of each token id; empty if the store has no vocabulary."""
        path = self.path / VOCABULARY_NAME
        if not path.is_file():
            return {}
        return {int(token): text.encode("latin-1") for token, text in read_json(path).items()}

    def verify(self, progress: Progress | None = None) -> list[str]:
        """Read everything and return what is wrong with it, one line per fault; empty if sound.

        Looks for damaged, truncated and missing files, for rows that are not finite, for
        statistics that disagree with the activations, and for columns that contradict the
        manifest.
        """
        from crosscoder_jax.activations.verify import find_faults

        return find_faults(self, progress)

    def _column(self, name: str, start: int, stop: int) -> Shaped[np.ndarray, "token"]:
        self._require_range(start, stop)
        return self.columns[name].read(start, stop)

    def _require_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(
                f"{self.path}: tokens {start} to {stop} are not within the store's 0 to {self.num_tokens}"
            )

    def _pieces(
        self, token_index: Integer[np.ndarray, "token"], order: Integer[np.ndarray, "token"]
    ) -> Iterator[tuple]:
        """Read what each file holds of the sorted ``token_index``, a few files ahead."""
        pieces = self._plan(token_index, order)
        ahead = collections.deque()
        for part, array, destination, index in pieces:
            low, high = int(index[0]), int(index[-1]) + 1
            ahead.append((part, low, destination, index, array.start_read(low, high)))
            if len(ahead) > _READS_IN_FLIGHT:
                yield ahead.popleft()
        yield from ahead

    def _plan(
        self, token_index: Integer[np.ndarray, "token"], order: Integer[np.ndarray, "token"]
    ) -> Iterator[tuple]:
        edges = np.flatnonzero(np.diff(token_index // self.manifest.chunk_tokens)) + 1
        bounds = [0, *edges.tolist(), len(token_index)] if len(token_index) else []
        for low, high in itertools.pairwise(bounds):
            for part, array in zip(self.sources.slices(), self.arrays, strict=True):
                yield part, array, order[low:high], token_index[low:high]
