"""How well a crosscoder tells what was planted: recovery, and precision and recall of "chat-only"."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment

from crosscoder_jax.diffing import decoder_norms, delta_norm
from crosscoder_jax.diffing.verdicts import MAX_NU_ERROR, MAX_NU_RECON
from experiments.planted.trial import Measured
from experiments.planted.world import CHAT_ONLY, Truth, World

MIN_COSINE = 0.7
"""A latent stands for a feature whose direction in chat its own has at least this cosine with."""
MIN_DELTA_NORM = 0.9


class Claims(NamedTuple):
    """A set of latents called chat-only, against the truth."""

    num_claimed: int
    precision: float
    """Share of the claimed latents that stand for a chat-only feature; NaN if nothing is claimed."""
    recall: float
    """Share of the chat-only features that a claimed latent stands for."""
    f1: float


def claims(measured: Measured, truth: Truth, world: World) -> dict[str, Claims]:
    """Judge the chat-only latents by decoder norms, by Latent Scaling, and by both.

    By Latent Scaling alone every live latent that is stronger in chat is a candidate.
    """
    norms = decoder_norms(jnp.asarray(measured.w_dec), world.sources)
    is_live = measured.fired > 0
    by_norms = is_live & (np.asarray(delta_norm(norms) > MIN_DELTA_NORM))
    passes = (measured.nu_error < MAX_NU_ERROR) & (measured.nu_recon < MAX_NU_RECON) & measured.has_evidence
    by_scaling = is_live & passes & np.asarray(norms[1] > norms[0])
    sets = {"delta_norm": by_norms, "Latent Scaling": by_scaling, "both": by_norms & passes}
    return {name: _judge(claimed, measured, truth, world) for name, claimed in sets.items()}


def recovery(measured: Measured, truth: Truth, world: World) -> dict[str, float]:
    """Return how well the planted directions are found by live latents, over both models.

    ``mean max cosine`` takes each feature's best latent; ``matched`` is the share of features with a
    cosine above 0.9 when every latent may serve one feature only.
    """
    latents = _unit(measured.w_dec[measured.fired > 0])
    chat = np.asarray(truth.chat)
    variants = [_unit(np.concatenate([np.asarray(base), chat], axis=1)) for base in truth.base]
    cosines = np.maximum(*(variant @ latents.T for variant in variants))
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    matched = cosines[rows, columns]
    return {
        "mean max cosine": float(cosines.max(axis=1).mean()),
        "matched": float((matched > 0.9).sum() / len(chat)),
    }


def cosines_in_chat(measured: Measured, truth: Truth, world: World) -> Float[np.ndarray, "latent feature"]:
    """Return the cosine of each latent's direction in chat with that of each feature."""
    in_chat = world.sources.slices()[1]
    return _unit(measured.w_dec[:, in_chat]) @ _unit(np.asarray(truth.chat)).T


def _judge(claimed: Bool[np.ndarray, "latent"], measured: Measured, truth: Truth, world: World) -> Claims:
    cosines = cosines_in_chat(measured, truth, world)
    feature = cosines.argmax(axis=1)
    is_right = claimed & (cosines.max(axis=1) > MIN_COSINE)
    is_right &= np.asarray(truth.kind)[feature] == CHAT_ONLY
    num_claimed, num_right = int(claimed.sum()), int(is_right.sum())
    precision = num_right / num_claimed if num_claimed else float("nan")
    recall = len(set(feature[is_right].tolist())) / world.num_exclusive
    f1 = 2 * precision * recall / (precision + recall) if num_right else 0.0
    return Claims(num_claimed, precision, recall, f1)


def _unit(rows: Float[np.ndarray, "n width"]) -> Float[np.ndarray, "n width"]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)
