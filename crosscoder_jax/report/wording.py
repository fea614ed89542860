"""The conclusion of a report in plain sentences, each computed from the tables."""

from collections.abc import Sequence

from crosscoder_jax.report.content import Kind, Method, has_latent_scaling, most_leaning
from crosscoder_jax.report.files import source_entries
from crosscoder_jax.report.names import (
    BASE_ONLY,
    BOTH,
    CHAT_ONLY,
    CONFIRMED,
    DECOUPLING,
    NOT_TESTED,
    SHRINKAGE,
    UNDETERMINED,
)
from crosscoder_jax.report.numbers import plural, share


def conclusion(methods: Sequence[Method]) -> tuple[str, ...]:
    """Give the conclusion, a paragraph a method: by claims where there are classes, else by texts."""
    return tuple(
        _crosscoder(method, methods) if method.has_classes else _unclassed(method) for method in methods
    )


def headline(methods: Sequence[Method]) -> str:
    """Give the result of the main crosscoder in one short sentence."""
    main = next((method for method in methods if method.has_classes), None)
    if main is None:
        return "No crosscoder of two models is among the runs: decoder norms cannot tell whose a latent is."
    claimed = main.claimed()
    if not claimed:
        return "Decoder norms claim no latent for one model only."
    if not has_latent_scaling(main):
        return f"Decoder norms claim {plural(claimed, 'model-specific latent')}, none of them tested."
    confirmed = main.verdicts(CONFIRMED)
    if not confirmed:
        subject = (
            "The one claimed model-specific latent does not survive"
            if claimed == 1
            else f"None of {claimed:,} claimed model-specific latents survives"
        )
        return f"{subject} Latent Scaling."
    subject = (
        "The one claimed model-specific latent"
        if claimed == 1
        else f"{confirmed:,} of {claimed:,} claimed model-specific latents"
    )
    return f"{subject} {'survives' if confirmed == 1 else 'survive'} Latent Scaling."


_NULL_NOTES = {
    "SwapCoordinates": (
        "In the null run the two models were swapped in half of the coordinates before training, so that no "
        "direction belongs to one side alone while as much differs: the latents that are exclusive in it are "
        "claimed by mistake. It cannot show complete shrinkage; Latent Scaling tests for that."
    ),
    "SwapDocuments": (
        "In the null run the two models were swapped in every second document before training. What one "
        "model has alone is then found on both sides, and the two classes differ by chance only: compare the "
        "difference between the classes, not their size. It is no count of false latents."
    ),
    "SameModel": (
        "In the null run a model was compared with itself: an exclusive latent in it would be an error of "
        "the method."
    ),
}


def null_notes(methods: Sequence[Method]) -> tuple[str, ...]:
    """Say what the null runs beside some methods are nulls of, a paragraph a kind."""
    kinds = {
        str(null["kind"].get("type")) for method in methods if (null := method.files.summary.get("null"))
    }
    return tuple(_NULL_NOTES.get(kind, f"The null run was trained on {kind} data.") for kind in sorted(kinds))


def _crosscoder(method: Method, methods: Sequence[Method]) -> str:
    is_named = sum(other.has_classes for other in methods) > 1
    lead = f"{method.name}: of" if is_named else "Of"
    chat, base = method.claimed(CHAT_ONLY), method.claimed(BASE_ONLY)
    opening = f"{lead} {plural(method.num_latents, 'latent')}, the decoder-norm histogram alone claims "
    if not chat + base:
        return opening + "none as chat-only and none as base-only." + _leaning(method)
    claims = [f"{n:,} as {name}" for n, name in ((chat, CHAT_ONLY), (base, BASE_ONLY)) if n]
    missing = [f"none as {name}" for n, name in ((chat, CHAT_ONLY), (base, BASE_ONLY)) if not n]
    return f"{opening}{_join(claims + missing)}. {_tested(method)}"


def _tested(method: Method) -> str:
    if not has_latent_scaling(method):
        return "Latent Scaling was not run on them, so none of these claims is tested."
    parts = [
        _verb(method.verdicts(SHRINKAGE), "looks", "look", "like complete shrinkage"),
        _verb(method.verdicts(DECOUPLING), "looks", "look", "like latent decoupling"),
        _verb(method.verdicts(BOTH), "looks", "look", "like both"),
        _verb(method.verdicts(UNDETERMINED), "has", "have", "too little evidence"),
        _verb(method.verdicts(NOT_TESTED), "was", "were", NOT_TESTED),
    ]
    confirmed = method.verdicts(CONFIRMED)
    rest = _join([part for part in parts if part])
    subject = f"confirms {confirmed:,} of them" if confirmed else "confirms none of them"
    if confirmed == method.claimed():
        subject = "confirms it" if confirmed == 1 else f"confirms all {confirmed:,}"
    return f"Latent Scaling {subject}{'; ' + rest if rest else ''}."


def _leaning(method: Method) -> str:
    span = most_leaning(method)
    if span is None:
        return " No latent is alive."
    return (
        f" Among live latents the decoder norm difference runs from {span[0]:.2f} to {span[1]:.2f}, "
        "where 0.5 is shared alike: if something changed, it is spread over latents that both models have."
    )


def _unclassed(method: Method) -> str:
    explained = method.fraction_explained()
    opening = f"{method.name}: {plural(method.num_latents, 'latent')}"
    if explained is not None:
        opening += f" explain {share(explained).text} of the variance of {what_is_read(method)}"
    if method.kind is Kind.MANY:
        opening += ", and none is claimed for one model, because classes compare two sources"
    found = [(label, number) for label, number in method.concentrated.items() if number]
    if not method.concentrated:
        return f"{opening}; which text each fires on was not recorded."
    if not found:
        return f"{opening}; none puts more than 80 % of its activation on a single text."
    listed = _join([f"{number:,} on {label}" for label, number in sorted(found, key=lambda pair: -pair[1])])
    total = sum(number for _, number in found)
    verb = "puts more than 80 % of its" if total == 1 else "put more than 80 % of their"
    return f"{opening}; {total:,} {verb} activation on a single text ({listed})."


def what_is_read(method: Method) -> str:
    """Say what a run reads, as the end of a sentence."""
    if method.kind is Kind.DIFFERENCE:
        return "the difference between the models"
    names = [str(entry["name"]) for entry in source_entries(method.files.config)]
    return names[0] if len(names) == 1 else f"the {len(names)} sources {_join(names)}"


def _verb(number: int, singular: str, many: str, rest: str) -> str:
    return f"{number:,} {singular if number == 1 else many} {rest}" if number else ""


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""
