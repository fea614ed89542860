"""The conclusion of a report in plain sentences, each computed from the tables."""

from collections.abc import Sequence

from crosscoder_jax.diffing.intervals import errors_in_half_interval
from crosscoder_jax.report.content import (
    CONCENTRATED_TOKENS,
    Kind,
    Method,
    has_latent_scaling,
    most_leaning,
    num_groups,
)
from crosscoder_jax.report.files import source_entries
from crosscoder_jax.report.names import BASE_ONLY, BOTH, CHAT_ONLY, DECOUPLING, NOT_TESTED, SHRINKAGE
from crosscoder_jax.report.numbers import plural, share
from crosscoder_jax.report.outcomes import Outcomes


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
    found = main.all_found()
    if not found.claimed:
        return "Decoder norms claim no latent for one model only."
    if not has_latent_scaling(main):
        return f"Decoder norms claim {plural(found.claimed, 'model-specific latent')}, none of them tested."
    if found.claimed == 1:
        return f"The one latent claimed for one model only is {_fate(found)}."
    return f"Of {found.claimed:,} latents claimed for one model only, Latent Scaling {_outcomes(found)}."


def _outcomes(found: Outcomes) -> str:
    """Tell the three outcomes apart: what is undetermined is not refuted."""
    number = f"all {found.confirmed:,}" if found.confirmed == found.claimed > 1 else f"{found.confirmed:,}"
    parts = [f"confirms {number}{_certainty(found)}" if found.confirmed else "confirms none"]
    parts += [f"refutes {found.refuted:,} as {'an artefact' if found.refuted == 1 else 'artefacts'}"]
    parts += [f"leaves {found.undetermined:,} undetermined"]
    parts += [f"did not test {found.untested:,}"]
    numbers = (1, found.refuted, found.undetermined, found.untested)
    return _join([part for part, number in zip(parts, numbers, strict=True) if number])


def _certainty(found: Outcomes) -> str:
    """Tell of how many confirmed latents the whole interval agrees."""
    if found.beyond is None:
        return ""
    if found.confirmed == 1:
        return f" ({'' if found.beyond else 'not '}beyond the 95 % interval)"
    number = {0: "none", found.confirmed: "all"}.get(found.beyond, f"{found.beyond:,}")
    return f" ({number} of them beyond the 95 % interval)"


def _fate(found: Outcomes) -> str:
    if found.confirmed:
        certainty = {None: "", 0: ", though not beyond the 95 % interval"}
        return f"confirmed by Latent Scaling{certainty.get(found.beyond, ', beyond the 95 % interval')}"
    if found.refuted:
        return "refuted by Latent Scaling as an artefact"
    return "undetermined: there is too little evidence to test it"


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


def intervals(methods: Sequence[Method]) -> str:
    """Say what stands behind each number of a ratio."""
    groups = sorted({num_groups(method.files.summary) for method in methods})
    errors = _join([f"{errors_in_half_interval(number):.2f}" for number in groups])
    return (
        f"\N{PLUS-MINUS SIGN} is half the 95 % interval: {errors} standard errors by the jackknife, which "
        f"leaves out each of {_join([str(number) for number in groups])} groups of documents in turn"
    )


def _crosscoder(method: Method, methods: Sequence[Method]) -> str:
    is_named = sum(other.has_classes for other in methods) > 1
    lead = f"{method.name}: of" if is_named else "Of"
    chat, base = method.claimed(CHAT_ONLY), method.claimed(BASE_ONLY)
    opening = f"{lead} {plural(method.num_latents, 'latent')}, the decoder-norm histogram alone claims "
    if not chat + base:
        return f"{opening}none as chat-only and none as base-only.{_leaning(method)}{_by_design(method)}"
    claims = [f"{n:,} as {name}" for n, name in ((chat, CHAT_ONLY), (base, BASE_ONLY)) if n]
    missing = [f"none as {name}" for n, name in ((chat, CHAT_ONLY), (base, BASE_ONLY)) if not n]
    return f"{opening}{_join(claims + missing)}. {_tested(method)}{_by_design(method)}"


def _tested(method: Method) -> str:
    if not has_latent_scaling(method):
        return "Latent Scaling was not run on them, so none of these claims is tested."
    found = method.all_found()
    artefacts = [
        _verb(found.verdicts[verdict], "looks", "look", rest)
        for verdict, rest in (
            (SHRINKAGE, "like complete shrinkage"),
            (DECOUPLING, "like latent decoupling"),
            (BOTH, "like both"),
        )
    ]
    refuted = _join([part for part in artefacts if part])
    parts = [
        f"it refutes {found.refuted:,} ({refuted})" if refuted else "",
        _verb(found.undetermined, "has", "have", "too little evidence to tell"),
        _verb(found.untested, "was", "were", NOT_TESTED),
    ]
    rest = _join([part for part in parts if part])
    if found.confirmed == found.claimed:
        subject = "confirms it" if found.confirmed == 1 else f"confirms all {found.confirmed:,}"
    else:
        subject = f"confirms {found.confirmed:,} of them" if found.confirmed else "confirms none of them"
    certainty = _certainty(found) if found.confirmed > 1 else ""
    return f"Latent Scaling {subject}{certainty}{'; ' + rest if rest else ''}."


def _by_design(method: Method) -> str:
    """Tell apart from the findings what is exclusive because the recipe has groups that make it so."""
    designed = method.all_designed()
    if not designed.claimed:
        return ""
    many = designed.claimed > 1
    number = plural(designed.claimed, "latent")
    opening = (
        f" Not counted: {number} that {'are' if many else 'is'} exclusive by design, because a group of the "
        "recipe writes to one model only"
    )
    if designed.untested == designed.claimed:
        return f"{opening}."
    return f"{opening}; of {'these' if many else 'it'} Latent Scaling {_outcomes(designed)}."


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
        return f"{opening}; none puts more than 80 % of its activation on a single text{_RARE}."
    listed = _join([f"{number:,} on {label}" for label, number in sorted(found, key=lambda pair: -pair[1])])
    total = sum(number for _, number in found)
    verb = "puts more than 80 % of its" if total == 1 else "put more than 80 % of their"
    return f"{opening}; {total:,} {verb} activation on a single text ({listed}){_RARE}."


_RARE = f", not counting those that fire on fewer than {CONCENTRATED_TOKENS} tokens"


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
