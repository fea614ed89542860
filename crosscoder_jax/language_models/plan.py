"""What a harvest will store, worked out from its config before any weights are read."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crosscoder_jax.activations.manifest import StoredSource
from crosscoder_jax.language_models.capture import check_layers, hook_point
from crosscoder_jax.language_models.config import HarvestConfig
from crosscoder_jax.language_models.loading import ModelFacts, read_facts
from crosscoder_jax.language_models.rows import text_fingerprint

_NOT_IN_FINGERPRINT = ("store", "device", "checkpoint_tokens", "base_revision", "chat_revision")
"""Settings that may differ between two runs that write the same store."""


@dataclasses.dataclass(frozen=True)
class PlannedSource:
    """One stored source and where it is read."""

    stored: StoredSource
    """What the store will say of it."""
    model: str
    """``base``, ``chat``, or the name of one between them."""
    layer: int
    """Block after which it is read."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The stored sources in order, and the facts of the models."""

    sources: tuple[PlannedSource, ...]
    """All layers of base, of each model between, then all of chat."""
    facts: Mapping[str, ModelFacts]
    """By the models' names, in the same order."""

    def layers(self, model: str) -> list[int]:
        """Blocks after which a model is read."""
        return [source.layer for source in self.sources if source.model == model]


def plan_harvest(config: HarvestConfig) -> Plan:
    """Resolve models and layers into the list of stored sources.

    Raises:
        ValueError: when a model or layer does not exist, or the context is longer than a model can read.
    """
    facts = {name: read_facts(reference) for name, reference in config.references.items()}
    for model, found in facts.items():
        if found.max_positions is not None and config.context > found.max_positions:
            raise ValueError(
                f"context={config.context} is longer than {model} can read: "
                f"take {found.max_positions} or less"
            )
    by_model = {model: config.layers or (found.num_blocks // 2,) for model, found in facts.items()}
    by_model["chat"] = config.chat_layers or by_model["chat"]
    sources = []
    for model, chosen in by_model.items():
        check_layers(chosen, facts[model].num_blocks, f"{model} ({facts[model].reference})")
        sources += [_planned(model, facts[model], layer, is_single=len(chosen) == 1) for layer in chosen]
    return Plan(tuple(sources), facts)


def _planned(model: str, facts: ModelFacts, layer: int, *, is_single: bool) -> PlannedSource:
    reference = dataclasses.replace(facts.reference, revision=None)
    stored = StoredSource(
        name=model if is_single else f"{model}.L{layer}",
        width=facts.width,
        model=str(reference),
        revision=facts.revision,
        hook_point=hook_point(layer),
    )
    return PlannedSource(stored, model, layer)


def fingerprint(config: HarvestConfig, plan: Plan) -> dict[str, Any]:
    """Collect what must be equal for a store to be completed: the config, the exact models and texts."""
    fields = dataclasses.asdict(config)
    for name in _NOT_IN_FINGERPRINT:
        del fields[name]
    for text, source in zip(fields["texts"], config.texts, strict=True):
        text["content"] = text_fingerprint(source)
    if config.chat_template is not None:
        fields["chat_template"] = sha256_of_text(read_template(config.chat_template))
    fields["revisions"] = {name: facts.revision for name, facts in plan.facts.items()}
    fields["layers"], fields["chat_layers"] = plan.layers("base"), plan.layers("chat")
    del fields["between"]
    if config.between:  # else as it was before there was such a field
        between = list(config.references.items())[1:-1]
        fields["between"] = [[name, str(dataclasses.replace(r, revision=None))] for name, r in between]
    return fields


def read_template(path: str) -> str:
    """Read a chat template.

    Raises:
        ValueError: when there is no such file.
    """
    if not Path(path).is_file():
        raise ValueError(f"chat_template={path}: there is no such file")
    return Path(path).read_text(encoding="utf-8")


def sha256_of_text(text: str) -> str:
    """Hash a text, such as a chat template."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
