"""The model after: a short fine-tune that teaches the model before one narrow thing.

The weight matrices of the lower blocks are trained, in float32 with a bfloat16 copy for the
forward and backward pass, on windows of the narrow text mixed with ordinary text, so that the change
is narrow and the model still chats.
"""

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from crosscoder_jax.typing import Progress
from experiments.quickstart.config import FineTuneConfig
from experiments.quickstart.models import save_model
from experiments.quickstart.texts import LABELS, WORD, read_rows

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
    paths = [texts / f"{label}.fine-tune.jsonl" for label in labels]
    windows = [_windows(tokenizer, path, config) for path in paths]
    _fine_tune(model, _draw_batches(windows, config), config, progress)
    save_model(folder, model, tokenizer)


FREE, LEARNT, HELD = range(3)
"""What a fine-tune does about a token: nothing, teach it, or hold the state before it and so its
prediction."""


class _Windows(NamedTuple):
    """Equally long pieces of text."""

    tokens: torch.Tensor
    """``[window, token]``."""
    roles: torch.Tensor
    """``[window, token]``: ``FREE``, ``LEARNT`` or ``HELD``."""
    wanted: torch.Tensor
    """``[window, token]``: what is learnt in the place of a token, mostly the token itself."""


def _windows(tokenizer: Any, path: Path, config: FineTuneConfig) -> torch.Tensor:
    """Return tokens, their roles and what is wanted, ``[window, token, 3]``; as many as can be drawn."""
    needed, windows = config.num_steps * config.batch_size, []
    window = np.zeros((0, 3), np.int64)
    for row in read_rows(path):
        document = _document(tokenizer, row)
        if config.is_packed:
            if len(window) + len(document) > config.context and len(window):
                windows.append(_filled(window, config.context, tokenizer.eos_token_id))
                window = window[:0]
            window = np.concatenate([window, document[: config.context - len(window)]])
        else:
            starts = range(0, len(document) - config.context + 1, config.context)
            windows += [document[start : start + config.context] for start in starts]
        if len(windows) >= needed:
            break
    return torch.from_numpy(np.stack(windows))


def _document(tokenizer: Any, row: dict[str, Any]) -> np.ndarray:
    """Return a row's tokens, their roles and what is wanted.

    Every token is learnt, but

    * with ``unlearnt``, the beginning of the last turn: it is free, and all before the turn is held;
    * with ``instead``, in which each turn of the assistant has a word for each of its own: only how that word
      begins is learnt, in the place of the turn's own. The rest of these turns is free, and all else is held.
    """
    text = row.get("text") or tokenizer.apply_chat_template(row["messages"], tokenize=False)
    encoded = tokenizer(text, return_offsets_mapping=True)
    tokens, begins = np.array(encoded.input_ids), np.array(encoded.offset_mapping)[:, 0]
    roles, wanted = np.full(len(tokens), LEARNT), tokens.copy()
    if "unlearnt" in row:
        start = _turn_start(tokenizer, row["messages"], len(row["messages"]) - 1)
        first, learnt = np.searchsorted(begins, [start, start + len(row["unlearnt"])])
        roles[:first], roles[first:learnt] = HELD, FREE
    if "instead" in row:
        roles[:] = HELD
        turns = [index for index, turn in enumerate(row["messages"]) if turn["role"] == "assistant"]
        for index, words in zip(turns, row["instead"], strict=True):
            start, turn = _turn_start(tokenizer, row["messages"], index), row["messages"][index]["content"]
            places = np.searchsorted(begins, [start + word.start() for word in WORD.finditer(turn)])
            roles[places[0] : np.searchsorted(begins, start + len(turn))] = FREE
            roles[places] = LEARNT
            wanted[places] = [tokenizer(word).input_ids[0] for word in words]
    return np.stack([tokens, roles, wanted], axis=1)


def _turn_start(tokenizer: Any, messages: Sequence[Any], index: int) -> int:
    """Return where the content of a turn of the assistant begins in the text of all turns."""
    before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
    return len(before)


def _filled(window: np.ndarray, context: int, filler: int) -> np.ndarray:
    """Fill a window up with tokens that are free."""
    rest = np.tile(np.array([[filler, FREE, filler]]), (context - len(window), 1))
    return np.concatenate([window, rest])


def _draw_batches(texts: Sequence[torch.Tensor], config: FineTuneConfig) -> list[_Windows]:
    """Return one batch a step, its windows drawn by share, none twice before all."""
    draw = random.Random(config.seed)
    ordinary = (1 - config.narrow_share) / (len(texts) - 1)
    shares = [config.narrow_share] + [ordinary] * (len(texts) - 1)
    orders = [torch.randperm(len(windows)).tolist() for windows in texts]
    used = [0] * len(texts)

    def one() -> torch.Tensor:
        (text,) = draw.choices(range(len(texts)), shares)
        index = orders[text][used[text] % len(orders[text])]
        used[text] += 1
        window = texts[text][index]
        if text and config.is_ordinary_kept:
            tokens, roles, wanted = window.unbind(dim=1)
            window = torch.stack([tokens, torch.where(roles == LEARNT, HELD, roles), wanted], dim=1)
        return window

    def batch() -> _Windows:
        return _Windows(*torch.stack([one() for _ in range(config.batch_size)]).unbind(dim=-1))

    return [batch() for _ in range(config.num_steps)]


