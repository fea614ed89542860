"""What training minimises: reconstruction losses and what is added to them."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from crosscoder_jax.crosscoder import Crosscoder
from crosscoder_jax.sharding import reshard
from crosscoder_jax.sources import Source, Sources, safe_norm
from crosscoder_jax.sparsity import JumpReLU, ranking_scores, top_scores_per_row
from crosscoder_jax.typing import Acts, Code, Latents, PerLatent, Scalar, ScoreWeights


@dataclasses.dataclass(frozen=True)
class SquaredError:
    """``mean_batch sum_s ||a^s - ahat^s||^2``: the loss as papers print it.

    The code behind arXiv 2504.02922 averages over the sources instead: with the loss called MSE there,
    an L1 weight is to be multiplied by their number here.

    References:
        Lindsey et al. 2024, transformer-circuits.pub/2024/crosscoders.
    """

    source_weights: tuple[float, ...] | None = None
    """What each source's part of the loss is multiplied by, in the order of the sources; one if ``None``."""

    def __call__(self, residual: Acts, sources: Sources) -> Scalar:
        """Return the loss in squared normalised units."""
        squares = _weighted(jnp.square(residual), sources, self.source_weights)
        return jnp.mean(jnp.sum(squares, axis=-1))


@dataclasses.dataclass(frozen=True)
class MeanSquaredError:
    """``mean over batch and coordinates of (a - ahat)^2``.

    Of scaled and centred sources this is about the fraction of variance unexplained, the scale on
    which the weight 1/32 of :class:`AuxK` was chosen. Scale matters: a latent that dies keeps Adam's
    second moment of when it lived, and an AuxK that is a thousandth of the main loss hardly moves it.

    References:
        Gao et al. 2024, arXiv 2406.04093.
    """

    source_weights: tuple[float, ...] | None = None
    """What each source's part of the loss is multiplied by, in the order of the sources; one if ``None``."""

    def __call__(self, residual: Acts, sources: Sources) -> Scalar:
        """Return the loss in squared normalised units."""
        return jnp.mean(_weighted(jnp.square(residual), sources, self.source_weights))


@dataclasses.dataclass(frozen=True)
class ErrorNorm:
    """``mean over batch and sources of ||a^s - ahat^s||_2``, not squared.

    What the code behind arXiv 2504.02922 minimises by default; its L1 weights belong to this loss.
    """

    source_weights: tuple[float, ...] | None = None
    """What each source's part of the loss is multiplied by, in the order of the sources; one if ``None``."""

    def __call__(self, residual: Acts, sources: Sources) -> Scalar:
        """Return the loss in normalised units."""
        norms = jnp.stack([jnp.mean(safe_norm(part)) for part in sources.split(residual)])
        if self.source_weights is not None:
            norms = norms * jnp.asarray(self.source_weights, norms.dtype)
        return jnp.mean(norms)


Reconstruction = SquaredError | MeanSquaredError | ErrorNorm
"""Every reconstruction loss."""


