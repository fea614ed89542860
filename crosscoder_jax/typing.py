"""Array aliases and protocols shared by every room; no logic.

Axis words, in this order everywhere: ``batch``, ``source``, ``width``, ``latent``, ``token``, ``k``.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int, Key

Acts = Float[Array, "batch width"]
"""Activations of all sources of each token, concatenated in the order of the sources."""

Latents = Float[Array, "batch latent"]
"""One number per token and latent: pre-activations, scores or codes."""

Code = Float[Array, "batch *source latent"]
"""A sparse code: ``[batch, latent]`` for all sources, or ``[batch, source, latent]`` when each source
has its own, as the code norm ``Decoupled`` makes it."""

ScoreWeights = Float[Array, "*source latent"]
"""What activations are multiplied by for ranking: one per latent, or one per source and latent."""

Threshold = Float[Array, "*part"]
"""The inference cut on scores, float32: one, or one per source when each source has its own code, or one
per budget when groups of latents have a k of their own."""

Mask = Bool[Array, "batch latent"]
"""Which (token, latent) pairs are kept."""

PerLatent = Float[Array, "latent"]
PerWidth = Float[Array, "width"]
EncoderWeights = Float[Array, "width latent"]
DecoderWeights = Float[Array, "latent width"]
Scalar = Float[Array, ""]
Count = Int[Array, ""]
PRNGKey = Key[Array, ""]


@runtime_checkable
class Progress(Protocol):
    """Told how far a long-running function has come; shows it or not."""

    def __call__(self, done: int, total: int, unit: str) -> None:
        """Report ``done`` of ``total`` counted in ``unit``, such as ``"tokens"`` or ``"steps"``."""
        ...