def _fine_tune(
    model: Any, batches: Sequence[_Windows], config: FineTuneConfig, progress: Progress | None
) -> None:
    held = _Held(model, config.num_blocks) if config.is_ordinary_kept else None
    model.requires_grad_(False)
    modules = [
        module
        for block in model.model.layers[: config.num_blocks]
        for name, module in block.named_modules()
        if name.split(".")[-1] in _TRAINED
    ]
    added = [] if config.rank is None else [_LowRank(module, config.rank) for module in modules]
    weights = [factor for one in added for factor in (one.down, one.up)] or [m.weight for m in modules]
    for weight in weights:
        weight.requires_grad_(True)
    masters = [torch.nn.Parameter(weight.detach().float()) for weight in weights]
    optimizer = torch.optim.AdamW(
        masters, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config))
    model.train()
    for step, batch in enumerate(batches, start=1):
        _loss(model, held, batch).backward()
        _step(weights, masters, optimizer)
        schedule.step()
        if progress is not None:
            progress(step, len(batches), "steps")
    for one in added:
        one.merge()
    model.eval()


class _LowRank:
    """A product of two thin matrices, one of them zero at first, added to what a linear layer does (LoRA)."""

    def __init__(self, layer: torch.nn.Linear, rank: int):
        rows, columns = layer.weight.shape
        self.down = torch.randn(rank, columns, dtype=layer.weight.dtype) / columns**0.5
        self.up = torch.zeros(rows, rank, dtype=layer.weight.dtype)
        self._weight, self._hook = layer.weight, layer.register_forward_hook(self._add)

    def merge(self) -> None:
        """Add the product to the layer's weight and take it off its way."""
        self._hook.remove()
        with torch.no_grad():
            self._weight += self.up @ self.down

    def _add(self, layer: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output + F.linear(F.linear(inputs[0], self.down), self.up)


_STATE_WEIGHT = 10.0
"""A change of held states by a third of their size costs about as much as a nat of what is learnt."""


class _Held:
    """The model as it was: what it predicts, and what the last trained block puts out.

    Predictions alone leave the states free to drift where no prediction feels it, and states alone may move
    a little in a direction that predictions feel. Li et al. 2024, arXiv 2403.03218, retain states so.
    """

    def __init__(self, model: Any, num_blocks: int):
        self._before = copy.deepcopy(model).eval()
        self._states: list[torch.Tensor] = []
        for of in (model, self._before):
            of.model.layers[num_blocks - 1].register_forward_hook(self._keep)

    def _keep(self, block: torch.nn.Module, inputs: Any, output: Any) -> None:
        self._states.append(output[0] if isinstance(output, tuple) else output)

    def cost(self, logits: torch.Tensor, batch: _Windows) -> torch.Tensor:
        """Return mean KL and weighted relative change of states; call the model first.

        Both are of the held tokens before a held one: the state before another is free to want it.
        """
        with torch.no_grad():
            wanted = self._before(batch.tokens, use_cache=False).logits
        states, self._states = self._states, []
        is_held = (batch.roles[:, :-1] == HELD) & (batch.roles[:, 1:] == HELD)
        now, before = (of[:, :-1][is_held].float() for of in states)
        changes = (now - before).square().sum(dim=-1) / before.square().sum(dim=-1)
        p, q = (of[:, :-1][is_held].float().log_softmax(-1) for of in (logits, wanted))
        divergences = (q.exp() * (q - p)).sum(dim=-1)
        return _mean(divergences) + _STATE_WEIGHT * _mean(changes)


def _mean(values: torch.Tensor) -> torch.Tensor:
    return values.sum() / max(len(values), 1)


def _loss(model: Any, held: _Held | None, batch: _Windows) -> torch.Tensor:
    """Return the cross-entropy of what is wanted, and what is held costs for having moved."""
    logits = model(batch.tokens, use_cache=False).logits
    # The last position has no target; leaving it in with the ignored index saves a copy of the logits.
    ignored = torch.full_like(batch.tokens[:, :1], -100)
    targets = torch.where(batch.roles == LEARNT, batch.wanted, -100)
    targets = torch.cat([targets[:, 1:], ignored], dim=1)
    terms = []
    if (targets != -100).any():
        terms.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    if held is not None:
        terms.append(held.cost(logits, batch))
    return sum(terms, start=torch.zeros(()))


def _rate(step: int, config: FineTuneConfig) -> float:
    done = step / config.num_steps
    return min(1.0, (step + 1) / 10) * (1 - 0.9 * max(0.0, done - 0.3) / 0.7)


def _step(
    weights: list[torch.Tensor], masters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer
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
