"""Residual streams between two models: base's activations with what some latents add in chat.

Pure functions on arrays in raw activation units; :mod:`crosscoder_jax.language_models` runs the models on
what they return.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from crosscoder_jax.crosscoder import Crosscoder
from crosscoder_jax.diffing.comparison import comparison
from crosscoder_jax.sources import Source, Sources
from crosscoder_jax.typing import Acts, Latents


def before_and_after(crosscoder: Crosscoder, stored: Sources) -> tuple[Source, Source]:
    """Return the two stored sources whose change a crosscoder tells of, base and chat.

    Args:
        crosscoder: of both, in whatever basis of them, or of their difference.
        stored: of the store, which may hold more.

    Raises:
        ValueError: if it is made of other than two sources of one width, or the store lacks one of them.
    """
    made_of = crosscoder.config.sources.made_of(stored)
    if len(made_of) != 2 or len(set(made_of.widths)) != 1:
        raise ValueError(
            f"a crosscoder of the sources {dict(zip(made_of.names, made_of.widths, strict=True))} tells of "
            "no change: take one of two of one width, such as one layer of base and of chat"
        )
    before, after = made_of.entries
    return before, after


def decoder_change(
    crosscoder: Crosscoder, stored: Sources
) -> tuple[Float[Array, "latent one_width"], Float[Array, "one_width"]]:
    """Return what each latent, and the bias, add to chat beyond what they add to base.

    ``d_j^chat - d_j^base`` of a crosscoder that explains both models, in whatever basis of them it reads;
    of a difference SAE its decoder.

    Args:
        crosscoder: with its normaliser.
        stored: of the store, which may hold more than base and chat.

    Returns:
        Decoders per unit of activation, and the bias, both in raw activation units.

    Raises:
        ValueError: if the crosscoder is made of other than two stored sources of one width, or neither
            explains both nor reads their difference.
    """
    (base, chat), space = before_and_after(crosscoder, stored), comparison(crosscoder, stored)
    if space.is_pair:
        (base_dec, chat_dec), (base_bias, chat_bias) = map(space.sources.split, (space.w_dec, space.b_dec))
        return chat_dec - base_dec, chat_bias - base_bias
    (own,) = space.sources.entries if len(space.sources) == 1 else (None,)
    if own is None or dict(own.combination or ()) != {chat.name: 1.0, base.name: -1.0}:
        raise ValueError(
            f"a crosscoder of {space.sources.names} says nothing of {chat.name} - {base.name}: take one that "
            "reads both, or their difference"
        )
    return space.w_dec, space.b_dec


def patched_acts(
    crosscoder: Crosscoder,
    acts: Acts,
    sets: Mapping[str, Bool[Array, "latent"]],
    stored: Sources,
) -> dict[str, Float[Array, "batch one_width"]]:
    """Return ``h_base + sum_{j in S} f_j (d_j^chat - d_j^base)`` for every set S of latents.

    Args:
        crosscoder: with its inference threshold.
        acts: of all stored sources side by side, raw activation units.
        sets: which latents take part, by name.
        stored: what ``acts`` holds: base and chat, of one width, and perhaps others.

    Returns:
        By the name of each set, raw activation units; and besides them ``none``, which is ``h_base``;
        ``bias``, with the difference of the decoders' biases alone; and ``all``, with that and every latent:
        base's own error and chat's reconstruction.

    Raises:
        ValueError: if a set has one of these names, or as :func:`decoder_change`.

    References:
        Minder et al. 2025, arXiv 2504.02922.
    """
    if taken := sorted({"none", "bias", "all"} & set(sets)):
        raise ValueError(f"set {taken[0]!r} has the name of one that is always there: choose another")
    w_dec, bias = decoder_change(crosscoder, stored)
    code = crosscoder.encode(crosscoder.config.sources.derive(acts, stored))
    before, _ = before_and_after(crosscoder, stored)
    base = stored.split(acts)[stored.names.index(before.name)]

    def added(code: Latents) -> Float[Array, "batch one_width"]:
        return jnp.matmul(code, w_dec, precision=lax.Precision.HIGHEST)

    chosen = {name: base + added(jnp.where(which, code, 0)) for name, which in sets.items()}
    return {"none": base, "bias": base + bias, **chosen, "all": base + bias + added(code)}
