"""What Latent Scaling says about the latents that the decoder norms claim for one model."""

import enum
import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Array, Int

from crosscoder_jax.diffing.decoder_norms import LatentClass
from crosscoder_jax.diffing.latent_scaling import (
    MIN_ACTIVE_GROUPS,
    MIN_ACTIVE_TOKENS,
    RATIO_TARGETS,
    LatentScaling,
    is_reference_clear,
)

MAX_NU_ERROR = 0.2
MAX_NU_RECON = 0.5
"""Published cut-offs of a genuinely exclusive latent (arXiv 2504.02922, section 3.2)."""


class Verdict(enum.StrEnum):
    """Whether an exclusive latent is genuine, or which artefact of the loss it is."""

    CONFIRMED = "confirmed"
    SHRINKAGE = "complete shrinkage"
    """The concept is in the other model's activations, but its decoder there was driven to zero."""
    DECOUPLING = "latent decoupling"
    """The other model's reconstruction has it too, through other latents."""
    BOTH = "shrinkage and decoupling"
    UNDETERMINED = "undetermined"
    """There is too little evidence, or no ratio."""
    NONE = ""
    """The latent was not claimed for one model."""

    @property
    def is_artefact(self) -> bool:
        """Whether the latent only looks exclusive, because of the loss."""
        return self in (Verdict.SHRINKAGE, Verdict.DECOUPLING, Verdict.BOTH)


def verdicts(
    classes: Int[Array, "latent"] | Int[np.ndarray, "latent"],
    scaling: LatentScaling,
    *,
    max_nu_error: float = MAX_NU_ERROR,
    max_nu_recon: float = MAX_NU_RECON,
) -> list[Verdict]:
    """Return the verdict on each latent.

    An exclusive latent is confirmed iff there is evidence, both ratios are finite,
    ``nu_error < max_nu_error`` and ``nu_recon < max_nu_recon``.

    Args:
        classes: from :func:`~crosscoder_jax.diffing.decoder_norms.classify_latents`.
        scaling: with the reference on the side of each exclusive latent's own model.
        max_nu_error: from here on it is Complete Shrinkage.
        max_nu_recon: from here on it is Latent Decoupling.

    Raises:
        ValueError: if an exclusive latent was tested with the other model's decoder as reference.
    """
    classes = np.asarray(classes)
    own_source = {int(LatentClass.BASE_ONLY): 0, int(LatentClass.CHAT_ONLY): 1}
    for value, source in own_source.items():
        wrong = np.flatnonzero((classes == value) & (scaling.reference != source))
        if wrong.size:
            raise ValueError(
                f"{LatentClass(value).label} latents {wrong[:5].tolist()} were tested with the other model's "
                f"decoder: run latent_scaling with reference={source} for them"
            )
    is_shrunk = scaling.nu_error >= max_nu_error
    is_decoupled = scaling.nu_recon >= max_nu_recon
    # A NaN is below no cut-off and above none: without this it would be confirmed.
    is_known = scaling.has_evidence & np.isfinite(scaling.nu_error) & np.isfinite(scaling.nu_recon)
    names = np.select(
        [
            ~np.isin(classes, list(own_source)),
            ~is_known,
            is_shrunk & is_decoupled,
            is_shrunk,
            is_decoupled,
        ],
        [Verdict.NONE, Verdict.UNDETERMINED, Verdict.BOTH, Verdict.SHRINKAGE, Verdict.DECOUPLING],
        Verdict.CONFIRMED,
    )
    return [Verdict(str(name)) for name in names]


def why_not_confirmed(
    found: Sequence[Verdict],
    scaling: LatentScaling,
    *,
    max_nu_error: float = MAX_NU_ERROR,
    max_nu_recon: float = MAX_NU_RECON,
    min_active_tokens: int = MIN_ACTIVE_TOKENS,
) -> list[str]:
    """Return what keeps each exclusive latent from being confirmed; empty for the confirmed and the others.

    Args:
        found: from :func:`verdicts`.
        scaling: what they were found in.
        max_nu_error: as there.
        max_nu_recon: as there.
        min_active_tokens: what the evidence was judged by.

    Examples:
        ``"nu_error 0.41 is not below 0.2"``, ``"fires on 12 tokens, fewer than 50"``.
    """
    clear = is_reference_clear(scaling.beta, scaling.se_beta, scaling.reference)
    limits = {"nu_error": max_nu_error, "nu_recon": max_nu_recon}

    def reasons(latent: int) -> Iterator[str]:
        tokens, groups = int(scaling.active_tokens[latent]), int(scaling.active_groups[latent])
        if tokens < min_active_tokens:
            yield f"fires on {tokens} tokens, fewer than {min_active_tokens}"
        if groups < MIN_ACTIVE_GROUPS:
            yield f"fires in {groups} of the groups of documents, fewer than {MIN_ACTIVE_GROUPS}"
        for target, is_clear in zip(RATIO_TARGETS, clear[:, latent], strict=True):
            if not is_clear:
                yield f"its own model's {target} does not clearly hold it"
        for name, limit in limits.items():
            ratio = float(getattr(scaling, name)[latent])
            if scaling.has_evidence[latent] and not ratio < limit:
                yield (
                    f"{name} {ratio:.2f} is not below {limit:g}"
                    if math.isfinite(ratio)
                    else f"{name} is {ratio}"
                )

    open_verdicts = set(Verdict) - {Verdict.CONFIRMED, Verdict.NONE}
    return ["; ".join(reasons(i)) if verdict in open_verdicts else "" for i, verdict in enumerate(found)]
