"""How well a method's latents find the tokens on which something is new."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

import crosscoder_jax as cc
from crosscoder_jax.activations import TokenView
from crosscoder_jax.crosscoder import Crosscoder
from crosscoder_jax.diffing import DiffConfig, Verdict, decoder_change, diff_run
from crosscoder_jax.diffing.comparison import comparison
from crosscoder_jax.metrics import explained_variance, reconstruction_sums
from crosscoder_jax.typing import Acts

TOP = 10


class Found(NamedTuple):
    """What one crosscoder found."""

    fve: float
    """Of both models, in raw space, on fresh tokens; NaN for a difference SAE, which explains neither."""
    dead: float
    best: float
    """Average precision of the latent that follows each new feature best, mean over the features."""
    top: float
    """Average precision, for all changed tokens, of the ten latents that change a token most: the largest
    of their changes. Nothing of the truth is used to choose them."""
    delta_norm: float
    """Of the best latents, in raw space; NaN for a difference SAE."""
    confirmed: float
    """Number of chat-only latents that the report counts as confirmed; NaN for a difference SAE."""
    designed: float
    """Number of confirmed latents that the report lists and does not count, as they may write to one model
    only; NaN for a difference SAE."""
    precision: float
    """Share of both with more than half of their activation on changed tokens; NaN if there are none."""


def measure(
    crosscoder: Crosscoder, view: TokenView, is_new: Bool[np.ndarray, "token feature"]
) -> tuple[Found, Int[np.ndarray, "top"]]:
    """Compare codes with what is known to be new.

    Args:
        crosscoder: with its inference threshold.
        view: of base and chat on tokens that it was not trained on.
        is_new: which new features each token has.

    Returns:
        What it found, and the ten latents that change a token most, the first most.
    """
    sources = view.store.sources
    stored = jnp.asarray(view.read_positions(np.arange(view.num_tokens)), jnp.float32)
    code = crosscoder.encode(crosscoder.config.sources.derive(stored, sources))
    host, is_changed = np.asarray(code), np.any(is_new, axis=1)
    features = is_new[:, np.any(is_new, axis=0)]
    precision = np.array([average_precisions(host, feature) for feature in features.T])
    changes = host * change_norms(crosscoder, sources)
    chosen = np.argsort(-changes.max(axis=0))[:TOP]
    union = changes[:, chosen].max(axis=1)
    confirmed = _confirmed(crosscoder, view)
    best = precision.argmax(axis=1) if features.size else np.zeros(0, np.int64)
    found = Found(
        fve=_fve_of_both(crosscoder, sources, stored, crosscoder.decode(code)),
        dead=float(np.mean(~host.any(axis=0))),
        best=_mean(precision.max(axis=1)) if features.size else np.nan,
        top=float(average_precisions(union[:, None], is_changed)[0]) if features.size else np.nan,
        delta_norm=_mean(_delta_norms(crosscoder, sources)[best]),
        confirmed=np.nan if confirmed is None else int(np.sum(~confirmed.is_designed)),
        designed=np.nan if confirmed is None else int(np.sum(confirmed.is_designed)),
        precision=np.nan
        if confirmed is None
        else _mean(_share_of(host[:, confirmed.latents], is_changed) > 0.5),
    )
    return found, chosen


class _Confirmed(NamedTuple):
    """The chat-only latents that the report would confirm."""

    latents: Int[np.ndarray, "confirmed"]
    is_designed: Bool[np.ndarray, "confirmed"]


def _confirmed(crosscoder: Crosscoder, view: TokenView) -> _Confirmed | None:
    """Return the latents that the report would confirm; ``None`` if it compares no models."""
    columns = diff_run(crosscoder, view, DiffConfig(num_snippet_latents=0)).columns
    if "verdict" not in columns:
        return None
    is_chat_only = columns["latent_class"].astype(str) == "chat-only"
    latents = np.flatnonzero(is_chat_only & (columns["verdict"].astype(str) == str(Verdict.CONFIRMED)))
    is_designed = columns.get("by_design", np.zeros(len(is_chat_only), bool))
    return _Confirmed(latents, np.asarray(is_designed, bool)[latents])


def _share_of(
    code: Float[np.ndarray, "token latent"], is_changed: Bool[np.ndarray, "token"]
) -> Float[np.ndarray, "latent"]:
    return code[is_changed].sum(axis=0) / code.sum(axis=0)


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else np.nan


def _fve_of_both(crosscoder: Crosscoder, sources: cc.Sources, stored: Acts, recon: Acts) -> float:
    space = comparison(crosscoder, sources)
    if not space.is_pair:
        return float("nan")
    both, parts = space.sources, crosscoder.config.sources.to_stored_acts(recon, stored, sources)
    carried = jnp.concatenate([parts[name] for name in both.names], axis=1)
    sums = reconstruction_sums(both.derive(stored, sources), carried, both)
    return float(explained_variance(sums, both)["fve"])


def change_norms(crosscoder: Crosscoder, sources: cc.Sources) -> Float[np.ndarray, "latent"]:
    """Return the norm of what each latent adds to chat beyond base, per unit of its activation, raw units."""
    return np.linalg.norm(np.asarray(decoder_change(crosscoder, sources)[0]), axis=1)


def _delta_norms(crosscoder: Crosscoder, sources: cc.Sources) -> Float[np.ndarray, "latent"]:
    space = comparison(crosscoder, sources)
    if not space.is_pair:
        return np.full(len(space.w_dec), np.nan)
    return np.asarray(cc.delta_norm(cc.decoder_norms(space.w_dec, space.sources)))


def average_precisions(
    scores: Float[np.ndarray, "token latent"], is_wanted: Bool[np.ndarray, "token"]
) -> Float[np.ndarray, "latent"]:
    """Return the average precision of each column of scores for the wanted tokens.

    Precision at every distinct score times the recall it adds; equal scores, such as the zeros of silent
    tokens, are taken together, so that their order cannot matter.
    """
    order = np.argsort(-scores, axis=0, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=0)
    hits = np.cumsum(is_wanted[order], axis=0)
    is_last = np.concatenate([ranked[1:] != ranked[:-1], np.ones((1, scores.shape[1]), bool)])
    counts = np.arange(1, len(scores) + 1)[:, None]
    found = []
    for column in range(scores.shape[1]):
        ends = is_last[:, column]
        at_end = hits[ends, column]
        gained = np.diff(at_end, prepend=0)
        found.append(np.sum(gained * at_end / counts[ends, 0]) / max(is_wanted.sum(), 1))
    return np.array(found)
