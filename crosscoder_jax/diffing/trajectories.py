"""Latents over several sources in order, such as checkpoints of a training: when each appears, how it turns.

References:
    arXiv 2509.17196: the decoder norm in each snapshot is the strength of a feature over training.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from crosscoder_jax.activations.manifest import StoredSource
from crosscoder_jax.sources import Sources
from crosscoder_jax.typing import DecoderWeights

APPEARED_SHARE = 0.5
"""A latent is there when its decoder has this share of its largest norm."""


def are_snapshots(sources: Sources, stored: Sequence[StoredSource]) -> bool:
    """Tell whether sources are one layer of as many models, so that their order can be one of time.

    Models are told apart by their name or their revision. Layers of one model, and combinations of stored
    sources, are no snapshots: of two models at two layers no latent appears anywhere first.

    Args:
        sources: in which decoders are compared.
        stored: what the store says of each of its sources.
    """
    known = {one.name: one for one in stored}
    found = [known[entry.name] for entry in sources if entry.combination is None and entry.name in known]
    models = {(one.model, one.revision) for one in found}
    return len(sources) == len(found) == len(models) and len({one.hook_point for one in found}) == 1


def appearance(
    norms: Float[Array, "source latent"], *, share: float = APPEARED_SHARE
) -> Int[Array, "latent"]:
    """Return the first source in which each latent's decoder has a share of its largest norm.

    A latent without any decoder gets 0.

    Args:
        norms: decoder norms in raw activation units, sources in order.
        share: of the largest norm over all sources.

    Raises:
        ValueError: if the share is not above 0 and at most 1.

    Examples:
        >>> appearance(jnp.array([[1.0, 0.1], [1.0, 0.4], [0.5, 1.0]])).tolist()
        [0, 2]
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must lie above 0 and at most at 1")
    return jnp.argmax(norms >= share * jnp.max(norms, axis=0), axis=0)


def turning(w_dec: DecoderWeights, sources: Sources) -> Float[Array, "source latent"]:
    """Return the cosine of each latent's decoder in each source with its decoder in the last one.

    NaN where either is zero. 1 throughout is a latent that never turned; one that appears late has cosines
    near those of chance before.

    Args:
        w_dec: decoders in any units that scale a source as a whole.
        sources: in order, of one width.

    Raises:
        ValueError: if their widths differ.

    Examples:
        >>> from crosscoder_jax.sources import Source
        >>> sources = Sources((Source("step 1", 2), Source("step 2", 2)))
        >>> turning(jnp.array([[3.0, 0.0, 0.0, 2.0], [0.0, 1.0, 0.0, 4.0]]), sources).tolist()
        [[0.0, 1.0], [1.0, 1.0]]
    """
    widths = dict(zip(sources.names, sources.widths, strict=True))
    if len(set(sources.widths)) > 1:
        raise ValueError(f"turning needs sources of one width, and they have {widths}: compare norms instead")
    parts, norms = jnp.stack(sources.split(w_dec)), sources.norms(w_dec)
    products = norms * norms[-1]
    return jnp.sum(parts * parts[-1], axis=-1) / jnp.where(products > 0, products, jnp.nan)
