"""How well a method's latents find the tokens on which something is new."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

import crosscoder_jax as cc
from crosscoder_jax.crosscoder import Crosscoder
from crosscoder_jax.diffing.comparison import comparison
from crosscoder_jax.metrics import explained_variance, reconstruction_sums
from crosscoder_jax.typing import Acts
from experiments.planted.trial import Trained
from experiments.planted.world import CHAT_ONLY, World, sample_with_strengths

NUM_TOKENS = 65_536
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


def measure_change(trained: Trained, world: World) -> Found:
    """Compare codes on fresh tokens with the strengths of the new features there."""
    key = jax.random.fold_in(trained.key, 2)
    stored, strengths = sample_with_strengths(trained.truth, key, NUM_TOKENS, world)
    is_new = np.asarray(strengths)[:, np.asarray(trained.truth.kind) == CHAT_ONLY] > 0
    return measure(trained.crosscoder, stored, world.sources, is_new)


def measure(
    crosscoder: Crosscoder, stored: Acts, sources: cc.Sources, is_new: Bool[np.ndarray, "token feature"]
) -> Found:
    """Compare codes with what is known to be new.

    Args:
        crosscoder: with its inference threshold.
        stored: raw activations of tokens it was not trained on.
        sources: which they are, base and chat.
        is_new: which new features each token has.
    """
    code = crosscoder.encode(crosscoder.config.sources.derive(stored, sources))
    host = np.asarray(code)
    precision = np.array([average_precisions(host, is_new[:, i]) for i in range(is_new.shape[1])])
    changes = host * change_norms(crosscoder, sources)
    chosen = np.argsort(-changes.max(axis=0))[:TOP]
    union = changes[:, chosen].max(axis=1)
    return Found(
        fve=_fve_of_both(crosscoder, sources, stored, crosscoder.decode(code)),
        dead=float(np.mean(~host.any(axis=0))),
        best=float(precision.max(axis=1).mean()),
        top=float(average_precisions(union[:, None], np.any(is_new, axis=1))[0]),
        delta_norm=float(np.mean(_delta_norms(crosscoder, sources)[precision.argmax(axis=1)])),
    )


def _fve_of_both(crosscoder: Crosscoder, sources: cc.Sources, stored: Acts, recon: Acts) -> float:
    if not comparison(crosscoder, sources).is_pair:
        return float("nan")
    parts = crosscoder.config.sources.to_stored_acts(recon, stored, sources)
    carried = jnp.concatenate([parts[name] for name in sources.names], axis=1)
    return float(explained_variance(reconstruction_sums(stored, carried, sources), sources)["fve"])


def change_norms(crosscoder: Crosscoder, sources: cc.Sources) -> Float[np.ndarray, "latent"]:
    """Return the norm of what each latent adds to chat beyond base, per unit of its activation, raw units."""
    space = comparison(crosscoder, sources)
    parts = space.sources.split(np.asarray(space.w_dec))
    return np.linalg.norm(parts[1] - parts[0] if space.is_pair else parts[0], axis=1)


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
