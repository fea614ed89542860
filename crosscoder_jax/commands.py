"""What each command of the command line reads: one frozen dataclass each, and the function it calls.

A command's fields are its options, its docstrings their help. Every command writes itself as
``<name>.command.json`` beside its result; ``--config FILE`` reads that back.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from crosscoder_jax.activations.nulls import Null, SameModel, SwapCoordinates, SwapDocuments
from crosscoder_jax.activations.split import Split
from crosscoder_jax.crosscoder import CrosscoderConfig, Precision
from crosscoder_jax.groups import LatentGroup, Layout, exclusive_groups
from crosscoder_jax.language_models import SpliceConfig, TextSource
from crosscoder_jax.objectives import (
    AuxK,
    DeltaLoss,
    ErrorNorm,
    L0Penalty,
    L1OfNorms,
    Matryoshka,
    MeanSquaredError,
    SquaredError,
)
from crosscoder_jax.planning import PlanConfig, Topology
from crosscoder_jax.report import ReportConfig
from crosscoder_jax.sources import Sources, difference
from crosscoder_jax.sparsity import BatchTopK, Gated, JumpReLU, ReLU, Sparsity, TopK
from crosscoder_jax.training.adam import Adam
from crosscoder_jax.training.config import TrainConfig
from crosscoder_jax.training.laws import MeanNorm, WarmStart
from crosscoder_jax.training.muon import Muon

_LOSSES = {"norm": ErrorNorm(), "squared": SquaredError(), "mean-squared": MeanSquaredError()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Whether a command runs in one process or in several."""

    distributed: bool = False
    """One of several processes, each given the same command: found by JAX on TPU pods, under Slurm and other
    launchers, or told by the next three or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID."""
    coordinator: str | None = None
    """host:port of the first process."""
    num_processes: int | None = None
    """Processes, altogether."""
    process_id: int | None = None
    """Which of them this is, from 0."""

    @property
    def is_distributed(self) -> bool:
        """Whether this is one of several processes."""
        told = (self.coordinator, self.num_processes, self.process_id)
        return self.distributed or any(value is not None for value in told)

    def without_processes(self) -> "Processes":
        """Return what is kept beside the run, which may go on with other processes."""
        return dataclasses.replace(
            self, distributed=False, coordinator=None, num_processes=None, process_id=None
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices(Processes):
    """What a command runs on: a mesh of devices, of this process or of several."""

    data_shards: int = 1
    """Devices that share a batch, over all processes."""
    latent_shards: int = 1
    """Devices that share the latents."""


@dataclasses.dataclass(frozen=True)
class Train(Devices):
    """Train a crosscoder on a store; run it again to go on where it stopped."""

    store: Path
    """Folder that `harvest` wrote."""
    output: Path
    """Folder of the run."""
    sources: tuple[str, ...] | None = None
    """Stored sources to read, the base first, such as base.L13 chat.L13 of several layers; all by default."""
    reads: Literal["all", "difference", "delta"] = "all"
    """"all" of these sources (a crosscoder), or of two the "difference" chat - base (a difference SAE), or
    the "delta" basis: base and chat - base, each scaled on its own, so that the change weighs as much as
    what is shared; it is diffed as base and chat."""
    start_from: Path | None = None
    """Folder of a run, or of a crosscoder, whose latents and normaliser to begin with: of fewer latents or
    fewer sources, or of other models of the same width (stage-wise diffing)."""
    start_sources: tuple[str, ...] | None = None
    """What that one's sources are here, in its order; by default they have the same names."""
    is_start_frozen: bool = False
    """Whether to hold what it brings, so that only new latents and new sources learn."""
    frozen: tuple[Literal["w_enc", "b_enc", "w_dec", "b_dec"], ...] = ()
    """Weights that stay as they begin."""
    num_latents: int = 16_384
    """Size of the dictionary."""
    k: float = 100.0
    """Mean number of active latents per token (BatchTopK); those of --dedicated-k come on top of it."""
    l1: float | None = None
    """Weight of the L1-of-norms penalty: trains a ReLU crosscoder in place of BatchTopK, or with --sparsity
    gated a gated one. Published: 0.041 with --decoder-norm 0.005."""
    sparsity: Literal["batch-top-k", "top-k", "jump-relu", "gated"] = "batch-top-k"
    """How k is kept to without --l1: over the batch (recommended), for every token, or by a threshold of
    each latent that is trained until the mean is k. Gated ones are made sparse by --l1, without a k."""
    dedicated: float = 0.0
    """Share of the latents, for each source, that write to it alone; with --reads delta, to the change."""
    is_encoder_dedicated: bool = False
    """Whether those read it alone, too."""
    dedicated_k: float | None = None
    """Mean number of those active per token and source, ranked among themselves: a token's L0 is then the sum
    of the budgets, --k and this for each source. By default they are ranked with all others for --k."""
    is_parted: bool = False
    """With --reads delta, whether all latents that are not dedicated to the change write to base alone, which
    is what the models share; each then belongs to both models or to one."""
    tied: float = 0.0
    """Share of the latents with one decoder for all sources: designated shared latents."""
    tied_cost: float = 1.0
    """What a unit of their score costs against that of others. Published: 0.1 to 0.2."""
    delta_weight: float = 0.0
    """Weight of a loss on the reconstruction of chat - base, beside that of the sources; 0 trains without."""
    delta_sources: tuple[str, str] | None = None
    """The two sources whose difference that is, the one before the change first; by default those that are
    read, if they are two."""
    source_weights: tuple[float, ...] | None = None
    """What each source's part of the loss is multiplied by, in the order in which they are read."""
    nested: tuple[float, ...] | None = None
    """Shares of the latents that reconstruct on their own, ascending to 1, such as 0.0625 0.25 1: a
    Matryoshka crosscoder. Not with --dedicated or --tied."""
    num_steps: int = 10_000
    """Optimiser steps."""
    batch_size: int = 2048
    """Tokens per step, over all devices."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    warmup_steps: int = 1000
    """Steps of linear warm-up."""
    decay_fraction: float = 0.2
    """Last share of the steps over which the learning rate falls to zero."""
    loss: Literal["norm", "squared", "mean-squared"] = "norm"
    """Reconstruction loss: the error's norm (what published runs minimised), its square (what papers
    print), or the mean square of its coordinates (on which AuxK weighs most)."""
    decoder_norm: float = 0.1
    """Initial norm of each latent's decoder in each source, normalised units. Published: 1 for BatchTopK,
    0.005 for L1; from 1 rare features are found late."""
    aux_k_weight: float | None = None
    """Weight of the loss that revives dead latents; 0 trains without. By default what was published: 1/32,
    and none with --l1."""
    dead_after_tokens: int = AuxK.dead_after_tokens
    """Tokens without firing after which a latent is dead."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """What encoder and decoder products are computed in; gradients, weights and moments stay float32, or are
    float64 with them, which needs the environment variable JAX_ENABLE_X64=1."""
    precision: Precision = "highest"
    """Of products of which a side is float32, as in every gradient: "default" takes them in one pass of
    bfloat16 on TPU and of TF32 on GPU, which is up to six times as fast."""
    is_centred: bool = True
    """Subtract each source's mean."""
    is_scaled: bool = True
    """Scale each source to E||x|| = sqrt(width)."""
    seed: int = 0
    """Of the initial directions."""
    data_seed: int | None = None
    """Of the order of the data, and of what --null swaps; the seed by default."""
    seeds: int = 1
    """Crosscoders to train over one read of the data, with this seed and those after it: runs in the
    folders seed-0, seed-1, ... of the output. 1 writes its run into the output itself."""
    null: Literal["swap-coordinates", "swap-documents", "same-model"] | None = None
    """Train on null data, for `diff --null-run`. "swap-coordinates" swaps the two models in half of the
    coordinates: no latent is exclusive by right. "swap-documents" swaps them in every second document: the
    two exclusive classes differ by chance. "same-model" reads the first one twice: nothing differs."""
    held_out: float = 0.1
    """Share of the documents that training does not see, and every later command measures on; above 0."""
    window_tokens: int = 1 << 17
    """Tokens shuffled together; memory holds two windows."""
    lanes: int = 1
    """Streams of files that share every batch evenly: as many as hosts, or a multiple, so that each reads
    its share of the store alone. Divides the batch; changes the order of the data."""
    log_every: int = 10
    """Steps between logged metrics."""
    checkpoint_every: int = 500
    """Steps between checkpoints; on SIGTERM one is saved at once, and the command ends with 75."""
    step_timeout: float | None = 1800.0
    """Seconds without a step done, the compilation included, after which the command prints where it is stuck
    and ends with 76."""
    optimizer: Literal["adam", "muon"] = "adam"
    """Adam, or Muon for encoder and decoder, which keeps no second moment of them: half the memory, for
    products that cost as much as the rest where a batch is four times the width."""
    first_moment: Literal["full", "bfloat16"] = "full"
    """What the first moment is kept in, bfloat16 for half of it."""
    second_moment: Literal["full", "factored"] = "full"
    """Adam's second moment of every weight, or only its means over the latents and over the coordinates, for
    none of it."""
    micro_batches: int = 1
    """Parts of a batch that are decoded one after the other in less memory; changes nothing else: what
    is kept is decided over the whole batch."""
    is_rematerialized: bool = False
    """Make codes anew for the backward pass, in less memory; changes nothing else."""
    pre_acts: Literal["full", "bfloat16"] = "full"
    """What the encoder's output is kept in: bfloat16 takes half the memory and rounds the scores."""
    is_optimizer_spread: bool = False
    """Whether the shards of the data share the moments, too; a step then gathers the updates."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run."""

    def recipe(self, stored: Sources) -> TrainConfig:
        """Return the training recipe for a store's sources.

        Raises:
            ValueError: if the store lacks a source, the difference is asked for of other than two, or
                options make no recipe.
        """
        sources = self.read_sources(stored)
        self._check_weights()
        loss = dataclasses.replace(_LOSSES[self.loss], source_weights=self.source_weights)
        return TrainConfig(
            crosscoder=CrosscoderConfig(
                sources=sources,
                num_latents=self.num_latents,
                sparsity=self.selection(),
                groups=self.groups(sources),
                dtype=self.dtype,
                precision=self.precision,
            ),
            num_steps=self.num_steps,
            batch_size=self.batch_size,
            optimizer=_optimizer(self),
            micro_batches=self.micro_batches,
            is_rematerialized=self.is_rematerialized,
            pre_acts=self.pre_acts,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            decay_fraction=self.decay_fraction,
            decoder_norm=self.decoder_norm,
            loss=loss,
            delta=self.delta_loss(sources),
            matryoshka=self.matryoshka(),
            l1=None if self.l1 is None else L1OfNorms(self.l1, warmup_steps=self.warmup_steps),
            l0=self.l0_penalty(),
            start=self.start(),
            frozen=self.frozen,
            aux_k=self.revival(),
            is_centred=self.is_centred,
            scaling=MeanNorm() if self.is_scaled else None,
            seed=self.seed,
            data_seed=self.data_seed,
        )

    def selection(self) -> Sparsity:
        """Return how the code is made sparse.

        Raises:
            ValueError: if both a sparsity and an L1 penalty are given, or a k that top-k cannot keep.
        """
        if self.sparsity == "gated":
            if self.l1 is None:
                raise ValueError(
                    "sparsity='gated' is made sparse by an L1 penalty on its gates: give l1, too"
                )
            return Gated()
        if self.l1 is not None:
            if self.sparsity != "batch-top-k":
                raise ValueError(
                    f"sparsity={self.sparsity!r} and l1={self.l1} do not go together: leave one out"
                )
            return ReLU()
        if not 0 < self.k < math.inf:
            raise ValueError(f"k={self.k} must be positive and finite")
        if self.sparsity == "batch-top-k":
            return BatchTopK(self.k)
        if self.sparsity == "jump-relu":
            return JumpReLU()
        if not self.k.is_integer():
            raise ValueError(f"k={self.k} must be whole with sparsity='top-k': every token has as many")
        return TopK(int(self.k))

    def start(self) -> WarmStart | None:
        """Return the saved crosscoder to begin with.

        Raises:
            ValueError: if how to begin is given without what to begin with.
        """
        if self.start_from is None:
            if self.start_sources is not None or self.is_start_frozen:
                raise ValueError("start_sources and is_start_frozen say how to begin: give start_from, too")
            return None
        finished = self.start_from / "crosscoder"
        folder = finished if finished.is_dir() else self.start_from
        return WarmStart(str(folder), self.start_sources, self.is_start_frozen)

    def _check_weights(self) -> None:
        for name in ("delta_weight", "l1", "aux_k_weight"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} weighs a loss: it must be finite and not negative")

    def delta_loss(self, sources: Sources) -> DeltaLoss | None:
        """Return the loss on the reconstruction of a difference.

        Raises:
            ValueError: if it has no weight, or there are not two stored sources to take it of.
        """
        if not self.delta_weight:
            if self.delta_sources is not None:
                raise ValueError(
                    f"delta_sources={self.delta_sources} are of the loss on their difference: "
                    "give --delta-weight, too"
                )
            return None
        given = f"delta_weight={self.delta_weight}"
        if sources.is_derived or len(sources) < 2:
            raise ValueError(
                f"{given} with reads={self.reads!r} of {sources.names}: it is of the difference of two "
                "stored sources that are both read: leave it out, or take reads='all' of two"
            )
        if self.delta_sources is None and len(sources) > 2:
            raise ValueError(
                f"{given} is of the difference of two sources, and {sources.names} are read: name two with "
                "--delta-sources BEFORE AFTER"
            )
        before, after = self.delta_sources or sources.names
        if before == after or not {before, after} <= set(sources.names):
            raise ValueError(f"delta_sources={self.delta_sources} must be two of {sources.names}")
        widths = {entry.name: entry.width for entry in sources if entry.name in (before, after)}
        if len(set(widths.values())) > 1:
            raise ValueError(f"{given} needs two sources of one width, not {widths}: leave it out")
        return DeltaLoss(self.delta_weight, before, after)

    def matryoshka(self) -> Matryoshka | None:
        """Return the prefixes that reconstruct on their own.

        Raises:
            ValueError: if they are none, or latents are set apart, too.
        """
        if self.nested is None:
            return None
        if self.dedicated or self.tied:
            raise ValueError(
                f"nested={self.nested} with dedicated={self.dedicated}, tied={self.tied}: latents that are "
                "set apart come first, so the first prefixes would be those: leave one or the other out"
            )
        try:
            made = Matryoshka(self.nested)
            made.sizes(self.num_latents)
        except ValueError as error:
            raise ValueError(f"nested={self.nested}: {error}") from error
        return made

    def l0_penalty(self) -> L0Penalty | None:
        """Return the loss that moves the thresholds of JumpReLU until the mean L0 is k."""
        if self.sparsity != "jump-relu":
            return None
        return L0Penalty(1.0, target=self.k, warmup_steps=self.warmup_steps)

    def groups(self, sources: Sources) -> tuple[LatentGroup, ...]:
        """Return the groups of latents under rules of their own.

        Raises:
            ValueError: if their options do not go together, or they do not fit the latents.
        """
        self._check_groups()
        self._check_shares(sources)
        self._check_dedicated_k()
        tied = LatentGroup("tied", self.tied, is_tied=True, cost=self.tied_cost) if self.tied else None
        if not self.dedicated:
            return () if tied is None else (tied,)
        dedicated = exclusive_groups(
            sources, self.dedicated, is_encoder_masked=self.is_encoder_dedicated, k=self.dedicated_k
        )
        if self.reads == "delta":
            # What writes to base alone, in this basis, is shared.
            dedicated = dedicated[-1:]
        if self.is_parted:
            dedicated += (LatentGroup("shared", 1 - self.dedicated, writes=sources.names[:1]),)
        groups = dedicated if tied is None else (tied, *dedicated)
        for group, size in zip(groups, Layout(groups, sources, self.num_latents).sizes, strict=True):
            if group.k is not None and group.k > size:
                raise ValueError(
                    f"dedicated_k={self.dedicated_k} is more than the {size} latents of "
                    f"dedicated={self.dedicated} of num_latents={self.num_latents}: take fewer, or a larger "
                    "share"
                )
        return groups

    def _check_groups(self) -> None:
        if not self.dedicated and (self.dedicated_k is not None or self.is_encoder_dedicated):
            raise ValueError(
                "dedicated_k and is_encoder_dedicated are of dedicated latents: give dedicated, too"
            )
        if self.is_parted and (self.reads != "delta" or not self.dedicated or self.tied):
            raise ValueError(
                f"is_parted with reads={self.reads!r}, dedicated={self.dedicated}, tied={self.tied}: it "
                "parts the latents of reads='delta' into those dedicated to the change and all others: give "
                "both, and leave tied out"
            )
        if not self.tied and self.tied_cost != 1:
            raise ValueError(f"tied_cost={self.tied_cost} is of tied latents: give tied, too")
        if self.tied and self.reads == "delta":
            raise ValueError(
                f"tied={self.tied} with reads='delta': one decoder for base and for the change is none that "
                "base and chat share: leave it out"
            )
        if not 0 < self.tied_cost < math.inf:
            raise ValueError(f"tied_cost={self.tied_cost} must be positive and finite")

    def _check_shares(self, sources: Sources) -> None:
        for name in ("dedicated", "tied"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} is a share of the latents: it must lie between 0 and 1")
            if share and len(sources) == 1:
                raise ValueError(
                    f"{name}={share} tells sources apart, and {sources.names[0]!r} is read alone: leave it "
                    "out, or read two"
                )
            if share and round(share * self.num_latents) < 1:
                raise ValueError(
                    f"{name}={share} of num_latents={self.num_latents} is no latent: take "
                    f"{1 / self.num_latents:.2g} or more, or leave it out"
                )
        written = sources.names[-1:] if self.reads == "delta" else sources.names
        total = len(written) * self.dedicated + self.tied
        if total > 1 + 1e-9:
            raise ValueError(
                f"dedicated={self.dedicated} for each of {written} and tied={self.tied} are shares of "
                f"{total:g} together, more than all latents: take {(1 - self.tied) / len(written):g} or less "
                "for each"
            )
        if self.is_parted and round((1 - self.dedicated) * self.num_latents) < 1:
            raise ValueError(
                f"dedicated={self.dedicated} with --is-parted leaves no latent to what is shared: take less"
            )

    def _check_dedicated_k(self) -> None:
        if self.dedicated_k is None:
            return
        given = f"dedicated_k={self.dedicated_k}"
        if not 0 < self.dedicated_k < math.inf:
            raise ValueError(f"{given} must be positive and finite")
        if self.l1 is not None or self.sparsity not in ("batch-top-k", "top-k"):
            rule = f"sparsity={self.sparsity!r}" if self.l1 is None else f"l1={self.l1}"
            raise ValueError(
                f"{given} with {rule}: only what ranks latents keeps to a k: leave it out, or take "
                "sparsity='batch-top-k'"
            )
        if self.sparsity == "top-k" and not self.dedicated_k.is_integer():
            raise ValueError(f"{given} must be whole with sparsity='top-k': every token has as many")

    def runs(self) -> Sequence["Train"]:
        """Return the commands that train one crosscoder each, which this one trains together.

        Raises:
            ValueError: if there is none, or the output, which is to hold several, is a run itself.
        """
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds} must be at least 1")
        if self.seeds == 1:
            return [self]
        if (self.output / "config.json").is_file():
            raise ValueError(
                f"{self.output} is a run itself: choose another output folder for {self.seeds} seeds"
            )
        return [
            dataclasses.replace(
                self, output=self.output / f"seed-{seed}", seed=seed, data_seed=self._order_seed, seeds=1
            )
            for seed in range(self.seed, self.seed + self.seeds)
        ]

    @property
    def _order_seed(self) -> int:
        return self.seed if self.data_seed is None else self.data_seed

    def null_data(self) -> Null | None:
        """Return what the data is turned into before training."""
        if self.null is None:
            return None
        if self.null == "same-model":
            return SameModel()
        kind = SwapDocuments if self.null == "swap-documents" else SwapCoordinates
        return kind(self._order_seed)

    def revival(self) -> AuxK | None:
        """Return the loss that revives dead latents."""
        weight = self.aux_k_weight
        if weight is None:
            weight = AuxK.weight if self.l1 is None else 0.0
        return AuxK(weight, dead_after_tokens=self.dead_after_tokens) if weight else None

    def read_sources(self, stored: Sources) -> Sources:
        """Return what the crosscoder reads of a store.

        Raises:
            ValueError: if the store lacks a source, or the difference is asked for of other than two.
        """
        by_name = {entry.name: entry for entry in stored}
        for name in self.sources or ():
            if name not in by_name:
                raise ValueError(f"sources={self.sources} names {name!r}, but the store has {stored.names}")
        read = stored if self.sources is None else Sources(tuple(by_name[name] for name in self.sources))
        if self.reads == "all":
            return read
        if len(read) != 2:
            raise ValueError(
                f"reads={self.reads!r} needs two stored sources, not {read.names}: choose two with sources"
            )
        before, after = read.entries
        change = difference(after, before)
        return Sources((change,) if self.reads == "difference" else (before, change))

    def split(self) -> Split:
        """Return which documents are held out.

        Raises:
            ValueError: if none would be, on which every later command measures, or all of them.
        """
        if not 0 < self.held_out < 1:
            raise ValueError(
                f"held_out={self.held_out} must lie between 0 and 1: calibrate, evaluate and diff measure on "
                "the documents that are held out"
            )
        return Split(self.held_out)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tell whether a training run would fit on chips that need not be here, and how fast it might go."""

    topology: str
    """The chips: v5p:4x4x8, v5e:16x16, v6e:2x4, 8xH100-80GB or cpu:8. For TPUs the extra `tpu` brings the
    compiler, for which no TPU is needed."""
    sources: str
    """Width of each source, such as 2304,2304."""
    num_latents: int = 16_384
    """Size of the dictionary (--latents for short)."""
    k: float = 100.0
    """Mean number of active latents per token (BatchTopK)."""
    batch_size: int = 2048
    """Tokens per step, over all chips (--batch for short)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What encoder and decoder products are computed in, as for train."""
    precision: Precision = "highest"
    """Of products of which a side is float32, as for train."""
    aux_k_weight: float = AuxK.weight
    """Weight of the loss that revives dead latents; 0 plans without. It is in every estimate as if latents
    were dead."""
    optimizer: Literal["adam", "muon"] = "adam"
    """As for train."""
    first_moment: Literal["full", "bfloat16"] = "full"
    """What the first moment is kept in, as for train."""
    second_moment: Literal["full", "factored"] = "full"
    """Adam's second moment, as for train."""
    micro_batches: int = 1
    """Parts of a batch that are decoded one after the other in less memory, as for train."""
    is_rematerialized: bool = False
    """Make codes anew for the backward pass, as for train."""
    pre_acts: Literal["full", "bfloat16"] = "full"
    """What the encoder's output is kept in, as for train."""
    is_optimizer_spread: bool = False
    """Whether the shards of the data share the moments, as for train."""
    meshes: tuple[str, ...] = ()
    """Splits to try, such as 8x8 4x16, shards of the data x shards of the latents; by default all that use
    every chip."""
    stored_dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Of the activations on disk, for the rate at which they must be read."""
    json: bool = False
    """Print everything as JSON."""

    def config(self) -> PlanConfig:
        """Return what to plan for.

        Raises:
            ValueError: if an option is not understood or makes no run.
        """
        return PlanConfig(
            topology=Topology.parse(self.topology),
            widths=_whole_numbers("sources", self.sources, ",", "2304,2304"),
            num_latents=self.num_latents,
            k=self.k,
            batch_size=self.batch_size,
            dtype=self.dtype,
            precision=self.precision,
            aux_k_weight=self.aux_k_weight,
            optimizer=_optimizer(self),
            micro_batches=self.micro_batches,
            is_rematerialized=self.is_rematerialized,
            pre_acts=self.pre_acts,
            is_optimizer_spread=self.is_optimizer_spread,
            meshes=tuple(_mesh(text) for text in self.meshes),
            stored_dtype=self.stored_dtype,
        )


def _optimizer(command: Train | Plan) -> Adam | Muon:
    if command.optimizer == "adam":
        return Adam(first_moment=command.first_moment, second_moment=command.second_moment)
    if command.second_moment != "full":
        raise ValueError(
            f"second_moment={command.second_moment!r} with optimizer='muon': it keeps none of encoder and "
            "decoder: leave it out, or take optimizer='adam'"
        )
    return Muon(first_moment=command.first_moment)


@dataclasses.dataclass(frozen=True)
class Doctor(Processes):
    """Look for what would stop or slow down a training run here; exits with 1 if something is broken."""

    store: Path | None = None
    """Folder that `harvest` wrote, to be read from for its rate."""
    output: Path | None = None
    """Where checkpoints are to go."""
    plan: Path | None = None
    """What `plan --json` printed: devices, memory, disk and store are compared with its cheapest mesh."""
    hosts: int | None = None
    """That train together and must share the output, of which this is one; those of the plan by default. With
    --distributed, given on all of them, each is looked at, and whether all see the output is tried."""
    seconds: float = 3.0
    """To read from the store for."""


def _mesh(text: str) -> tuple[int, int]:
    shards = _whole_numbers("meshes", text, "x", "8x8")
    if len(shards) != 2:
        raise ValueError(f"meshes={text} must be shards of the data x shards of the latents, such as 8x8")
    return shards[0], shards[1]


def _whole_numbers(name: str, text: str, separator: str, example: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(separator)]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(
            f"{name}={text} must be whole numbers with {separator!r} between them: write {example}"
        )
    return tuple(int(part) for part in parts)


@dataclasses.dataclass(frozen=True)
class Evaluate(Devices):
    """Measure a run's crosscoder on its held-out tokens; writes evaluation.json into the run."""

    run: Path
    """Folder that `train` wrote."""
    store: Path | None = None
    """Another store of the same models; the one trained on by default."""
    batch_size: int = 1024
    """Tokens per step."""
    splice: bool = False
    """Also run the models with reconstructions spliced in: cross-entropy and KL recovered."""
    splice_texts: tuple[TextSource, ...] | None = None
    """Texts that were not trained on, each ``label=location`` as for ``harvest --texts``; the held-out
    documents of the harvest's texts by default."""
    splice_tokens: int = 100_000
    """Predictions to count."""
    splice_batch_size: int | None = None
    """Sequences of one batch through the models; that of the harvest by default."""
    device: str | None = None
    """Torch device of the models; a GPU where there is one by default."""

    def splicing(self) -> SpliceConfig:
        """Return on what the spliced models are measured."""
        return SpliceConfig(self.splice_texts, self.splice_tokens, self.splice_batch_size, self.device)


