"""What was compared with what: models and texts as rows of plain text."""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crosscoder_jax.report.content import Method
from crosscoder_jax.report.files import find, source_entries
from crosscoder_jax.report.numbers import Figure, count, share
from crosscoder_jax.report.recipe import NOT_RECORDED


@dataclass(frozen=True)
class ComparedSource:
    """One stored source: a model at a layer."""

    name: str
    model: str
    revision: str
    hook_point: str
    width: str


@dataclass(frozen=True)
class Row:
    """A line of a table: a heading and one value a column."""

    heading: str
    values: tuple[Figure, ...]


@dataclass(frozen=True)
class TextShare:
    """How many of the analysed tokens came from one text."""

    label: str
    tokens: Figure
    fraction: float | None


def compared_sources(method: Method) -> tuple[ComparedSource, ...]:
    """Give the stored sources that a run reads, as its config identifies its store."""
    identity = method.files.config.get("store_identity", {})
    stored = {name: entry for name, entry in identity.items() if _is_source(entry)}
    read = {
        name
        for entry in source_entries(method.files.config)
        for name, _ in entry.get("combination") or [(entry["name"], 1.0)]
    }
    return tuple(_source(name, entry) for name, entry in stored.items() if not read or name in read)


def text_labels(methods: Sequence[Method]) -> tuple[str, ...]:
    """Give the labels of the texts, in the order of the tables' columns."""
    return tuple(dict.fromkeys(label for method in methods for label in method.latents.suffixes("share_")))


def text_shares(method: Method) -> tuple[TextShare, ...]:
    """Give the held-out tokens of each text, as the summary of the diff counts them."""
    numbers: Mapping[str, int] = method.files.summary.get("tokens_by_label", {})
    total = sum(numbers.values())
    return tuple(
        TextShare(
            label,
            count(numbers.get(label), NOT_RECORDED),
            numbers[label] / total if label in numbers and total else None,
        )
        for label in text_labels([method])
    )


def token_rows(methods: Sequence[Method]) -> tuple[Row, ...]:
    """Give the rows on how many tokens each method saw."""
    analysed = [method.files.summary.get("num_tokens") for method in methods]
    rows = [
        Row(
            "Tokens in the store",
            tuple(count(m.files.provenance.get("num_tokens"), NOT_RECORDED) for m in methods),
        ),
        Row("Held-out tokens analysed", tuple(count(value, NOT_RECORDED) for value in analysed)),
        Row("in documents", tuple(count(m.num_documents(), NOT_RECORDED) for m in methods)),
        Row(
            "Held-out share of documents", tuple(share(_held_out(method), NOT_RECORDED) for method in methods)
        ),
    ]
    return tuple(row for row in rows if _is_known(row))


def versions(methods: Sequence[Method]) -> tuple[tuple[str, str], ...]:
    """Give the versions that the runs recorded and that of the package writing the page."""
    recorded: dict[str, str] = {}
    for method in methods:
        content = find(method.files.config, "versions") or find(method.files.provenance, "versions")
        recorded.update({k: str(v) for k, v in content.items()} if isinstance(content, Mapping) else {})
    try:
        recorded.setdefault("crosscoder-jax", importlib.metadata.version("crosscoder-jax"))
    except importlib.metadata.PackageNotFoundError:
        recorded.setdefault("crosscoder-jax", "from a checkout")
    return tuple(recorded.items())


def config_json(method: Method) -> str:
    """Give the config of a run as indented JSON."""
    return json.dumps(method.files.config, indent=2, ensure_ascii=False, sort_keys=True)


def _is_known(row: Row) -> bool:
    return any(value.text != "n/a" for value in row.values)


def _is_source(entry: Any) -> bool:
    """Tell a source in the identity of a store from the other facts there."""
    return isinstance(entry, Mapping) and "model" in entry


def _source(name: str, entry: Mapping[str, Any]) -> ComparedSource:
    known = {
        key: str(entry[key])
        for key in ("model", "revision", "hook_point", "width")
        if entry.get(key) is not None
    }
    return ComparedSource(
        name=name,
        model=known.get("model", "not recorded"),
        revision=short_revision(known.get("revision", "not recorded")),
        hook_point=known.get("hook_point", "not recorded"),
        width=known.get("width", "not recorded"),
    )


def short_model(model: str) -> str:
    """Give the name of a model without the folders it lies in; a hub id stays whole.

    Examples:
        >>> short_model("results/models/SmolLM2-135M")
        'SmolLM2-135M'
        >>> short_model("HuggingFaceTB/SmolLM2-135M")
        'HuggingFaceTB/SmolLM2-135M'
    """
    parts = model.replace("\\", "/").rstrip("/").split("/")
    is_hub_id = len(parts) <= 2 and parts[0] not in ("", ".", "..", "~")
    return model if is_hub_id else parts[-1]


def short_revision(revision: str) -> str:
    """Give enough of a commit or a checksum to tell it from others; the config below has the whole.

    Examples:
        >>> short_revision("sha256:36e3c1e8720348fdea679f9c610446dc")
        'sha256:36e3c1e87203'
        >>> short_revision("main")
        'main'
    """
    kind, colon, digits = revision.rpartition(":")
    return f"{kind}{colon}{digits[:12]}"


def _held_out(method: Method) -> float | None:
    fraction = method.files.config.get("split", {}).get("fraction")
    return None if fraction is None else float(fraction)
