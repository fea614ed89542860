"""What the gradients of a step have in common, however they are found."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from crosscoder_jax.crosscoder import Crosscoder
from crosscoder_jax.metrics import ReconstructionSums
from crosscoder_jax.training.config import TOKENS_CAP, TrainConfig
from crosscoder_jax.typing import Acts, Latents, Scalar, Threshold


class Forward(NamedTuple):
    """What the forward pass leaves for the statistics and the metrics."""

    sums: ReconstructionSums
    l0: Scalar
    smallest_score: Threshold
    tokens_since_fired: Int[Array, "latent"]
    parts: dict[str, Scalar]


def encode(crosscoder: Crosscoder, normalized: Acts, config: TrainConfig) -> Latents:
    """Return the encoder's output in what it is kept in."""
    pre_acts = crosscoder.pre_acts(normalized)
    return pre_acts if config.pre_acts == "full" else pre_acts.astype(config.pre_acts)


def dead_latents(since_fired: Int[Array, "latent"], config: TrainConfig) -> Bool[Array, "latent"] | None:
    """Return which latents AuxK takes for dead; ``None`` without it."""
    return None if config.aux_k is None else since_fired >= config.aux_k.dead_after_tokens


def count_silence(
    since_fired: Int[Array, "latent"], fired: Int[Array, "latent"], num_tokens: int
) -> Int[Array, "latent"]:
    """Return for how many tokens each latent has not fired, after a batch.

    Args:
        since_fired: the same before it.
        fired: on how many of its tokens each fires.
        num_tokens: of the batch.
    """
    silent = jnp.minimum(since_fired + num_tokens, TOKENS_CAP)
    return jnp.where(fired > 0, 0, silent)