@dataclasses.dataclass(frozen=True)
class Calibrate(Devices):
    """Set the inference threshold so that the mean L0 over the held-out tokens is k."""

    run: Path
    """Folder that `train` wrote."""
    store: Path | None = None
    """Another store of the same models; the one trained on by default."""
    batch_size: int = 1024
    """Tokens per step."""


@dataclasses.dataclass(frozen=True)
class Diff(Devices):
    """Decoder norms, classes and Latent Scaling of every latent on held-out tokens, as one table."""

    run: Path
    """Folder that `train` wrote; the table goes to its folder `diff`."""
    store: Path | None = None
    """Another store of the same models; the one trained on by default."""
    batch_size: int = 1024
    """Tokens per step."""
    num_snippet_latents: int = 24
    """Latents whose strongest text snippets are kept."""
    null_run: Path | None = None
    """A diffed run of the same recipe that was trained with --null; its counts are put beside these."""


@dataclasses.dataclass(frozen=True)
class ImportActs:
    """Write a store from activations that dictionary_learning or SAELens cached."""

    store: Path
    """Folder of the store to write; completed when it is half-written from the same caches."""
    base: tuple[str, ...]
    """Caches of the model before, each `label=folder`, one for each text: the folder that holds
    `shard_0.meta` (dictionary_learning) or `state.json` (SAELens)."""
    chat: tuple[str, ...] = ()
    """Caches of the model after, on the same tokens, with the same labels; without it the store has one
    source."""
    base_model: str | None = None
    """What to record as the model before, such as its Hub id; by default what the cache calls it."""
    chat_model: str | None = None
    """The same for the model after."""
    tokenizer: str | None = None
    """Model whose tokenizer the tokens are of, to show text; without it token ids are shown."""

    def texts(self) -> dict[str, dict[str, Path]]:
        """Return the folders by label and source.

        Raises:
            ValueError: if a cache has no label, a label comes twice, or base and chat have others.
        """
        sources = {"base": _by_label(self.base)}
        if self.chat:
            sources["chat"] = _by_label(self.chat)
            if sources["chat"].keys() != sources["base"].keys():
                raise ValueError(
                    f"base has the labels {list(sources['base'])}, chat {list(sources['chat'])}: give each "
                    "text a cache of both"
                )
        return {label: {name: sources[name][label] for name in sources} for label in sources["base"]}

    def models(self) -> dict[str, str]:
        """Return the models that were named, by source."""
        named = {"base": self.base_model, "chat": self.chat_model}
        return {name: model for name, model in named.items() if model is not None}


