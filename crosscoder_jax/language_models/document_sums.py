"""Losses summed by document, and the metrics that follow: ratios of sums, errors over documents."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from crosscoder_jax.diffing.closed_form import jackknife_error
from crosscoder_jax.metrics import recovered_fraction

ABLATIONS = ("mean", "zero")
"""What a reconstruction is compared with: the source's mean over the store, and zero."""
REPLACEMENTS = ("spliced", *(f"{name}_ablated" for name in ABLATIONS))
"""What takes the place of a source's activations."""

ByDocument = Mapping[str, Float[np.ndarray, "document"]]


class DocumentSums:
    """Sums over the tokens of each document, float64; memory grows with the documents alone."""

    def __init__(self) -> None:
        self._documents: list[Int[np.ndarray, "document"]] = []
        self._sums: list[Float[np.ndarray, "document quantity"]] = []
        self._names: tuple[str, ...] = ()
        self.num_tokens = 0

    def add(
        self, documents: Int[np.ndarray, "token"], values: Mapping[str, Float[np.ndarray, "token"]]
    ) -> None:
        """Add tokens with their numbers, which are those of every other call."""
        self._names = ("tokens", *values)
        self.num_tokens += len(documents)
        columns = np.stack([np.ones(len(documents)), *values.values()], axis=1)
        self._keep(documents, columns)

    def by_document(self) -> dict[str, Float[np.ndarray, "document"]]:
        """Return each quantity's sum over the tokens of every document, and the number of ``tokens``."""
        if not self._sums:
            return {"tokens": np.zeros(0)}
        documents, sums = np.concatenate(self._documents), np.concatenate(self._sums)
        self._documents, self._sums = [], []
        self._keep(documents, sums)
        return dict(zip(self._names, self._sums[0].T, strict=True))

    def _keep(self, documents: Int[np.ndarray, "row"], columns: Float[np.ndarray, "row quantity"]) -> None:
        found, place = np.unique(documents, return_inverse=True)
        sums = np.zeros((len(found), columns.shape[1]))
        np.add.at(sums, place, columns)  # sums[place] += columns would keep one row of each document
        self._documents.append(found)
        self._sums.append(sums)


def splice_metrics(sums: ByDocument) -> dict[str, float | None]:
    """Turn sums by document into the metrics of :func:`evaluate_spliced`: ratios of sums over all tokens.

    Args:
        sums: ``tokens``, ``ce/<source>/...`` and ``kl/<source>/...`` of every document, in nats.

    Raises:
        ValueError: if fewer than two documents have a token.
    """
    return _with_errors(sums, _recovered, "spliced")


def patch_metrics(sums: ByDocument) -> dict[str, float | None]:
    """Turn sums by document into the metrics of :func:`evaluate_patched`.

    Args:
        sums: ``tokens`` and ``kl/<set>`` of every document, in nats; ``none`` is one of the sets.

    Raises:
        ValueError: if fewer than two documents have a token.
    """
    return _with_errors(sums, _closed, "patched")


def _with_errors(
    sums: ByDocument, ratios: Callable[[Mapping[str, Any]], dict[str, Any]], what: str
) -> dict[str, float | None]:
    """Return ratios of the sums over all documents, each with its standard error by the jackknife."""
    is_used = sums["tokens"] > 0
    if is_used.sum() < 2:
        raise ValueError(
            f"there are {is_used.sum()} held-out documents to measure on, and a standard error compares two: "
            "raise max_tokens, or hold out a larger share of the documents"
        )
    totals = {name: np.sum(values) for name, values in sums.items()}
    estimates = ratios(totals)
    without_one = ratios({name: totals[name] - values for name, values in sums.items()})
    result: dict[str, float | None] = {
        f"{what}_tokens": int(totals["tokens"]),
        f"{what}_documents": int(is_used.sum()),
    }
    with jax.enable_x64(True):
        errors = {
            name: float(jackknife_error(jnp.asarray(values), jnp.asarray(is_used)))
            for name, values in without_one.items()
        }
    for name, value in estimates.items():
        result[name], result[f"se_{name}"] = _finite(float(value)), _finite(errors[name])
    return result


def _means(sums: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values / sums["tokens"] for name, values in sums.items() if name != "tokens"}


def _recovered(sums: Mapping[str, Any]) -> dict[str, Any]:
    ratios = _means(sums)
    for source in [name.split("/")[1] for name in sums if name.endswith("/clean")]:
        for loss, clean in (("ce", sums[f"ce/{source}/clean"]), ("kl", 0.0)):
            spliced = sums[f"{loss}/{source}/spliced"]
            for ablation in ABLATIONS:
                ablated = sums[f"{loss}/{source}/{ablation}_ablated"]
                ratios[f"{loss}_recovered/{source}/{ablation}"] = recovered_fraction(ablated, spliced, clean)
    return ratios


def _closed(sums: Mapping[str, Any]) -> dict[str, Any]:
    patched = {name.removeprefix("kl/"): values for name, values in sums.items() if name != "tokens"}
    closed = {
        f"kl_closed/{name}": recovered_fraction(patched["none"], values, 0.0)
        for name, values in patched.items()
        if name != "none"
    }
    return _means(sums) | closed


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
