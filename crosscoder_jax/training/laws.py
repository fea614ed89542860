"""Parts of a recipe that come in more than one form: each a small frozen value."""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from crosscoder_jax.typing import Threshold


class RunningMean(NamedTuple):
    """A weighted sum of smallest kept scores and the sum of the weights, float32; both start at zero."""

    total: Threshold
    weight: Threshold

    @property
    def value(self) -> Threshold:
        """The mean; 0 while there is none."""
        return self.total / jnp.where(self.weight > 0, self.weight, 1.0)


@dataclasses.dataclass(frozen=True)
class CorrectedThreshold:
    """Average the smallest kept scores exponentially, corrected for the start at zero.

    Raises:
        ValueError: if the decay is not in [0, 1).
    """

    decay: float = 0.99
    """Per step. A memory of 100 steps follows the falling learning rate more closely than the published
    1,000 and suits short runs too."""

    def __post_init__(self) -> None:
        _check_decay(self.decay)

    def __call__(self, mean: RunningMean, smallest: Threshold, step: Int[Array, ""]) -> RunningMean:
        """Return the mean with a batch's smallest kept score added, whatever the step."""
        del step
        return RunningMean(
            self.decay * mean.total + (1 - self.decay) * smallest,
            self.decay * mean.weight + (1 - self.decay),
        )


@dataclasses.dataclass(frozen=True)
class DelayedThreshold:
    """Average the smallest kept scores exponentially from a late step on, beginning with the first one.

    What the published runs did. Until ``start_step`` every positive score passes; a run that ends soon
    after it keeps one batch's score. Unlike there, a batch that keeps nothing does not pull the
    threshold towards zero.

    Raises:
        ValueError: if the decay is not in [0, 1) or the step is negative.

    References:
        Minder et al. 2025, arXiv 2504.02922, and the code behind it.
    """

    decay: float = 0.999
    """Per step."""
    start_step: int = 1000
    """The first step, counted from 0, that is left out last."""

    def __post_init__(self) -> None:
        _check_decay(self.decay)
        if self.start_step < 0:
            raise ValueError(f"start_step={self.start_step} must not be negative")

    def __call__(self, mean: RunningMean, smallest: Threshold, step: Int[Array, ""]) -> RunningMean:
        """Return the mean with a batch's smallest kept score added, if the step is past the start."""
        later = self.decay * mean.total + (1 - self.decay) * smallest
        total = jnp.where(mean.weight > 0, later, smallest)
        has_begun = step > self.start_step
        return RunningMean(
            jnp.where(has_begun, total, mean.total),
            jnp.where(has_begun, jnp.ones_like(mean.weight), mean.weight),
        )


ThresholdLaw = CorrectedThreshold | DelayedThreshold
"""How the inference threshold follows from training batches."""


def _check_decay(decay: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay} must lie in [0, 1)")


@dataclasses.dataclass(frozen=True)
class MeanNorm:
    """Scale each source to ``E||x|| = sqrt(width)``, so that sources and layers weigh the same."""

    def __call__(self, norms: Float[np.ndarray, "token source"], widths: tuple[int, ...]) -> np.ndarray:
        """Return each source's factor from the norms of its centred activations."""
        return np.sqrt(np.array(widths)) / norms.mean(axis=0)


@dataclasses.dataclass(frozen=True)
class RootMeanSquareNorm:
    """Scale to a root mean squared norm: ``target / sqrt(sum_d std_d^2)`` for centred activations.

    The normalisers of the library behind arXiv 2504.02922: one factor per source in its newer fork, one
    factor for all sources in its older one, where a source of large activations weighs more.

    Raises:
        ValueError: if the target is not positive.
    """

    target: float = 1.0
    """Of each source, or of all sources together; a norm, not a value per coordinate."""
    is_joint: bool = False
    """Scale all sources by one factor."""

    def __post_init__(self) -> None:
        if not 0 < self.target < math.inf:
            raise ValueError(f"target={self.target} must be positive and finite")

    def __call__(self, norms: Float[np.ndarray, "token source"], widths: tuple[int, ...]) -> np.ndarray:
        """Return each source's factor from the norms of its centred activations."""
        del widths
        squared = np.square(norms).mean(axis=0)
        return self.target / np.sqrt(np.full_like(squared, squared.sum()) if self.is_joint else squared)


Scaling = MeanNorm | RootMeanSquareNorm
"""How sources are scaled before training."""


@dataclasses.dataclass(frozen=True)
class Resampling:
    """Give dead latents the directions of tokens that are reconstructed badly, for L1 crosscoders.

    Every ``every_steps`` steps, latents that were silent for more than half of that time begin again:
    each takes another token, drawn in proportion to the square of its error, as its decoder and, scaled
    down, as its encoder; its bias and Adam's moments become zero. The learning rate then warms up again.

    The encoder follows the paper; the code behind arXiv 2504.02922 multiplies the token itself, not its
    direction, by 0.05 times the mean norm, so that the outcome depends on the scale of activations.

    Raises:
        ValueError: if a number is not positive.

    References:
        Bricken et al. 2023, transformer-circuits.pub/2023/monosemantic-features, appendix on resampling.
    """

    every_steps: int
    """Steps from one resampling to the next; the paper's runs used 25,000."""
    encoder_share: float = 0.2
    """Norm of a new encoder in each source over the mean norm of the living ones."""
    decoder_norm: float = 1.0
    """Norm of a new decoder in each source, normalised units."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "encoder_share", "decoder_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite")

    def is_due(self, step: Int[Array, ""]) -> Array:
        """Return whether latents begin again after this step, counted from 0."""
        return (step > 0) & (step % self.every_steps == 0)


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """Begin with a saved crosscoder: with more latents, or more sources, or on other models or data.

    Stage-wise diffing trains one dictionary on a base model and lets it go on with the fine-tuned one, so
    that each latent can be followed from the one to the other.

    References:
        Bricken et al. 2024, transformer-circuits.pub/2024/model-diffing.
    """

    crosscoder: str
    """Folder of a crosscoder that this package saved."""
    sources: tuple[str, ...] | None = None
    """What its sources are in this run, in its order; ``None`` keeps their names."""
    is_frozen: bool = False
    """Hold its encoder, decoders and biases, so that only new latents, and what it has no weights for in new
    sources, are trained."""