def _by_label(caches: tuple[str, ...]) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for cache in caches:
        label, equals, folder = cache.partition("=")
        if not (label and equals and folder):
            raise ValueError(
                f"cache {cache!r} must be label=folder, such as web=caches/base/web/layer_13_out"
            )
        if label in folders:
            raise ValueError(f"label {label!r} comes twice: every text needs its own")
        folders[label] = Path(folder)
    return folders


@dataclasses.dataclass(frozen=True)
class Encode:
    """Encode an array of raw activations with any crosscoder, of this package or another library."""

    crosscoder: Path
    """Folder or file of any known format, or a Hub repository `owner/name`."""
    acts: Path
    """A .npy file of raw activations, [token, source, width] where all sources have one width, or
    [token, summed width] with the sources one after the other."""
    output: Path
    """The .npz file to write: indices and values of the active latents, [token, k], or [token, source, k]
    where each source has a code of its own, filled up with -1 and 0; recon, [token, summed width], in raw
    activation units. Its folder is made if missing."""
    batch_size: int = 1024
    """Tokens encoded at once."""


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a crosscoder of any known format in another one."""

    crosscoder: Path
    """Folder or file of any known format, or a Hub repository `owner/name`."""
    output: Path
    """The folder to write; made if missing, and refused if it holds anything."""
    format: Literal[
        "crosscoder_jax",
        "dictionary_learning",
        "dictionary_learning_pt",
        "kissane",
        "openmoss",
        "crosscode",
        "dfc",
        "saelens",
        "sparsify",
    ] = "crosscoder_jax"
    """What to write; another library's cannot hold every crosscoder."""
    source_names: tuple[str, ...] = ()
    """What the sources are called, for files that do not tell; `base chat` by default where there are two."""
    scales: tuple[float, ...] = ()
    """What each source's raw activations are multiplied by, for files that do not tell."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Write one self-contained HTML page about one or several diffed runs."""

    content: ReportConfig
    """Which runs, and how much of each."""
    output: Path = Path("report.html")
    """The file to write."""
