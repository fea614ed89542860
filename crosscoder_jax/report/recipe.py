"""How the runs were trained, in words that need no knowledge of the code's names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crosscoder_jax.report.content import Method
from crosscoder_jax.report.files import find, is_recorded, source_entries
from crosscoder_jax.report.numbers import Figure, missing

NOT_RECORDED = "not recorded in the run"
NONE = "none"
_MINUS = "\N{MINUS SIGN}"

_TYPES = {
    "ReLU": "ReLU: every positive one",
    "JumpReLU": "JumpReLU: those above a learned threshold",
    "Gated": "gated: those whose gate is open, with a strength of its own",
    "SumOfNorms": "sum of the decoders' lengths",
    "NormOfConcatenation": "length of all decoders together",
    "Unweighted": "nothing",
    "SquaredError": "squared error",
    "MeanSquaredError": "mean squared error",
    "ErrorNorm": "length of the error, not squared",
    "L1OfNorms": "L1 (summed strength)",
    "L0Penalty": "L0 (number of active latents)",
}
"""What the types in a config are called where their own name would say little."""

_SETTINGS = {
    "anneal_steps": "annealed over {} steps",
    "warmup_steps": "warmed up over {} steps",
    "dead_after_tokens": "for latents silent for {} tokens",
}
"""How settings are written whose name followed by the value would read badly."""


@dataclass(frozen=True)
class RecipeRow:
    """A line of the recipe: a heading, what it means, and one value a run."""

    heading: str
    gloss: str
    values: tuple[Figure, ...]


@dataclass(frozen=True)
class _Field:
    """A line of the recipe and the field of a run's config that it shows."""

    heading: str
    key: str
    gloss: str = ""


_FIELDS = (
    _Field("Latents", "num_latents", "size of the dictionary"),
    _Field("Groups", "groups", "latents under rules of their own"),
    _Field("Sparsity", "sparsity", "which latents are active; k: how many a token"),
    _Field("Strength", "code_norm", "code norm: what activations are multiplied by when latents compete"),
    _Field("Reconstruction loss", "loss", "what training makes small"),
    _Field("Loss on the difference", "delta", "added for what the models differ in"),
    _Field("Nested dictionaries", "matryoshka", "prefixes that reconstruct on their own"),
    _Field("Sparsity penalty", "l1", "what activity costs"),
    _Field("Count penalty", "l0", "what active latents cost"),
    _Field("Dead-latent loss", "aux_k", "AuxK lets silent latents learn from what the others missed"),
    _Field("Resampling", "resampling", "restarts dead latents"),
    _Field("Batch, tokens", "batch_size"),
    _Field("Steps", "num_steps"),
    _Field("Learning rate", "learning_rate"),
    _Field("Warm-up steps", "warmup_steps", "until the full learning rate"),
    _Field("Compute dtype", "dtype"),
    _Field("Seed", "seed", "of everything random"),
    _Field("Null data", "null", "a change of the data that leaves nothing to find"),
)


def recipe_rows(methods: Sequence[Method]) -> tuple[RecipeRow, ...]:
    """Give the rows of the recipe table; what no run uses or records is left out."""
    rows = [
        RecipeRow("Reads", "", tuple(_sources(method) for method in methods)),
        *(
            RecipeRow(field.heading, field.gloss, tuple(_value(field, method) for method in methods))
            for field in _FIELDS
        ),
    ]
    return tuple(row for row in rows if any(not value.reason and value.text != NONE for value in row.values))


def describe(value: Any) -> str:
    """Write a config value in words: an object as its type and the settings that are not off.

    Examples:
        >>> describe({"type": "BatchTopK", "k": 100.0, "initial_k": None, "anneal_steps": 5000})
        'BatchTopK, k 100, annealed over 5,000 steps'
        >>> describe({"type": "L1OfNorms", "weight": 0.07, "warmup_steps": 0})
        'L1 (summed strength), weight 0.07'
    """
    if isinstance(value, Mapping):
        kind = [_TYPES.get(str(value["type"]), str(value["type"]))] if "type" in value else []
        settings = [_setting(k, v) for k, v in value.items() if k != "type" and not _is_off(v)]
        return ", ".join(kind + settings)
    if isinstance(value, list | tuple):
        return ", ".join(describe(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) >= 1_000:
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _value(field: _Field, method: Method) -> Figure:
    config = method.files.config
    value = find(config, field.key)
    if value is None or value in ([], ()):
        return Figure(NONE) if is_recorded(config, field.key) else missing(NOT_RECORDED)
    if field.key == "groups":
        return Figure("; ".join(_group(group) for group in value))
    if field.key == "delta":
        return Figure(f"{value['after']} {_MINUS} {value['before']}, weight {describe(value['weight'])}")
    return Figure(str(value) if field.key == "seed" else describe(value))


def _group(group: Mapping[str, Any]) -> str:
    """Write a group: its share of the latents and its rules."""
    rules = [f"{verb} {' and '.join(group[verb])} only" for verb in ("reads", "writes") if group.get(verb)]
    rules += ["one decoder for all"] if group.get("is_tied") else []
    rules += ["decoders of one length"] if group.get("is_norm_tied") else []
    rules += [f"k {group['k']:g} of its own"] if group.get("k") is not None else []
    cost = group.get("cost", 1)
    rules += [f"activity costs {cost:g} times as much"] if cost != 1 else []
    return f"{group['name']}: {100 * group['share']:g} %, {', '.join(rules)}".removesuffix(", ")


def _sources(method: Method) -> Figure:
    entries = source_entries(method.files.config)
    return Figure(", ".join(_source(entry) for entry in entries)) if entries else missing(NOT_RECORDED)


def _source(entry: Mapping[str, Any]) -> str:
    """Write a source, a derived one with what it is made of."""
    parts = entry.get("combination")
    if not parts:
        return str(entry["name"])
    made_of = " ".join(_term(float(weight), str(name)) for name, weight in parts).removeprefix("+ ")
    return f"{entry['name']} = {made_of}"


def _term(weight: float, name: str) -> str:
    sign = _MINUS if weight < 0 else "+"
    return f"{sign} {name}" if abs(weight) == 1 else f"{sign} {abs(weight):g} {name}"


def _setting(name: str, value: Any) -> str:
    return _SETTINGS.get(name, f"{name.replace('_', ' ')} {{}}").format(describe(value))


def _is_off(value: Any) -> bool:
    return value is None or value is False or (not isinstance(value, str | float) and not value)