@dataclasses.dataclass(frozen=True)
class DeltaLoss:
    """Reconstruct the difference of two sources, too: ``(a - ahat)^after - (a - ahat)^before``.

    Errors that both models share cost nothing here, and what only one of them has costs all of it. The
    difference is one of raw activations, times the geometric mean of the two sources' scales.

    Raises:
        ValueError: if the weight is not positive, or the two are one.

    References:
        arXiv 2603.04426 (Delta-Crosscoder).
    """

    weight: float
    """Share of this loss beside the reconstruction loss, whose kind it has."""
    before: str
    """Name of the source before the change, which is read as it is stored."""
    after: str
    """Name of the source after it."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight={self.weight} of the delta loss must be positive and finite")
        if self.before == self.after:
            raise ValueError(f"before={self.before!r} and after={self.after!r} of the delta loss must differ")

    def check(self, sources: Sources) -> None:
        """Refuse sources of which no difference can be taken.

        Raises:
            ValueError: naming them.
        """
        stored = {entry.name: entry for entry in sources if entry.combination is None}
        for field in ("before", "after"):
            name = getattr(self, field)
            if name in sources.names and name not in stored:
                raise ValueError(
                    f"{field}={name!r} of the delta loss is a combination of stored sources, whose "
                    "difference from another is none of two models: name two that are read as they are stored"
                )
            if name not in stored:
                raise ValueError(
                    f"{field}={name!r} of the delta loss is not read: name one of {tuple(stored)}"
                )
        before, after = stored[self.before], stored[self.after]
        if before.width != after.width:
            raise ValueError(
                f"the delta loss needs two sources of one width, not {before.name!r} of width "
                f"{before.width} and {after.name!r} of width {after.width}"
            )

    def __call__(self, crosscoder: Crosscoder, residual: Acts, loss: Reconstruction) -> Scalar:
        """Return the weighted loss.

        Args:
            crosscoder: whose scales are used.
            residual: what is left after reconstruction, normalised units.
            loss: its kind; weights of sources play no part.
        """
        sources, scale = crosscoder.config.sources, crosscoder.scale[...]
        before, after = (sources.names.index(name) for name in (self.before, self.after))
        parts = sources.split(residual)
        ratio = jnp.sqrt(scale[before] / scale[after])
        delta = ratio * parts[after] - parts[before] / ratio
        alone = Sources((Source("difference", delta.shape[-1]),))
        return self.weight * dataclasses.replace(loss, source_weights=None)(delta, alone)


@dataclasses.dataclass(frozen=True)
class Matryoshka:
    """Let nested prefixes of the dictionary reconstruct on their own, so that the first latents are general.

    The reconstruction loss becomes its mean over the prefixes. Latents are selected once, over the whole
    dictionary: a prefix decodes those of the selected that it holds. Each prefix but the whole costs one
    more decoding.

    Raises:
        ValueError: if the shares do not ascend to 1.

    References:
        Bussmann et al. 2025, arXiv 2503.17547, which takes the sum.
    """

    shares: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """Of the latents, of each prefix; the last is the whole dictionary."""

    def __post_init__(self) -> None:
        ascending = (0.0, *self.shares)
        if any(low >= high for low, high in itertools.pairwise(ascending)) or ascending[-1] != 1:
            raise ValueError(f"shares={self.shares} must be positive and ascend to 1, such as (0.25, 1)")

    def sizes(self, num_latents: int) -> tuple[int, ...]:
        """Return how many latents each prefix has.

        Raises:
            ValueError: if a prefix would be empty, or no larger than the one before it.
        """
        sizes = tuple(round(share * num_latents) for share in self.shares)
        if any(low >= high for low, high in itertools.pairwise((0, *sizes))):
            raise ValueError(
                f"shares={self.shares} of num_latents={num_latents} are prefixes of {sizes} latents, which "
                "do not grow: give fewer shares"
            )
        return sizes

    def __call__(
        self, crosscoder: Crosscoder, normalized: Acts, code: Code, recon: Acts, loss: Reconstruction
    ) -> Scalar:
        """Return the mean over the prefixes of a reconstruction loss.

        Args:
            crosscoder: whose decoders are used.
            normalized: what is to be reconstructed, normalised units.
            code: of this batch, at the training rule.
            recon: of the whole code, normalised units.
            loss: of each prefix.
        """
        sources, num_latents = crosscoder.config.sources, crosscoder.config.num_latents
        index = reshard(jnp.arange(num_latents), crosscoder.shardings.per_latent_l)
        losses = [loss(normalized - recon, sources)]
        for size in self.sizes(num_latents)[:-1]:
            within = jnp.where(index < size, code, jnp.zeros_like(code))
            losses.append(loss(normalized - crosscoder.decode_normalized(within), sources))
        return jnp.mean(jnp.stack(losses))


@dataclasses.dataclass(frozen=True)
class L1OfNorms:
    """``weight * mean_batch sum_j f_j sum_s ||d_j^s||``: the penalty of L1 crosscoders.

    What multiplies the code is the weight that the code norm gives a latent: by default the sum of its
    decoder norms, with ``NormOfConcatenation`` the "L2 of norms". The gradient also shrinks decoders,
    which is what makes shared latents look exclusive (Complete Shrinkage, Latent Decoupling).

    Raises:
        ValueError: if a value is negative.

    References:
        Lindsey et al. 2024; Minder et al. 2025, arXiv 2504.02922.
    """

    weight: float
    """Penalty per unit of score; 0.041 with :class:`ErrorNorm` is the published recipe."""
    warmup_steps: int = 0
    """Steps over which the weight rises linearly from zero."""

    def __post_init__(self) -> None:
        if self.weight < 0 or self.warmup_steps < 0:
            raise ValueError(
                f"weight={self.weight} and warmup_steps={self.warmup_steps} must not be negative"
            )

    def __call__(self, code: Code, score_weights: ScoreWeights, step: Int[Array, ""] | int) -> Scalar:
        """Return the penalty at a training step."""
        rise = _rise(step, self.warmup_steps, code.dtype)
        return self.weight * rise * jnp.sum(code * score_weights) / code.shape[0]


def gate_loss(crosscoder: Crosscoder, pre_acts: Latents, normalized: Acts, loss: Reconstruction) -> Scalar:
    """Return ``loss(a - (relu(pre) W_dec + b_dec))`` with the decoder held still.

    What :class:`~crosscoder_jax.sparsity.Gated` opens its gates for: the step that they are has no
    gradient of its own.

    Args:
        crosscoder: whose decoder it is.
        pre_acts: of the batch, normalised units.
        normalized: the batch.
        loss: of a residual.

    References:
        Rajamanoharan et al. 2024, arXiv 2404.16014: the auxiliary loss.
    """
    recon = crosscoder.held().decode_normalized(jax.nn.relu(pre_acts))
    return loss(normalized - recon, crosscoder.config.sources)


@dataclasses.dataclass(frozen=True)
class L0Penalty:
    """``weight * mean_batch L0``, or ``weight * (mean_batch L0 / target - 1)^2`` with a target.

    Its straight-through gradient moves the thresholds of :class:`~crosscoder_jax.sparsity.JumpReLU`.

    Raises:
        ValueError: if a value is out of range.

    References:
        Rajamanoharan et al. 2024, arXiv 2407.14435; the target in its appendix on controlling sparsity.
    """

    weight: float
    """Loss per active latent; with a target, loss at an L0 of zero or of twice the target."""
    target: float | None = None
    """Active latents per token to end with; ``None`` pushes the L0 down without end."""
    warmup_steps: int = 0
    """Steps over which the weight rises linearly from zero."""

    def __post_init__(self) -> None:
        if self.weight < 0 or self.warmup_steps < 0:
            raise ValueError(
                f"weight={self.weight} and warmup_steps={self.warmup_steps} must not be negative"
            )
        if self.target is not None and not 0 < self.target < math.inf:
            raise ValueError(f"target={self.target} must be positive and finite")

    def __call__(self, crosscoder: Crosscoder, pre_acts: Latents, step: Int[Array, ""] | int) -> Scalar:
        """Return the penalty of a batch at a training step.

        Raises:
            ValueError: if the crosscoder has no learned thresholds.
        """
        sparsity, thresholds = crosscoder.config.sparsity, crosscoder.latent_threshold
        if not isinstance(sparsity, JumpReLU) or thresholds is None:
            raise ValueError(f"sparsity={sparsity} has no thresholds for L0Penalty to move: use JumpReLU()")
        l0 = jnp.mean(sparsity.num_active(pre_acts, crosscoder.score_weights(), thresholds[...]))
        loss = l0 if self.target is None else jnp.square(l0 / self.target - 1)
        return self.weight * _rise(step, self.warmup_steps, loss.dtype) * loss


@dataclasses.dataclass(frozen=True)
class AuxK:
    """Let dead latents reconstruct what the live ones leave over.

    ``weight * mean ||e - ehat||^2 / mean ||e - mean e||^2`` with the residual e detached and ehat
    decoded without bias from the ``k_aux`` dead latents of each token with the largest activations times
    decoder norms; costs of groups play no part. Sums are in the dtype of the crosscoder, also in float64,
    where the published code stays in float32.

    Raises:
        ValueError: if a value is out of range.

    References:
        Gao et al. 2024, arXiv 2406.04093; the form is the one of the code behind arXiv 2504.02922.
    """

    weight: float = 1 / 32
    """Share of this loss in the whole."""
    k_aux: int | None = None
    """Dead latents used per token; ``None`` is half the width of the widest source."""
    dead_after_tokens: int = 10_000_000
    """A latent is dead when it has not fired for this many tokens."""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight={self.weight} must not be negative")
        if self.dead_after_tokens <= 0:
            raise ValueError(f"dead_after_tokens={self.dead_after_tokens} must be positive")
        if self.k_aux is not None and self.k_aux <= 0:
            raise ValueError(f"k_aux={self.k_aux} must be positive; leave AuxK out to train without it")

    def __call__(
        self,
        crosscoder: Crosscoder,
        pre_acts: Latents,
        residual: Acts,
        is_dead: Bool[Array, "latent"],
        *,
        spread: Scalar | None = None,
    ) -> Scalar:
        """Return the weighted loss; zero, and nothing computed, while no latent is dead.

        Args:
            crosscoder: gives decoders and score weights.
            pre_acts: encoder outputs of this batch.
            residual: what is left after reconstruction, normalised units; detached here.
            is_dead: the latents that may take part; only they get a gradient.
            spread: ``mean ||e - mean e||^2``, of more tokens than are given; by default of these.
        """
        k_aux = self.k_aux or max(max(crosscoder.config.sources.widths) // 2, 1)
        residual = lax.stop_gradient(residual)
        num_dead = jnp.sum(is_dead, dtype=jnp.int32)

        def revive(pre_acts: Latents) -> Scalar:
            code = _dead_code(crosscoder, pre_acts, is_dead, num_dead, k_aux)
            missed = residual - crosscoder.decode_without_bias(code)
            within = _spread(residual) if spread is None else spread
            loss = jnp.mean(jnp.sum(jnp.square(missed), axis=-1)) / jnp.where(within > 0, within, 1.0)
            return self.weight * jnp.where(within > 0, loss, 0.0)

        return lax.cond(num_dead > 0, revive, lambda _: jnp.zeros((), residual.dtype), pre_acts)


def _spread(residual: Acts) -> Scalar:
    return jnp.mean(jnp.sum(jnp.square(residual - jnp.mean(residual, axis=0)), axis=-1))


def _weighted(values: Acts, sources: Sources, weights: tuple[float, ...] | None) -> Acts:
    """Multiply each source's coordinates by its weight."""
    return values if weights is None else values * sources.per_source(jnp.asarray(weights, values.dtype))


