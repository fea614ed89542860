"""How much a latent's activation counts when latents are ranked against each other."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class SumOfNorms:
    """Weigh a latent by the sum of its decoder norms over the sources: the crosscoder's own score.

    References:
        Minder et al. 2025, arXiv 2504.02922, on BatchTopK for crosscoders.
    """

    def __call__(self, norms: Float[Array, "source latent"]) -> Float[Array, "latent"]:
        """Return the weight of each latent from its decoder norms in normalised units."""
        return jnp.sum(norms, axis=0)


@dataclasses.dataclass(frozen=True)
class Unweighted:
    """Rank activations as they are: for codes whose scale already carries the decoder norms."""

    def __call__(self, norms: Float[Array, "source latent"]) -> Float[Array, "latent"]:
        """Return one for every latent."""
        return jnp.ones_like(norms[0])


CodeNorm = SumOfNorms | Unweighted
"""Every code norm a crosscoder can rank its latents by."""
