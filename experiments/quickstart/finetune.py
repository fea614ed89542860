"""The model after: a short fine-tune that teaches the model before to read and write Pig Latin.

All weight matrices of the lower blocks are trained, in float32 with a bfloat16 copy for the
forward and backward pass, on windows of Pig Latin mixed with ordinary text, so that the change is
narrow and the model still chats.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, AutoTokenizer

from crosscoder_jax.typing import Progress
from experiments.quickstart.config import FineTuneConfig
from experiments.quickstart.models import save_model
from experiments.quickstart.texts import LABELS, read_rows

_TRAINED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_after_model(
    folder: Path,
    before: Path,
    texts: Path,
    config: FineTuneConfig,
    progress: Progress | None = None,
    *,
    labels: Sequence[str] = LABELS,
) -> None:
    """Fine-tune the model in ``before``; a folder already there is kept.

    Args:
        folder: where to.
        before: folder of the model to start from.
        texts: folder with ``<label>.fine-tune.jsonl`` files.
        config: the recipe.
        progress: told the steps done.
        labels: of the files, the narrow one first.
    """
    if folder.is_dir():
        return
    torch.manual_seed(config.seed)
    tokenizer = AutoTokenizer.from_pretrained(before)
    # On two CPU cores a step takes about 2.4 s with plain attention and 2.7 s with the fused one.
    model: Any = AutoModelForCausalLM.from_pretrained(
        before, dtype=torch.bfloat16, attn_implementation="eager"
    )
    windows = {label: _windows(tokenizer, texts / f"{label}.fine-tune.jsonl", config) for label in labels}
    _fine_tune(model, _draw_batches(windows, config), config, progress)
    save_model(folder, model, tokenizer)


def _windows(tokenizer: Any, path: Path, config: FineTuneConfig) -> torch.Tensor:
    """Return windows ``[window, token]``, at least as many as can be drawn if the documents suffice."""
    needed, windows, rest = config.num_steps * config.batch_size, [], []
    for row in read_rows(path):
        text = row.get("text") or tokenizer.apply_chat_template(row["messages"], tokenize=False)
        tokens = rest + tokenizer(text).input_ids
        starts = range(0, len(tokens) - config.context + 1, config.context)
        windows += [tokens[start : start + config.context] for start in starts]
        if config.is_packed:
            rest = tokens[len(starts) * config.context :]
        if len(windows) >= needed:
            break
    return torch.tensor(windows)


def _draw_batches(windows: dict[str, torch.Tensor], config: FineTuneConfig) -> list[torch.Tensor]:
    """Return one batch ``[batch, token]`` a step, its windows drawn by share, none twice before all."""
    draw = random.Random(config.seed)
    labels = list(windows)
    ordinary = (1 - config.narrow_share) / (len(labels) - 1)
    shares = [config.narrow_share] + [ordinary] * (len(labels) - 1)
    orders = {label: torch.randperm(len(part)).tolist() for label, part in windows.items()}
    used = dict.fromkeys(labels, 0)

    def one() -> torch.Tensor:
        label = draw.choices(labels, shares)[0]
        index = orders[label][used[label] % len(orders[label])]
        used[label] += 1
        return windows[label][index]

    return [torch.stack([one() for _ in range(config.batch_size)]) for _ in range(config.num_steps)]


def _fine_tune(
    model: Any, batches: Sequence[torch.Tensor], config: FineTuneConfig, progress: Progress | None
) -> None:
    model.requires_grad_(False)
    modules = [
        module
        for block in model.model.layers[: config.num_blocks]
        for name, module in block.named_modules()
        if name.split(".")[-1] in _TRAINED
    ]
    if config.rank is not None:
        for module in modules:
            parametrize.register_parametrization(module, "weight", _LowRank(module.weight, config.rank))
        weights = [factor for module in modules for factor in module.parametrizations.weight[0].parameters()]
    else:
        weights = [module.weight for module in modules]
    for weight in weights:
        weight.requires_grad_(True)
    masters = [torch.nn.Parameter(weight.detach().float()) for weight in weights]
    optimizer = torch.optim.AdamW(
        masters, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config))
    model.train()
    for step, batch in enumerate(batches, start=1):
        _next_token_loss(model, batch).backward()
        _step(weights, masters, optimizer)
        schedule.step()
        if progress is not None:
            progress(step, len(batches), "steps")
    if config.rank is not None:
        for module in modules:
            parametrize.remove_parametrizations(module, "weight")
    model.eval()


class _LowRank(torch.nn.Module):
    """A weight matrix with a product of two thin ones added, of which one begins at zero (LoRA)."""

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        rows, columns = weight.shape
        self.down = torch.nn.Parameter(torch.randn(rank, columns, dtype=weight.dtype) / columns**0.5)
        self.up = torch.nn.Parameter(torch.zeros(rows, rank, dtype=weight.dtype))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down


def _next_token_loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    # The last position has no target; leaving it in with the ignored index saves a copy of the logits.
    ignored = torch.full_like(batch[:, :1], -100)
    targets = torch.cat([batch[:, 1:], ignored], dim=1)
    return F.cross_entropy(model(batch, use_cache=False).logits.flatten(0, 1), targets.flatten())


def _rate(step: int, config: FineTuneConfig) -> float:
    done = step / config.num_steps
    return min(1.0, (step + 1) / 10) * (1 - 0.9 * max(0.0, done - 0.3) / 0.7)


def _step(
    weights: list[torch.nn.Parameter], masters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Update the float32 weights from the bfloat16 gradients and copy them back."""
    for weight, master in zip(weights, masters, strict=True):
        master.grad = None if weight.grad is None else weight.grad.float()
        weight.grad = None
    torch.nn.utils.clip_grad_norm_(masters, 1.0)
    optimizer.step()
    with torch.no_grad():
        for weight, master in zip(weights, masters, strict=True):
            weight.copy_(master)
