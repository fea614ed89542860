"""What stands on the cards of the latents that a reader should see."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosscoder_jax.report.choice import (
    choose_concentrated,
    choose_designed,
    choose_exclusive,
    choose_leaning,
    choose_strongest,
)
from crosscoder_jax.report.content import Kind, Method
from crosscoder_jax.report.names import (
    BASE_ONLY,
    CHAT_ONLY,
    CONFIRMED,
    EXCLUSIVE_CLASSES,
    NOT_TESTED,
    UNDETERMINED,
)
from crosscoder_jax.report.numbers import Figure, count, decimal, interval, share, significant
from crosscoder_jax.report.outcomes import is_beyond, verdict_words
from crosscoder_jax.report.text import quoted, visible
from crosscoder_jax.report.wording import what_is_read

NO_SNIPPETS = (
    "No snippets were kept for this latent: they are stored for the strongest latents only, for more of them "
    "with crosscoder-jax diff --num-snippet-latents."
)


@dataclass(frozen=True)
class Token:
    """A token of a snippet: visible text, strength in 0..1 of the latent's strongest shown, and value."""

    space: str
    """Blanks before the text, shown without colour; empty for a token of blanks alone."""
    text: str
    strength: float
    value: Figure
    is_peak: bool


@dataclass(frozen=True)
class Snippet:
    """A passage around one peak of a latent."""

    tokens: tuple[Token, ...]
    value: Figure
    label: str
    place: str
    is_cut_before: bool
    is_cut_after: bool


@dataclass(frozen=True)
class LabelShare:
    """Share of a latent's summed activation that falls on one text."""

    label: str
    fraction: float
    figure: Figure


@dataclass(frozen=True)
class Card:
    """Numbers and passages of one latent."""

    latent: int
    verdict: str
    note: str
    """What a reader must know of the verdict on an exclusive latent; empty where there is nothing."""
    numbers: tuple[tuple[str, Figure], ...]
    shares: tuple[LabelShare, ...]
    top_tokens: tuple[str, ...]
    snippets: tuple[Snippet, ...]


@dataclass(frozen=True)
class CardGroup:
    """Cards under one heading, with the rule by which they were chosen."""

    heading: str
    rule: str
    hue: str
    """Which colour of the page marks activations: `chat`, `base` or `difference`."""
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class CardLimits:
    """How many cards, snippets and tokens are shown."""

    num_cards: int
    tokens_before: int
    tokens_after: int


def card_groups(method: Method, limits: CardLimits) -> tuple[CardGroup, ...]:
    """Choose the latents of a method that a reader should see and build their cards."""
    if not method.has_classes:
        return _unclassed_groups(method, limits)
    groups = [_direction_group(method, name, limits) for name in (CHAT_ONLY, BASE_ONLY)]
    designed = _design_group(method, limits)
    return (*groups, designed) if designed.cards else tuple(groups)


def build_card(method: Method, row: int, limits: CardLimits) -> Card:
    """Build the card of one row of the table."""
    latent = int(method.latents.columns["latent"][row])
    kept = (method.files.snippets or {}).get(latent, [])
    strongest = max((max(snippet["activations"]) for snippet in kept), default=0.0)
    snippets = tuple(build_snippet(snippet, strongest, limits) for snippet in kept)
    return Card(
        latent=latent,
        verdict=str(method.latents.words("verdict")[row]),
        note=verdict_note(method, row),
        numbers=_numbers(method, row),
        shares=_shares(method, row),
        top_tokens=top_tokens(kept),
        snippets=snippets,
    )


def build_snippet(content: Mapping[str, Any], strongest: float, limits: CardLimits) -> Snippet:
    """Cut a snippet around its peak and scale its activations by the latent's strongest."""
    peak, size = content["peak"], len(content["tokens"])
    start, stop = max(0, peak - limits.tokens_before), min(size, peak + limits.tokens_after + 1)
    tokens = tuple(
        _token(str(content["tokens"][i]), content["activations"][i], strongest, is_peak=i == peak)
        for i in range(start, stop)
    )
    place = f"document {content.get('document', '?')}, position {content.get('position', '?')}"
    return Snippet(
        tokens=tokens,
        value=significant(content.get("value", content["activations"][peak])),
        label=visible(str(content.get("label", ""))),
        place=place,
        is_cut_before=start > 0,
        is_cut_after=stop < size,
    )


def top_tokens(snippets: Sequence[Mapping[str, Any]], number: int = 4) -> tuple[str, ...]:
    """Give the different tokens at which a latent peaks, strongest first."""
    peaks = [quoted(str(snippet["tokens"][snippet["peak"]])) for snippet in snippets]
    return tuple(dict.fromkeys(peaks))[:number]


def _token(text: str, activation: float, strongest: float, *, is_peak: bool) -> Token:
    shown = visible(text)
    blanks = len(shown) - len(shown.lstrip(" ")) if shown.strip(" ") else 0
    strength = 0.0 if strongest <= 0 else round(min(1.0, max(0.0, activation / strongest)), 3)
    return Token(shown[:blanks], shown[blanks:], strength, significant(activation), is_peak)


