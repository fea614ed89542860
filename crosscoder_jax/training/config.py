"""The recipe of a training run."""

import dataclasses
import math
from typing import Literal

from crosscoder_jax.crosscoder import CrosscoderConfig
from crosscoder_jax.objectives import (
    AuxK,
    DeltaLoss,
    ErrorNorm,
    L0Penalty,
    L1OfNorms,
    Matryoshka,
    Reconstruction,
)
from crosscoder_jax.sparsity import BatchTopK, Gated, JumpReLU, ReLU
from crosscoder_jax.training.adam import Adam
from crosscoder_jax.training.laws import (
    CorrectedThreshold,
    MeanNorm,
    Resampling,
    Scaling,
    ThresholdLaw,
    WarmStart,
)
from crosscoder_jax.training.muon import Muon

TOKENS_CAP = 2**30
"""Counters of tokens without firing stop here, so that int32 never overflows."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the weights a run ends with, apart from the data.

    Raises:
        ValueError: if a value makes no run.
    """

    crosscoder: CrosscoderConfig
    """Shape and rules of the crosscoder."""
    num_steps: int
    """Optimiser steps."""
    batch_size: int = 2048
    """Tokens per step, over all devices; 2048 is the published recipe."""
    learning_rate: float = 1e-4
    """Peak rate of Adam; the published recipe."""
    warmup_steps: int = 1000
    """Steps over which the rate rises linearly from zero; the published recipe."""
    decay_fraction: float = 0.2
    """Last share of the steps over which the rate falls linearly to zero (Kissane et al. 2024)."""
    optimizer: Adam | Muon = Adam()
    """Moments, and what they are kept in."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; ``None`` does not clip."""
    loss: Reconstruction = ErrorNorm()
    """Reconstruction loss; the un-squared norm is what the published runs minimised."""
    delta: DeltaLoss | None = None
    """Reconstruction of the difference of two sources, too; ``None`` trains without."""
    matryoshka: Matryoshka | None = None
    """Nested prefixes of the dictionary that reconstruct, too; ``None`` trains without."""
    l1: L1OfNorms | None = None
    """Sparsity penalty of ReLU and Gated, whose codes are dense without, and of nothing else: what is sparse
    already it would only shrink."""
    l0: L0Penalty | None = None
    """Sparsity penalty of JumpReLU, and of nothing else."""
    aux_k: AuxK | None = AuxK()
    """Revival of dead latents; ``None`` trains without."""
    resampling: Resampling | None = None
    """New beginnings for dead latents, used with L1; the published runs had none."""
    start: WarmStart | None = None
    """A saved crosscoder to begin with; ``None`` begins with random directions."""
    micro_batches: int = 1
    """Parts of a batch that are decoded one after the other, of BatchTopK alone: less memory for codes and
    their gradients, and the same step, since what is kept is decided over the whole batch. AuxK then decodes
    it once more, and shards of the data send their gradients for each part."""
    is_rematerialized: bool = False
    """Make codes, of BatchTopK alone, anew from the pre-activations for the backward pass, as micro-batches
    do of their parts: less memory, and the same step."""
    pre_acts: Literal["full", "bfloat16"] = "full"
    """What the encoder's output is kept in while training: the weights' dtype, or bfloat16 for half of that,
    in which scores of a latent closer than a 256th are one."""
    frozen: tuple[Literal["w_enc", "b_enc", "w_dec", "b_dec"], ...] = ()
    """Weights that stay as they begin."""
    threshold: ThresholdLaw = CorrectedThreshold()
    """The running inference threshold; published: ``DelayedThreshold()``."""
    decoder_norm: float = 0.1
    """Initial norm of each latent's decoder in each source, normalised units. Published: 1 for BatchTopK,
    from which rare features are found late and keep a share in both models, see experiments/planted."""
    scaling: Scaling | None = MeanNorm()
    """Scale of the sources; ``None`` leaves them as they are, as the published runs did."""
    is_centred: bool = True
    """Subtract each source's mean first: one coordinate can carry half the norm of every token."""
    seed: int = 0
    """Of the initial directions."""
    data_seed: int | None = None
    """Of the order of the data; ``None`` takes ``seed``. Runs that share it see the same batches."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not 0 <= self.warmup_steps <= self.num_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must lie between 0 and num_steps={self.num_steps}"
            )
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction={self.decay_fraction} must lie between 0 and 1")
        for name in ("learning_rate", "decoder_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite")
        self._check_micro_batches()
        self._check_budgets()
        if isinstance(self.crosscoder.sparsity, JumpReLU) != (self.l0 is not None):
            raise ValueError(
                f"sparsity={self.crosscoder.sparsity} and l0={self.l0} do not go together: JumpReLU is made "
                "sparse by an L0Penalty, and only JumpReLU has the thresholds it moves"
            )
        if isinstance(self.crosscoder.sparsity, ReLU | Gated) != (self.l1 is not None):
            raise ValueError(
                f"sparsity={self.crosscoder.sparsity} and l1={self.l1} do not go together: ReLU and Gated "
                "are dense without an L1OfNorms, and what is sparse already it would only shrink"
            )
        weights, sources = self.loss.source_weights, self.crosscoder.sources
        if weights is not None and (len(weights) != len(sources) or min(weights) < 0 or max(weights) == 0):
            raise ValueError(
                f"source_weights={weights} of the loss must be one for each of the sources {sources.names}, "
                "none negative and not all zero"
            )
        if self.delta is not None:
            self.delta.check(sources)
        if self.matryoshka is not None:
            self.matryoshka.sizes(self.crosscoder.num_latents)
        if self.aux_k is not None and self.aux_k.dead_after_tokens > TOKENS_CAP:
            raise ValueError(
                f"dead_after_tokens={self.aux_k.dead_after_tokens} must not exceed {TOKENS_CAP}, where the "
                "counters stop: leave AuxK out if no latent shall count as dead"
            )
        if self.resampling is not None and self.crosscoder.rule_parameters:
            raise ValueError(
                f"resampling with sparsity={self.crosscoder.sparsity} would leave what dead latents have "
                f"learned of {', '.join(self.crosscoder.rule_parameters)} where it is: use AuxK"
            )
        if self.resampling is not None and self._is_second_moment_factored:
            raise ValueError(
                "resampling with second_moment='factored' of Adam: a latent that begins again would keep its "
                "share in the moments of all: use second_moment='full', or AuxK"
            )
        if self.resampling is not None and (self.frozen or (self.start and self.start.is_frozen)):
            raise ValueError("resampling would move weights that are frozen: use AuxK, or freeze nothing")
        if self.resampling is not None and self.resampling.every_steps * self.batch_size > TOKENS_CAP:
            raise ValueError(
                f"every_steps={self.resampling.every_steps} of batch_size={self.batch_size} are more tokens "
                f"than {TOKENS_CAP}, where the counters of silent latents stop: resample more often"
            )
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm={self.clip_norm} must be positive; None does not clip")

    def _check_budgets(self) -> None:
        """Refuse a k of more latents than are ranked for it."""
        layout, num_latents = self.crosscoder.layout, self.crosscoder.num_latents
        common, those = num_latents, f"num_latents={num_latents}"
        for group, size in zip(layout.groups, layout.sizes, strict=True):
            if group.k is not None and group.k > size:
                raise ValueError(
                    f"k={group.k} of group {group.name!r} is more than its {size} latents: "
                    "take fewer, or a larger share"
                )
            if group.k is not None:
                common -= size
                those = f"the {common} latents of num_latents={num_latents} that no group ranks apart"
        k = getattr(self.crosscoder.sparsity, "k", None) if self.l0 is None else self.l0.target
        # Where every latent has a k of its group, that of the sparsity plays no part.
        if k is not None and k > common > 0:
            raise ValueError(
                f"k={k} active latents per token are more than {those}: take fewer, or a larger dictionary"
            )

    def _check_micro_batches(self) -> None:
        if self.micro_batches < 1 or self.batch_size % self.micro_batches:
            raise ValueError(
                f"micro_batches={self.micro_batches} must be positive and divide batch_size={self.batch_size}"
            )
        if isinstance(self.crosscoder.sparsity, BatchTopK):
            return
        if self.micro_batches > 1:
            raise ValueError(
                f"micro_batches={self.micro_batches} with sparsity={self.crosscoder.sparsity}: only a batch "
                "of BatchTopK can be taken in parts: take smaller batches, or one part"
            )
        if self.is_rematerialized:
            raise ValueError(
                f"is_rematerialized with sparsity={self.crosscoder.sparsity}: only codes of BatchTopK are "
                "made anew: leave it out"
            )

    @property
    def _is_second_moment_factored(self) -> bool:
        return isinstance(self.optimizer, Adam) and self.optimizer.second_moment == "factored"

    @property
    def order_seed(self) -> int:
        """The seed of the order of the data."""
        return self.seed if self.data_seed is None else self.data_seed

    def without_seeds(self) -> "TrainConfig":
        """Return the recipe that is compiled: one compilation serves every seed."""
        return dataclasses.replace(self, seed=0, data_seed=None)
