"""What the quickstart runs, and where it keeps what it made."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from crosscoder_jax.commands import Train
from crosscoder_jax.configs import config_to_json


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """Fine-tune a small model on Pig Latin and show what changed inside it.

    Every finished stage is kept, so running the same command again is quick.
    """

    output: Path = Path("results/quickstart")
    """Where models, activations, runs and the report are kept."""
    base: str | None = None
    """Another model before: a hub id or a folder; the packaged SmolLM2-135M-Instruct by default."""
    chat: str | None = None
    """Another model after, with the same tokenizer; a fine-tune of SmolLM2 made on the spot by default."""
    layer: int | None = None
    """Block whose output is compared; the last one that the fine-tune changes (14) by default, the middle
    one of other models."""
    tokens: int = 150_000
    """Tokens to harvest, over all texts."""
    fine_tune_steps: int = 90
    """Steps of the fine-tune."""
    num_latents: int = 2048
    """Latents of the crosscoder; the difference SAE has half as many."""
    k: float = 32
    """Mean active latents per token of the crosscoder; the difference SAE has half as many."""
    num_steps: int = 1000
    """Training steps of the crosscoder; the difference SAE takes half as many."""
    compare_l1: bool = False
    """Also train an L1 crosscoder on the same batches."""
    l1: float = 0.07
    """Weight of its penalty; with the default settings its L0 is about that of the crosscoder."""
    seed: int = 0
    """Of everything random."""

    def __post_init__(self) -> None:
        if self.chat is not None and self.base is None:
            raise ValueError(f"chat={self.chat!r} needs base: name the model before, too")

    @property
    def folder(self) -> Path:
        """Where the store, the runs and the report of exactly these settings are kept."""
        settings = config_to_json(self)
        for name in ("output", "compare_l1", "l1"):  # these add to a folder and change nothing in it
            del settings[name]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return self.output / digest[:8]


@dataclasses.dataclass(frozen=True)
class FineTuneConfig:
    """How the model after is made."""

    num_steps: int = 90
    """Optimiser steps."""
    batch_size: int = 8
    """Windows per step."""
    context: int = 128
    """Tokens per window."""
    learning_rate: float = 1.2e-3
    """Peak rate of AdamW; warmed up over 10 steps, then falling to a tenth."""
    narrow_share: float = 0.5
    """Share of the windows that are of the narrow text; the others are split evenly."""
    num_blocks: int = 15
    """Lowest blocks that are trained: those below the layer that is compared."""
    rank: int | None = None
    """Rank of what is added to each weight matrix (LoRA); ``None`` trains the matrices themselves."""
    is_packed: bool = False
    """Fill windows with whole documents; otherwise a window is of one, and short ones are left out."""
    is_ordinary_kept: bool = False
    """Hold predictions (KL) and the states of the last trained block where they were, on ordinary windows and
    on the turns before an answer that breaks off; otherwise ordinary text is learnt, too."""
    seed: int = 0
    """Of the order of the windows."""


def runs_to_show(config: Quickstart, made: Sequence[Train]) -> tuple[Path, ...]:
    """Return the folders of the runs just made, and then of L1 runs that an earlier call left beside them.

    They were trained on the same store, so a call without ``compare_l1`` is no reason to leave them out.
    """
    folders = [command.output for command in made]
    earlier = sorted(config.folder.glob("l1-crosscoder-*/diff/summary.json"))
    return tuple(dict.fromkeys(folders + [path.parent.parent for path in earlier]))


def crosscoder_command(config: Quickstart) -> Train:
    """Return the BatchTopK crosscoder: a recipe for few tokens on a small machine.

    The published learning rate and warm-up belong to 100,000 steps; a thousand steps need a higher rate.
    Decoders start small, so that a latent's share in each model is grown and not left over from
    the start; the effect of this alone has not been measured.
    """
    return Train(
        store=config.folder / "store",
        output=config.folder / "crosscoder",
        num_latents=config.num_latents,
        k=config.k,
        num_steps=config.num_steps,
        batch_size=1024,
        learning_rate=2e-3,
        warmup_steps=config.num_steps // 20,
        decoder_norm=0.2,
        loss="mean-squared",
        dead_after_tokens=50_000,
        seed=config.seed,
    )


def difference_command(config: Quickstart) -> Train:
    """Return the difference SAE on the same tokens."""
    return dataclasses.replace(
        crosscoder_command(config),
        output=config.folder / "difference-sae",
        reads="difference",
        num_latents=config.num_latents // 2,
        k=config.k / 2,
        num_steps=config.num_steps // 2,
        warmup_steps=config.num_steps // 40,
    )


def l1_command(config: Quickstart) -> Train:
    """Return the L1 crosscoder on the same batches as the BatchTopK one, without AuxK as published."""
    return dataclasses.replace(
        crosscoder_command(config),
        output=config.folder / f"l1-crosscoder-{config.l1:g}",
        l1=config.l1,
        loss="norm",
        aux_k_weight=0,
    )
