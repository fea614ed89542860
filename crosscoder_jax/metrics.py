"""Reconstruction and sparsity metrics as ratios of sums: one implementation for training and evaluation.

All sums are over tokens, so they add up over batches, devices and hosts, and no metric depends on
the batch size. Energies are in normalised units; per-source fractions do not depend on the units.
The README's section "Metrics" has the formula of every metric that a file of a run holds.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from crosscoder_jax.sources import Sources
from crosscoder_jax.typing import Acts, Code, Threshold

DENSE_FREQUENCY = 0.1
"""A latent that fires on more than this share of tokens is ultra-dense."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReconstructionSums:
    """Sums over tokens from which the fraction of variance explained follows."""

    tokens: Float[Array | np.ndarray, ""] | np.floating
    """Number of tokens; adding up arrays without axes gives NumPy scalars."""
    total: Float[Array | np.ndarray, "width"]
    """Sum of activations."""
    energy: Float[Array | np.ndarray, "source"]
    """Sum of squared norms of the activations."""
    error: Float[Array | np.ndarray, "source"]
    """Sum of squared norms of the residuals."""


def reconstruction_sums(
    acts: Acts, recon: Acts, sources: Sources, is_valid: Bool[Array, "batch"] | None = None
) -> ReconstructionSums:
    """Sum up one batch.

    Args:
        acts: what was to be reconstructed, normalised units.
        recon: the reconstruction, same units.
        sources: how the width axis is divided.
        is_valid: rows that count; padding rows do not. All by default.
    """
    weight = jnp.ones((acts.shape[0],), jnp.float32) if is_valid is None else is_valid.astype(jnp.float32)
    rows = weight[:, None]

    def energies(values: Array) -> Array:
        return jnp.stack(
            [jnp.sum(jnp.square(part)) for part in sources.split(jnp.where(rows > 0, values, 0.0))]
        )

    return ReconstructionSums(
        tokens=jnp.sum(weight),
        total=jnp.sum(jnp.where(rows > 0, acts, 0.0), axis=0),
        energy=energies(acts),
        error=energies(acts - recon),
    )


def explained_variance(sums: ReconstructionSums, sources: Sources) -> dict[str, Array | np.ndarray]:
    """Return the fraction of variance explained, pooled (``"fve"``) and per source (``"fve/<name>"``).

    ``1 - sum ||a - ahat||^2 / sum ||a - mean(a)||^2``: about the mean, so that predicting the mean
    scores exactly 0, and a ratio of sums over all tokens, not a mean over batches of ratios. The pooled
    value weighs sources by their variance in normalised units.

    Args:
        sums: of one batch on the device, or of a corpus in float64 on the host; computed in kind.
        sources: how the width axis is divided.
    """
    xp = sums.energy.__array_namespace__()
    means = [sums.total[..., part] for part in sources.slices()]
    of_mean = xp.stack([xp.sum(xp.square(part)) for part in means]) / sums.tokens
    variance = sums.energy - of_mean
    fractions = {"fve": 1 - xp.sum(sums.error) / xp.sum(variance)}
    per_source = 1 - sums.error / variance
    fractions |= {f"fve/{name}": per_source[i] for i, name in enumerate(sources.names)}
    return {name: xp.asarray(value) for name, value in fractions.items()}


def active_latents(code: Code, is_valid: Bool[Array, "batch"] | None = None) -> Float[Array, ""]:
    """Return the number of active latents, summed over tokens, float32.

    Of sources that have their own codes the mean is taken, so that k means the same for all codes.
    """
    counts = jnp.sum(code > 0, axis=-1, dtype=jnp.int32).astype(jnp.float32)
    per_token = counts if counts.ndim == 1 else jnp.mean(counts, axis=1)
    return jnp.sum(per_token if is_valid is None else jnp.where(is_valid, per_token, 0.0))


def l0(code: Code, is_valid: Bool[Array, "batch"] | None = None) -> Float[Array, ""]:
    """Return the mean number of active latents per token."""
    return active_latents(code, is_valid) / (code.shape[0] if is_valid is None else jnp.sum(is_valid))


def fired_counts(code: Code, is_valid: Bool[Array, "batch"] | None = None) -> Array:
    """Return on how many tokens each latent is active, in any source's code, int32."""
    active = code > 0 if code.ndim == 2 else jnp.any(code > 0, axis=1)
    active = active if is_valid is None else active & is_valid[:, None]
    return jnp.sum(active, axis=0, dtype=jnp.int32)


def named_thresholds(threshold: Threshold, names: Sequence[str]) -> dict[str, Array]:
    """Return ``"threshold"``, or ``"threshold/<name>"`` of each source or budget of latents.

    Args:
        threshold: of a crosscoder.
        names: ``threshold_names`` of its config.
    """
    if threshold.ndim == 0:
        return {"threshold": threshold}
    return {f"threshold/{name}": threshold[i] for i, name in enumerate(names)}


def frequency_metrics(fired: np.ndarray, num_tokens: int) -> dict[str, float]:
    """Return the shares of latents that never fire (``"dead"``) and that nearly always do (``"dense"``).

    Dead on the tokens that were measured, so the more of them the fewer. The ``"dead"`` that training logs
    is another number: there a latent is dead that has not fired for ``AuxK.dead_after_tokens`` tokens.

    Args:
        fired: ``[latent]``, on how many tokens each latent fired.
        num_tokens: how many there were.
    """
    frequency = np.asarray(fired, np.float64) / max(num_tokens, 1)
    return {
        "dead": float(np.mean(frequency == 0)),
        "dense": float(np.mean(frequency > DENSE_FREQUENCY)),
    }


def recovered_fraction(
    ablated: Float[np.ndarray, "*shape"] | float,
    spliced: Float[np.ndarray, "*shape"] | float,
    clean: Float[np.ndarray, "*shape"] | float,
) -> Float[np.ndarray, "*shape"]:
    """Return ``(ablated - spliced) / (ablated - clean)`` of losses summed over the same tokens.

    1 if the reconstruction loses nothing, 0 if it is no better than the ablation, negative if it is
    worse. NaN or infinite where the ablation costs nothing.

    Args:
        ablated: loss with the activations replaced by an ablation, which must be named with the result.
        spliced: loss with the activations replaced by their reconstruction.
        clean: loss of the model as it is; 0 for a divergence from that model.

    Examples:
        >>> float(recovered_fraction(10.0, 4.0, 2.0))
        0.75
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.divide(np.subtract(ablated, spliced), np.subtract(ablated, clean)))
