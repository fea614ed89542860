"""Read a whole store and say what is wrong with it."""

from collections.abc import Iterator

import numpy as np

from crosscoder_jax.activations.arrays import StoredArray
from crosscoder_jax.activations.manifest import StoredSource, StoreError
from crosscoder_jax.activations.statistics import MomentAccumulator, SourceStatistics, finite_rows
from crosscoder_jax.activations.store import ActivationStore
from crosscoder_jax.typing import Progress

_RELATIVE_TOLERANCE = 1e-9
"""Writer and verifier sum the same chunks in float64: they differ by the order of a sum at most."""


def find_faults(store: ActivationStore, progress: Progress | None = None) -> list[str]:
    """Return the faults of ``store``, one line each; see :meth:`ActivationStore.verify`."""
    report = _Reporter(progress, store.num_tokens * (len(store.arrays) + len(store.columns)))
    faults: list[str] = []
    for source, array in zip(store.manifest.sources, store.arrays, strict=True):
        faults += _source_faults(source, array, store.manifest.statistics[source.name], report)
    for name, array in store.columns.items():
        faults += _column_faults(store, name, array, report)
    return faults


class _Reporter:
    """Counts tokens over all arrays for a progress callable that may be absent."""

    def __init__(self, progress: Progress | None, total: int):
        self._progress, self._total, self._done = progress, total, 0

    def advance(self, tokens: int) -> None:
        self._done += tokens
        if self._progress is not None:
            self._progress(self._done, self._total, "tokens")


def _source_faults(
    source: StoredSource, array: StoredArray, expected: SourceStatistics, report: _Reporter
) -> list[str]:
    faults, moments = [], MomentAccumulator.empty(source.width)
    for start, rows in _chunks(array, report):
        if isinstance(rows, str):
            faults.append(rows)
            continue
        bad = np.flatnonzero(~finite_rows(rows))
        if len(bad):
            spec = array.spec
            faults.append(
                f"{spec.chunk_file(start // spec.chunk_tokens)}: {spec.tokens(start, start + len(rows))}: "
                f"{len(bad)} rows are not finite, the first is token {start + int(bad[0])}"
            )
        else:
            moments = moments.update(rows)
    # The statistics of a part say nothing of those of the whole.
    return faults or _statistics_faults(source, array, expected, moments.finalize())


def _statistics_faults(
    source: StoredSource, array: StoredArray, expected: SourceStatistics, found: SourceStatistics
) -> list[str]:
    scale = max(found.mean_norm, np.finfo(np.float32).tiny)
    for name in ("mean", "std", "mean_norm"):
        error = np.max(np.abs(getattr(expected, name) - getattr(found, name))) / scale
        if not error <= _RELATIVE_TOLERANCE:
            return [
                f"{array.spec.store}: {array.spec.tokens(0, array.num_tokens)}: the manifest's {name} is "
                f"{error:.1e} of the mean norm away from the stored activations: the manifest belongs to "
                "other activations; write the store again"
            ]
    return []


def _column_faults(store: ActivationStore, name: str, array: StoredArray, report: _Reporter) -> list[str]:
    faults, parts = [], []
    for _, values in _chunks(array, report):
        if isinstance(values, str):
            faults.append(values)
        else:
            parts.append(values)
    if faults:
        return faults
    values, where = np.concatenate(parts), array.spec.tokens(0, array.num_tokens)
    top = len(store.manifest.labels) if name == "labels" else np.iinfo(np.int32).max
    if values.min() < 0 or values.max() >= top:
        faults.append(
            f"{array.spec.folder}: {where}: values {values.min()} to {values.max()} are out of range"
        )
    if name == "documents":
        runs = np.count_nonzero(np.diff(values)) + 1
        distinct = len(np.unique(values))
        if not runs == distinct == store.manifest.num_documents:
            faults.append(
                f"{array.spec.folder}: {where}: {distinct} documents lie in {runs} runs, but the manifest "
                f"says {store.manifest.num_documents}: documents must be contiguous"
            )
    return faults


def _chunks(array: StoredArray, report: _Reporter) -> Iterator[tuple[int, np.ndarray | str]]:
    """Yield the first token and the content of each chunk, or the fault in its place."""
    for start in range(0, array.num_tokens, array.spec.chunk_tokens):
        stop = min(start + array.spec.chunk_tokens, array.num_tokens)
        try:
            content: np.ndarray | str = array.read(start, stop)
        except StoreError as error:
            content = str(error)
        report.advance(stop - start)
        yield start, content