def _rise(step: Int[Array, ""] | int, warmup_steps: int, dtype: jnp.dtype) -> Array | float:
    if not warmup_steps:
        return 1.0
    return jnp.clip(jnp.asarray(step, dtype) / warmup_steps, 0.0, 1.0)


def _dead_code(
    crosscoder: Crosscoder,
    pre_acts: Latents,
    is_dead: Bool[Array, "latent"],
    num_dead: Int[Array, ""],
    k_aux: int,
) -> Latents:
    acts = jnp.where(is_dead, jax.nn.relu(pre_acts), 0.0)
    scores = lax.stop_gradient(ranking_scores(acts, _shared_norms(crosscoder)))
    # While all dead latents fit there is nothing to rank, which is nearly always.
    keep = lax.cond(
        num_dead <= k_aux,
        lambda scores: scores > 0,
        lambda scores: top_scores_per_row(scores, jnp.int32(k_aux)),
        scores,
    )
    return jnp.where(keep, acts, 0.0)


def _shared_norms(crosscoder: Crosscoder) -> PerLatent:
    # By norms and not by scores: a cheap group's dead latents would keep all others from being revived.
    norms = crosscoder.code_norms()
    # Dead latents share one code: they are to be revived, not told apart by source.
    return jnp.sum(norms, axis=0) if crosscoder.config.is_decoupled else norms
