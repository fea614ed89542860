"""Which latents are worth a card."""

import numpy as np

from crosscoder_jax.report.content import Method
from crosscoder_jax.report.names import CHAT_ONLY, CONFIRMED, EXCLUSIVE_CLASSES, OTHER
from crosscoder_jax.report.outcomes import is_by_design


def choose_exclusive(method: Method, latent_class: str, number: int) -> np.ndarray:
    """Choose rows of claimed latents: confirmed ones first, those with snippets before others, by energy."""
    return _confirmed_first(method, np.flatnonzero(method.is_claimed(latent_class)))[:number]


def choose_designed(method: Method, number: int) -> np.ndarray:
    """Choose rows of latents that are exclusive by design, in the same order."""
    is_exclusive = np.isin(method.latents.words("latent_class").astype(str), EXCLUSIVE_CLASSES)
    return _confirmed_first(method, np.flatnonzero(is_by_design(method.latents) & is_exclusive))[:number]


def _confirmed_first(method: Method, rows: np.ndarray) -> np.ndarray:
    is_confirmed = method.latents.words("verdict")[rows] == CONFIRMED
    return rows[np.lexsort((-_energy(method)[rows], ~_has_snippets(method)[rows], ~is_confirmed))]


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


def _energy(method: Method) -> np.ndarray:
    return np.nan_to_num(method.latents.numbers("energy"), nan=-1.0)


def _has_snippets(method: Method) -> np.ndarray:
    kept = [latent for latent, snippets in (method.files.snippets or {}).items() if snippets]
    return np.isin(method.latents.numbers("latent"), kept)
