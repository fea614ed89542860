"""Whose latent is it: decoder norms of each source, their difference, and classes by it."""

import dataclasses
import enum
import itertools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from crosscoder_jax.sources import Sources, safe_norm
from crosscoder_jax.typing import DecoderWeights, PerLatent


class LatentClass(enum.IntEnum):
    """What the decoder norms claim about a latent; source 0 is the base, source 1 the chat model."""

    BASE_ONLY = 0
    SHARED = 1
    CHAT_ONLY = 2
    OTHER = 3
    """Alive, but between the classes."""
    DEAD = 4

    @property
    def label(self) -> str:
        """The name in tables: ``base-only``, ``shared``, ``chat-only``, ``other`` or ``dead``."""
        return self.name.lower().replace("_", "-")

    @property
    def is_exclusive(self) -> bool:
        """Whether the class claims the latent for one model only."""
        return self in (LatentClass.BASE_ONLY, LatentClass.CHAT_ONLY)


@dataclasses.dataclass(frozen=True)
class Cutoffs:
    """Where the classes end on the axis of ``delta_norm``; all bounds belong to their class.

    The defaults are the published ones: 0.9 means that the base decoder has at most a fifth of the
    chat decoder's norm.

    Raises:
        ValueError: if the four numbers do not ascend within 0 to 1.

    References:
        Minder et al. 2025, arXiv 2504.02922, section 2.
    """

    base_only_max: float = 0.1
    """A latent is base-only up to here."""
    shared_min: float = 0.4
    """A latent is shared from here ..."""
    shared_max: float = 0.6
    """... up to here."""
    chat_only_min: float = 0.9
    """A latent is chat-only from here."""

    def __post_init__(self) -> None:
        bounds = (0.0, self.base_only_max, self.shared_min, self.shared_max, self.chat_only_min, 1.0)
        is_ascending = all(a <= b for a, b in itertools.pairwise(bounds))
        if not (
            is_ascending and self.base_only_max < self.shared_min and self.shared_max < self.chat_only_min
        ):
            raise ValueError(
                f"base_only_max={self.base_only_max}, shared_min={self.shared_min}, "
                f"shared_max={self.shared_max}, chat_only_min={self.chat_only_min} must ascend from 0 to 1 "
                "without overlap: the published values are 0.1, 0.4, 0.6, 0.9"
            )


def decoder_norms(w_dec: DecoderWeights, sources: Sources) -> Float[Array, "source latent"]:
    """Return the L2 norm of each latent's decoder in each source.

    Args:
        w_dec: decoders in **raw activation units**, from ``crosscoder.raw_decoder()[0]``. In
            normalised units the norms answer another question: a source that was scaled up by its
            normaliser would seem to own more of every latent.
        sources: how the width axis divides.

    Examples:
        >>> from crosscoder_jax.sources import Source
        >>> sources = Sources((Source("base", 1), Source("chat", 2)))
        >>> decoder_norms(jnp.array([[1.0, 3.0, 4.0]]), sources).tolist()
        [[1.0], [5.0]]
    """
    return sources.norms(w_dec)


def delta_norm(norms: Float[Array, "source latent"]) -> PerLatent:
    """Return the relative decoder norm difference, 0 for base-only, 0.5 for shared, 1 for chat-only.

    ``1/2 * (1 + (||d_chat|| - ||d_base||) / max(||d_chat||, ||d_base||))``, with the base as source 0
    and the chat model as source 1; NaN where both norms are zero. (Some published tables hold one
    minus this.)

    Raises:
        ValueError: if there are not two sources.

    References:
        Minder et al. 2025, arXiv 2504.02922, section 2.

    Examples:
        >>> delta_norm(jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 2.0]])).tolist()
        [0.5, 0.0, 1.0]
    """
    if norms.shape[0] != 2:
        raise ValueError(f"norms has {norms.shape[0]} sources: delta_norm compares exactly two models")
    base, chat = norms[0], norms[1]
    larger = jnp.maximum(base, chat)
    ratio = (chat - base) / jnp.where(larger > 0, larger, jnp.nan)
    return 0.5 * (1.0 + ratio)


def classify_latents(
    delta: PerLatent, cutoffs: Cutoffs = Cutoffs(), *, is_dead: Bool[Array, "latent"] | None = None
) -> Int[Array, "latent"]:
    """Return each latent's :class:`LatentClass` as an integer.

    Args:
        delta: :func:`delta_norm` of each latent.
        cutoffs: where the classes end.
        is_dead: latents that never fire; those with NaN in ``delta`` are dead in any case.

    Examples:
        >>> classes = classify_latents(jnp.array([0.05, 0.5, 0.95, 0.7]))
        >>> class_labels(classes)
        ['base-only', 'shared', 'chat-only', 'other']
    """
    nowhere = jnp.isnan(delta) if is_dead is None else jnp.isnan(delta) | is_dead
    conditions = [
        (nowhere, LatentClass.DEAD),
        (delta <= cutoffs.base_only_max, LatentClass.BASE_ONLY),
        (delta >= cutoffs.chat_only_min, LatentClass.CHAT_ONLY),
        ((delta >= cutoffs.shared_min) & (delta <= cutoffs.shared_max), LatentClass.SHARED),
    ]
    is_member = [condition for condition, _ in conditions]
    values = [jnp.int32(int(member)) for _, member in conditions]
    return jnp.select(is_member, values, jnp.int32(int(LatentClass.OTHER)))


def class_labels(classes: Int[Array, "latent"] | Int[np.ndarray, "latent"]) -> list[str]:
    """Return the name of each latent's class, as in tables."""
    return [LatentClass(int(value)).label for value in np.asarray(classes)]


def decoder_cosine(w_dec: DecoderWeights, sources: Sources) -> PerLatent:
    """Return the cosine between each latent's two decoders; NaN where either is zero.

    Args:
        w_dec: decoders in any units that scale a source as a whole.
        sources: two sources of one width.

    Raises:
        ValueError: if there are not two sources, or if their widths differ and they share no axes.
    """
    check_two_sources_of_one_width(sources, "decoder_cosine")
    base, chat = sources.split(w_dec)
    norms = safe_norm(base) * safe_norm(chat)
    return jnp.sum(base * chat, axis=-1) / jnp.where(norms > 0, norms, jnp.nan)


def check_two_sources_of_one_width(sources: Sources, what: str) -> None:
    """Refuse sources whose decoders cannot be projected on each other.

    Raises:
        ValueError: naming ``what`` asked and the sources' widths.
    """
    widths = dict(zip(sources.names, sources.widths, strict=True))
    if len(sources) != 2:
        raise ValueError(f"{what} compares exactly two sources, and there are {len(sources)}: {widths}")
    if sources.widths[0] != sources.widths[1]:
        raise ValueError(
            f"{what} needs two sources of one width, and they have {widths}: decoders of different "
            "architectures share no axes; compare their norms instead"
        )
