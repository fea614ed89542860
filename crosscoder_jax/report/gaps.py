"""What a run's files lack and what in them does not belong together, in sentences."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from crosscoder_jax.report.content import Method
from crosscoder_jax.report.files import RunFiles


def missing_parts(methods: Sequence[Method]) -> tuple[str, ...]:
    """Say in a sentence each which optional files of which runs are missing."""
    return tuple(
        f"The run of the {method.name} has {what} ({command} writes it)."
        for method in methods
        for what, command in _missing(method.files)
    )


def stale_parts(methods: Sequence[Method]) -> tuple[str, ...]:
    """Say in a sentence each which numbers were measured on other weights or tokens than the run's."""
    return tuple(
        f"The {what} of the {method.name} {fault}."
        for method in methods
        for what, fault in _faults(method.files)
    )


def stale_files(files: RunFiles) -> tuple[str, ...]:
    """Say of one run, in a sentence each, what :func:`stale_parts` says of several."""
    return tuple(f"{files.folder}: its {what} {fault}" for what, fault in _faults(files))


def _missing(files: RunFiles) -> Iterator[tuple[str, str]]:
    if not files.metrics:
        yield "no metrics.jsonl, so its training curves are left out", "crosscoder-jax train"
    if files.evaluation is None:
        yield "no evaluation.json, so its held-out numbers are n/a", "crosscoder-jax evaluate"
    if files.latents.has("verdict") and not files.latents.has("is_beyond_interval"):
        yield "no column is_beyond_interval, so what its intervals say is left out", "crosscoder-jax diff"
    if not files.latents.has("active_documents"):
        yield "no column active_documents, so documents are not counted", "crosscoder-jax diff"
    if files.snippets is None:
        yield "no diff/snippets.json, so its cards have no passages", "crosscoder-jax diff"


def _faults(files: RunFiles) -> Iterator[tuple[str, str]]:
    trained_on = files.config.get("store_identity", {}).get("fingerprint")
    parts: tuple[tuple[str, Mapping[str, Any] | None, str], ...] = (
        ("evaluation.json", files.evaluation, "evaluate"),
        ("table in diff/", files.summary, "diff"),
    )
    for what, content, command in parts:
        if content is None:
            continue
        again = f"run crosscoder-jax {command} --run {files.folder} again"
        measured = content.get("measured_on")
        if measured is None:
            yield what, f"does not say which weights and which store it was measured on: {again}"
            continue
        if measured["weights_sha256"] != files.weights_sha256:
            yield what, f"is older than its crosscoder, which was calibrated or replaced since: {again}"
        if measured["store_fingerprint"] != trained_on:
            yield what, "is of another store than it was trained on, so training may have seen those texts"
