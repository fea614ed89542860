"""The model card of a published crosscoder: what it reads, how it was made, how well it does."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from crosscoder_jax.configs import config_to_json
from crosscoder_jax.crosscoder import Crosscoder
from crosscoder_jax.sources import Source

_PUNCTUATION = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&])")


def model_card(
    crosscoder: Crosscoder,
    *,
    repo_id: str,
    provenance: Mapping[str, Any],
    metrics: Mapping[str, float],
    license: str | None = None,
) -> str:
    """Return the card as Markdown with YAML front matter.

    Everything that comes from names and notes is escaped: it shows as it is written and is never
    read as markup.

    Args:
        crosscoder: the published one.
        repo_id: where it is published, ``owner/name``.
        provenance: what was recorded of store and recipe.
        metrics: name and value of what was measured.
        license: identifier of the licence, if one is to be stated.
    """
    stored = provenance.get("store")
    store = stored if isinstance(stored, Mapping) else {}
    parts = [
        _front_matter(store, license),
        f"# {_escaped(repo_id)}",
        _opening(crosscoder),
        _usage(crosscoder, repo_id),
        "## Sources",
        _sources(crosscoder, store),
        "## Crosscoder",
        _table(("field", "value"), _fields(config_to_json(crosscoder.config), left_out=("sources",))),
    ]
    recipe = provenance.get("train")
    if isinstance(recipe, Mapping):
        parts += ["## Recipe", _table(("field", "value"), _fields(recipe, left_out=("crosscoder",)))]
    if metrics:
        rows = [(name, f"{value:,.4g}") for name, value in metrics.items()]
        parts += ["## Metrics", "On held-out tokens:", _table(("metric", "value"), rows)]
    return "\n\n".join(parts) + "\n"


def _front_matter(store: Mapping[str, Any], license: str | None) -> str:
    # Every JSON text is YAML, so no string in it can mean anything else.
    fields: dict[str, Any] = {"library_name": "crosscoder_jax"}
    if license is not None:
        fields["license"] = license
    if models := _hub_models(store):
        fields["base_model"] = models
    fields["tags"] = ["crosscoder", "model-diffing", "sparse-autoencoder", "interpretability"]
    return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in fields.items()), "---"])


def _hub_models(store: Mapping[str, Any]) -> list[str]:
    """Return the models that have a revision: others were folders of the machine."""
    sources = [source for source in store.values() if isinstance(source, Mapping)]
    return list(dict.fromkeys(str(s["model"]) for s in sources if s.get("revision") and s.get("model")))


def _opening(crosscoder: Crosscoder) -> str:
    config = crosscoder.config
    names = ", ".join(_escaped(name) for name in config.sources.names)
    kind = "A crosscoder" if len(config.sources) > 1 else "A sparse autoencoder"
    return f"{kind} with {config.num_latents:,} latents that reads {names}."


def _usage(crosscoder: Crosscoder, repo_id: str) -> str:
    return "\n".join(
        [
            "```python",
            "import crosscoder_jax as cc",
            "",
            f'crosscoder = cc.load("{repo_id}")',
            f"code = crosscoder.encode(acts)  # raw activations [token, {crosscoder.config.sources.width}]",
            "recon = crosscoder.decode(code)",
            "```",
        ]
    )


def _sources(crosscoder: Crosscoder, store: Mapping[str, Any]) -> str:
    columns = ("source", "width", "model", "revision", "hook point")
    return _table(columns, [_source_row(source, store) for source in crosscoder.config.sources])


def _source_row(source: Source, store: Mapping[str, Any]) -> tuple[str, ...]:
    if source.combination is not None:
        terms = " ".join(f"{coefficient:+g} {name}" for name, coefficient in source.combination)
        return (source.name, str(source.width), terms, "", "")
    recorded = store.get(source.name)
    known = recorded if isinstance(recorded, Mapping) else {}
    shown = (str(known.get(name) or "") for name in ("model", "revision", "hook_point"))
    return (source.name, str(source.width), *shown)


def _fields(config: Mapping[str, Any], left_out: Sequence[str]) -> list[tuple[str, str]]:
    hidden = {"type", *left_out}
    return [(name, _shown(value)) for name, value in config.items() if name not in hidden]


def _shown(value: Any) -> str:
    """Show a value of a config: a dataclass as ``Name(field=value)``, without the fields that are not set."""
    if isinstance(value, Mapping):
        given = {name: field for name, field in value.items() if name != "type" and field is not None}
        fields = ", ".join(f"{name}={_shown(field)}" for name, field in given.items())
        return f"{value.get('type', '')}({fields})" if fields else str(value.get("type", "{}"))
    return "none" if value is None else str(value)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    return _PUNCTUATION.sub(r"\\\1", " ".join(text.split()))
