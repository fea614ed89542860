"""Which latents are worth a card, and what stands on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosscoder_jax.report.content import Kind, Method
from crosscoder_jax.report.names import BASE_ONLY, CHAT_ONLY, CONFIRMED, EXCLUSIVE_CLASSES, OTHER
from crosscoder_jax.report.numbers import Figure, decimal, interval, share, significant
from crosscoder_jax.report.text import quoted, visible
from crosscoder_jax.report.wording import what_is_read

NO_SNIPPETS = "No snippets were kept for this latent: they are stored for the strongest latents only."


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
    why_not: str
    """Why a latent that decoder norms claim is not confirmed; empty for all others."""
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
    return tuple(_direction_group(method, name, limits) for name in (CHAT_ONLY, BASE_ONLY))


def choose_exclusive(method: Method, latent_class: str, number: int) -> np.ndarray:
    """Choose rows of claimed latents: confirmed ones first, those with snippets before others, by energy."""
    rows = np.flatnonzero(method.latents.words("latent_class") == latent_class)
    is_confirmed = method.latents.words("verdict")[rows] == CONFIRMED
    order = np.lexsort((-_energy(method)[rows], ~_has_snippets(method)[rows], ~is_confirmed))
    return rows[order][:number]


def choose_leaning(method: Method, latent_class: str, number: int) -> np.ndarray:
    """Choose live rows nearest to a class that nothing reached, those with snippets before others."""
    delta = method.latents.numbers("delta_norm")
    is_live = method.latents.words("latent_class") == OTHER
    is_chat = latent_class == CHAT_ONLY
    is_side = delta > method.cutoffs.shared_max if is_chat else delta < method.cutoffs.shared_min
    rows = np.flatnonzero(is_live & is_side)
    extremity = -delta[rows] if is_chat else delta[rows]
    return rows[np.lexsort((extremity, ~_has_snippets(method)[rows]))][:number]


def choose_strongest(method: Method, number: int) -> np.ndarray:
    """Choose rows by energy among those with snippets; by energy alone where no snippets were kept."""
    order = np.argsort(-_energy(method), kind="stable")
    has_snippets = _has_snippets(method)[order]
    return order[has_snippets][:number] if has_snippets.any() else order[:number]


def choose_concentrated(method: Method, number: int) -> np.ndarray:
    """Choose rows with the greatest share of their activation on one text, beyond that text's usual share.

    The usual share is the median over latents, so a text that makes up most of the corpus earns nothing.
    """
    labels = method.latents.suffixes("share_")
    rows = choose_strongest(method, len(method.latents))
    if len(labels) < 2 or not len(rows):
        return rows[:0]
    shares = np.stack([method.latents.numbers(f"share_{label}") for label in labels])
    excess = np.max(np.nan_to_num(shares - np.nanmedian(shares, axis=1, keepdims=True)), axis=0)[rows]
    return rows[np.argsort(-excess, kind="stable")][:number]


def build_card(method: Method, row: int, limits: CardLimits) -> Card:
    """Build the card of one row of the table."""
    latent = int(method.latents.columns["latent"][row])
    kept = (method.files.snippets or {}).get(latent, [])
    strongest = max((max(snippet["activations"]) for snippet in kept), default=0.0)
    snippets = tuple(build_snippet(snippet, strongest, limits) for snippet in kept)
    return Card(
        latent=latent,
        verdict=str(method.latents.words("verdict")[row]),
        why_not=_why_not(method, row),
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


def _why_not(method: Method, row: int) -> str:
    if method.latents.words("latent_class")[row] not in EXCLUSIVE_CLASSES:
        return ""
    scaling = method.files.summary.get("latent_scaling", {})
    untested = scaling.get("why_not", "") if not method.latents.words("verdict")[row] else ""
    return str(method.latents.words("why_not")[row]) or str(untested)


def _numbers(method: Method, row: int) -> tuple[tuple[str, Figure], ...]:
    def value(name: str) -> float:
        return float(method.latents.numbers(name)[row])

    never = "the latent fires on no held-out token"
    reason = "too little evidence" if value("active_tokens") > 0 else never
    compared: tuple[tuple[str, Figure], ...] = ()
    if method.has_classes:
        compared = (
            ("delta_norm", decimal(value("delta_norm"), reason="both decoders are zero")),
            *(
                (name, interval(value(name), method.half_interval(name)[row], reason=reason))
                for name in ("nu_error", "nu_recon")
            ),
            ("cosine", decimal(value("cosine"), reason="one decoder is zero")),
        )
    elif method.kind is Kind.MANY:
        names = method.latents.suffixes("norm_")
        compared = tuple((f"norm, {name}", significant(value(f"norm_{name}"))) for name in names)
    return (
        *compared,
        ("fires on", share(value("frequency"), never)),
        ("max activation", significant(value("max_activation"), reason=never)),
        ("energy", significant(value("energy"), reason=never)),
    )


def _shares(method: Method, row: int) -> tuple[LabelShare, ...]:
    values = [
        (label, float(method.latents.numbers(f"share_{label}")[row]))
        for label in method.latents.suffixes("share_")
    ]
    return tuple(LabelShare(label, value, share(value)) for label, value in values if np.isfinite(value))


def _energy(method: Method) -> np.ndarray:
    return np.nan_to_num(method.latents.numbers("energy"), nan=-1.0)


def _has_snippets(method: Method) -> np.ndarray:
    kept = [latent for latent, snippets in (method.files.snippets or {}).items() if snippets]
    return np.isin(method.latents.numbers("latent"), kept)