def _direction_group(method: Method, latent_class: str, limits: CardLimits) -> CardGroup:
    hue = latent_class.removesuffix("-only")
    rows = choose_exclusive(method, latent_class, limits.num_cards)
    claimed = method.claimed(latent_class)
    heading = f"{method.name}: {latent_class} latents"
    rule = f"{len(rows):,} of the {claimed:,} that decoder norms claim: confirmed ones first, then by energy."
    if not claimed:
        rows = choose_leaning(method, latent_class, min(4, limits.num_cards))
        heading = f"{method.name}: the most {hue}-leaning latents"
        rule = (
            f"Decoder norms claim no latent as {latent_class}. These lean that way most; that is no evidence."
        )
        if not len(rows):
            rule = f"Decoder norms claim no latent as {latent_class}, and none leans that way beyond shared."
    return CardGroup(heading, rule, hue, tuple(build_card(method, row, limits) for row in rows.tolist()))


def _design_group(method: Method, limits: CardLimits) -> CardGroup:
    rows = choose_designed(method, limits.num_cards)
    number = method.all_designed().claimed
    return CardGroup(
        f"{method.name}: latents that are exclusive by design",
        f"{len(rows):,} of {number:,}: groups of the recipe let them write to one model only, so that alone "
        "is no finding. Confirmed ones first, then by energy.",
        "difference",
        tuple(build_card(method, row, limits) for row in rows.tolist()),
    )


def _unclassed_groups(method: Method, limits: CardLimits) -> tuple[CardGroup, ...]:
    chosen = {
        "latents most concentrated on one text": (
            choose_concentrated(method, limits.num_cards),
            "By the share of summed activation on one text, beyond what is usual for that text.",
        ),
        "strongest latents": (
            choose_strongest(method, limits.num_cards),
            "By energy: the mean over tokens of the squared length that a latent adds to "
            f"{what_is_read(method)}.",
        ),
    }
    seen: set[int] = set()
    groups = []
    for heading, (rows, rule) in chosen.items():
        fresh = [row for row in rows.tolist() if row not in seen]
        seen.update(fresh)
        note = "" if len(fresh) == len(rows) else " Those shown above are not repeated."
        cards = tuple(build_card(method, row, limits) for row in fresh)
        groups.append(CardGroup(f"{method.name}: {heading}", rule + note, "difference", cards))
    return tuple(group for group in groups if group.cards)


def verdict_note(method: Method, row: int) -> str:
    """Say what a verdict rests on, and whether it holds throughout the intervals of the ratios."""
    if method.latents.words("latent_class")[row] not in EXCLUSIVE_CLASSES:
        return ""
    verdict, why = verdict_words(method.latents)[row], str(method.latents.words("why_not")[row])
    is_crossed = method.latents.has("is_beyond_interval") and not is_beyond(method.latents)[row]
    if verdict == NOT_TESTED:
        return str(method.files.summary.get("latent_scaling", {}).get("why_not", ""))
    if verdict == UNDETERMINED:
        return f"neither confirmed nor refuted: {why}" if why else "neither confirmed nor refuted"
    if verdict == CONFIRMED:
        return "by its estimate; its 95 % interval crosses a cut-off" if is_crossed else ""
    return f"refuted: {why}" + ("; its 95 % interval crosses the cut-off" if is_crossed else "")


def _numbers(method: Method, row: int) -> tuple[tuple[str, Figure], ...]:
    def value(name: str) -> float:
        return float(method.latents.numbers(name)[row])

    never = "the latent fires on no held-out token"
    return (
        *_compared(method, row, "too little evidence" if value("active_tokens") > 0 else never),
        ("fires on", share(value("frequency"), never)),
        ("in documents", documents(method, row)),
        ("max activation", significant(value("max_activation"), reason=never)),
        ("energy", significant(value("energy"), reason=never)),
    )


def _compared(method: Method, row: int, why_no_ratio: str) -> tuple[tuple[str, Figure], ...]:
    """Give the numbers that compare sources."""

    def value(name: str) -> float:
        return float(method.latents.numbers(name)[row])

    if method.kind is Kind.MANY:
        names = method.latents.suffixes("norm_")
        return tuple((f"norm, {name}", significant(value(f"norm_{name}"))) for name in names)
    if not method.has_classes:
        return ()
    ratios = (
        (name, interval(value(name), method.half_interval(name)[row], reason=why_no_ratio))
        for name in ("nu_error", "nu_recon")
    )
    return (
        ("delta_norm", decimal(value("delta_norm"), reason="both decoders are zero")),
        *ratios,
        ("cosine", decimal(value("cosine"), reason="one decoder is zero")),
    )


def documents(method: Method, row: int) -> Figure:
    """Write on how many of the held-out documents a latent fires."""
    number, total = method.latents.numbers("active_documents")[row], method.num_documents()
    shown = count(number, "not counted")
    return Figure(f"{shown.text} of {total:,}") if total and not shown.reason else shown


def _shares(method: Method, row: int) -> tuple[LabelShare, ...]:
    values = [
        (label, float(method.latents.numbers(f"share_{label}")[row]))
        for label in method.latents.suffixes("share_")
    ]
    return tuple(LabelShare(label, value, share(value)) for label, value in values if np.isfinite(value))
