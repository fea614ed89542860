"""Read back from a store what it was harvested from, and refuse what is no longer the same."""

import dataclasses

from crosscoder_jax.activations.manifest import describe_differences
from crosscoder_jax.activations.store import ActivationStore
from crosscoder_jax.configs import config_from_json
from crosscoder_jax.language_models.config import HarvestConfig, SpliceConfig
from crosscoder_jax.language_models.loading import ModelFacts
from crosscoder_jax.language_models.plan import Plan, fingerprint

WRITER = "crosscoder_jax harvest"
"""What a harvest calls itself in the provenance of its stores."""


def harvest_config(store: ActivationStore) -> HarvestConfig:
    """Return the config of the harvest that wrote a store, with the models' exact revisions.

    Raises:
        ValueError: when it was not written by a harvest.
    """
    provenance = store.manifest.provenance
    if provenance.get("writer") != WRITER:
        raise ValueError(
            f"{store.path}: does not say which models and texts it came from: only a crosscoder trained on "
            "a store that 'harvest' wrote can be spliced into its models"
        )
    recorded = {**provenance["config"], "store": str(store.path)}
    config = config_from_json(HarvestConfig, recorded, where=f"{store.path}: provenance.config")
    pinned = {
        name: ModelFacts(reference, provenance["models"][name]["revision"], 0, 0, None).pinned()
        for name, reference in config.references.items()
    }
    between = tuple(f"{name}={pinned[name]}" for name in pinned if name not in ("base", "chat"))
    return dataclasses.replace(
        config,
        base_revision=pinned["base"].revision,
        chat_revision=pinned["chat"].revision,
        between=between,
    )


def with_changes(harvested: HarvestConfig, config: SpliceConfig) -> HarvestConfig:
    """Return what a measurement reads: the harvest's models on the texts that are asked for.

    Raises:
        ValueError: when one of them is a text of the harvest, of which a part was trained on.
    """
    for text in config.texts or ():
        place = (text.location, text.subset, text.split)
        if place in [(known.location, known.subset, known.split) for known in harvested.texts]:
            raise ValueError(
                f"text {text.label!r} ({text.location}) was trained on: leave texts out to measure on the "
                "documents that were held out of it"
            )
    return dataclasses.replace(
        harvested,
        texts=config.texts or harvested.texts,
        batch_size=config.batch_size or harvested.batch_size,
        device=config.device,
    )


def refuse_changes(store: ActivationStore, config: HarvestConfig, plan: Plan, *, is_own_texts: bool) -> None:
    """Refuse models and texts that are not those of the harvest: documents are held out by their number.

    Args:
        store: written by the harvest.
        config: of what is to be read now.
        plan: of the same.
        is_own_texts: Whether the texts of the harvest are read again.

    Raises:
        ValueError: naming what has changed.
    """
    words = ("harvested", "found")
    found = {planned.stored.name: dataclasses.asdict(planned.stored) for planned in plan.sources}
    differences = describe_differences(store.manifest.identity(), found, "", words)
    settings = fingerprint(config, plan)
    for name in ("chat_template", *(["texts"] if is_own_texts else [])):
        differences += describe_differences(store.manifest.config.get(name), settings[name], name, words)
    if differences:
        raise ValueError(
            f"{store.path}: models or texts have changed since the harvest ({'; '.join(differences)}): "
            "restore them, or harvest and train again"
        )
