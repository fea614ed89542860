"""Both models on the same tokens, one after the other in each batch, into one activation store."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers

from crosscoder_jax.activations.manifest import Manifest, StoredSource
from crosscoder_jax.activations.writer import StoreWriter
from crosscoder_jax.language_models.batches import Kept, OutlierLimits, kept_rows, pad_windows
from crosscoder_jax.language_models.capture import capture_residuals, check_capture, check_layers, hook_point
from crosscoder_jax.language_models.config import HarvestConfig
from crosscoder_jax.language_models.documents import Encoder, WindowStream
from crosscoder_jax.language_models.loading import (
    ModelFacts,
    default_device,
    load_model,
    load_tokenizer,
    read_facts,
)
from crosscoder_jax.language_models.rows import text_fingerprint
from crosscoder_jax.language_models.tokenizers import PROBES, check_tokenizers_agree
from crosscoder_jax.language_models.vocabulary import vocabulary_bytes
from crosscoder_jax.typing import Progress

CALIBRATION_TOKENS = 2_048
"""Tokens from the beginning of the texts over which the median norms of the outlier filter are taken."""

_NOT_IN_FINGERPRINT = ("store", "device", "checkpoint_tokens", "base_revision", "chat_revision")
"""Settings that may differ between two runs that write the same store."""


def harvest(config: HarvestConfig, progress: Progress | None = None) -> Manifest:
    """Store paired activations of two models on the same tokens.

    An unfinished store of the same config is completed from its last checkpoint, a finished one is returned
    as it is without loading a model. The finished store does not depend on where it was interrupted.

    Args:
        config: Models, layers, texts and what is kept.
        progress: Told the ``models`` loaded, then the ``tokens`` kept so far; the total falls to what there
            is when the texts end first.

    Returns:
        The manifest of the finished store.

    Raises:
        ValueError: when a model, layer or text does not exist, the tokenizers disagree, the texts hold no
            token to keep, the store was written by another config or is being written, a model gives NaN
            (naming source, document and position), or the disk is full; the store can be completed later.
    """
    plan = _plan(config)
    writer = StoreWriter.create_or_resume(
        Path(config.store),
        sources=[source.stored for source in plan.sources],
        dtype=config.dtype,
        labels=[text.label for text in config.texts],
        config=_fingerprint(config, plan),
    )
    with writer, _bars_off():
        return writer.manifest if writer.is_finished else _Harvest(config, plan, writer, progress).run()


@dataclasses.dataclass(frozen=True)
class _PlannedSource:
    """One stored source and where it is read."""

    stored: StoredSource
    model: str
    layer: int


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The stored sources in order, and the facts of the two models."""

    sources: tuple[_PlannedSource, ...]
    facts: dict[str, ModelFacts]

    def layers(self, model: str) -> list[int]:
        return [source.layer for source in self.sources if source.model == model]


def _plan(config: HarvestConfig) -> _Plan:
    """Resolve models and layers into the list of stored sources, all layers of base first."""
    facts = {"base": read_facts(config.base_reference), "chat": read_facts(config.chat_reference)}
    for model, found in facts.items():
        if found.max_positions is not None and config.context > found.max_positions:
            raise ValueError(
                f"context={config.context} is longer than {model} can read: "
                f"take {found.max_positions} or less"
            )
    layers = config.layers if config.layers is not None else (facts["base"].num_blocks // 2,)
    default = layers if config.layers is not None else (facts["chat"].num_blocks // 2,)
    by_model = {"base": layers, "chat": config.chat_layers or default}
    sources = []
    for model, chosen in by_model.items():
        check_layers(chosen, facts[model].num_blocks, f"{model} ({facts[model].reference})")
        sources += [_planned(model, facts[model], layer, is_single=len(chosen) == 1) for layer in chosen]
    return _Plan(tuple(sources), facts)


def _planned(model: str, facts: ModelFacts, layer: int, *, is_single: bool) -> _PlannedSource:
    reference = dataclasses.replace(facts.reference, revision=None)
    stored = StoredSource(
        name=model if is_single else f"{model}.L{layer}",
        width=facts.width,
        model=str(reference),
        revision=facts.revision,
        hook_point=hook_point(layer),
    )
    return _PlannedSource(stored, model, layer)


def _fingerprint(config: HarvestConfig, plan: _Plan) -> dict[str, Any]:
    """What must be equal for a store to be completed: the config, the exact models and the exact texts."""
    fields = _without(dataclasses.asdict(config), *_NOT_IN_FINGERPRINT)
    for text, source in zip(fields["texts"], config.texts, strict=True):
        text["content"] = text_fingerprint(source)
    if config.chat_template is not None:
        fields["chat_template"] = _sha256(_read_template(config.chat_template))
    fields["revisions"] = {name: facts.revision for name, facts in plan.facts.items()}
    fields["layers"], fields["chat_layers"] = plan.layers("base"), plan.layers("chat")
    return fields


class _Harvest:
    """The run: models and texts opened at the writer's cursor, batch after batch until enough is kept."""

    def __init__(self, config: HarvestConfig, plan: _Plan, writer: StoreWriter, progress: Progress | None):
        self.config, self.plan, self.writer, self.progress = config, plan, writer, progress
        self.device = config.device or default_device()
        self.tokenizer, self.template = _load_tokenizers(config, plan)
        self.models = _load_models(config, plan, self.device, progress)
        state = writer.cursor or {"texts": None, "kept": 0, "outliers": 0, "limits": None}
        self.kept, self.outliers = state["kept"], state["outliers"]
        self.limits: OutlierLimits | None = state["limits"]
        self.stream = self._open_stream(state["texts"])

    def _open_stream(self, cursor: dict[str, Any] | None) -> WindowStream:
        return WindowStream(
            self.config.texts,
            Encoder(self.tokenizer, self.template),
            context=self.config.context,
            is_split=self.config.is_split,
            skip_positions=self.config.skip_positions,
            shuffle_seed=self.config.shuffle_seed,
            cursor=cursor,
        )

    def run(self) -> Manifest:
        """Append batches and checkpoints until ``max_tokens`` are kept or the texts end."""
        if self.config.outlier_multiple is not None and self.limits is None:
            self.limits = self._calibrate(self.config.outlier_multiple)
        total, checkpointed = self.config.max_tokens, self.kept
        for batch in self._batches(self.stream):
            self._append(batch)
            self._report(total)
            if self.kept >= total:
                break
            if self.kept - checkpointed >= self.config.checkpoint_tokens:
                self.writer.checkpoint(self._state())
                checkpointed = self.kept
        if not self.kept:
            raise ValueError(self._nothing_kept())
        if self.kept < total:
            self._report(self.kept)
        return self.writer.finish(provenance=self._provenance(), vocabulary=vocabulary_bytes(self.tokenizer))

    def _report(self, total: int) -> None:
        if self.progress is not None:
            self.progress(self.kept, total, "tokens")

    def _batches(self, stream: WindowStream) -> Iterator[Kept]:
        """Run both models on one batch after the other; rows of padding and first positions are gone."""
        pad = _padding_token(self.tokenizer)
        while windows := stream.take(self.config.batch_size):
            ids, mask = pad_windows(windows, self.config.batch_size, self.config.context, pad)
            self._check_ids(ids)
            acts = self._capture(ids, mask)
            yield kept_rows(acts, windows, self.config.skip_positions)

    def _capture(self, ids: np.ndarray, mask: np.ndarray) -> dict[str, torch.Tensor]:
        """Residuals ``[batch, context, width]`` by source name; both models read the same padded batch."""
        input_ids, attention_mask = (torch.from_numpy(array).to(self.device) for array in (ids, mask))
        acts: dict[str, torch.Tensor] = {}
        for name, model in self.models.items():
            residuals = capture_residuals(model, input_ids, attention_mask, self.plan.layers(name))
            acts |= {s.stored.name: residuals[s.layer] for s in self.plan.sources if s.model == name}
        return acts

    def _check_ids(self, ids: np.ndarray) -> None:
        for name, model in self.models.items():
            known = model.get_input_embeddings().num_embeddings
            if ids.max() >= known:
                raise ValueError(
                    f"token {ids.max()} ({self.tokenizer.convert_ids_to_tokens(int(ids.max()))!r}) has no "
                    f"embedding in {name} ({self.plan.facts[name].reference}), which has {known}: "
                    f"its weights do not belong to its tokenizer"
                )

    def _calibrate(self, multiple: float) -> OutlierLimits:
        """Norms above which a token is an outlier, from the first tokens of the texts, read apart."""
        stream, seen, norms = self._open_stream(None), 0, []
        for batch in self._batches(stream):
            norms.append(batch.norms())
            seen += batch.num_tokens
            if seen >= CALIBRATION_TOKENS:
                break
        names = norms[0] if norms else {}
        return {name: multiple * float(np.median(np.concatenate([n[name] for n in norms]))) for name in names}

    def _append(self, batch: Kept) -> None:
        if self.limits is not None:
            within = batch.within(self.limits)
            self.outliers += batch.num_tokens - within.num_tokens
            batch = within
        batch = batch.first(self.config.max_tokens - self.kept)
        if batch.num_tokens:
            self.writer.append(
                batch.acts,
                tokens=batch.tokens,
                documents=batch.documents,
                positions=batch.positions,
                labels=batch.labels,
            )
        self.kept += batch.num_tokens

    def _state(self) -> dict[str, Any]:
        return {
            "texts": self.stream.cursor,
            "kept": self.kept,
            "outliers": self.outliers,
            "limits": self.limits,
        }

    def _nothing_kept(self) -> str:
        cursor = self.stream.cursor
        refusal = f"; {self.stream.first_refusal}" if self.stream.first_refusal else ""
        return (
            f"the texts {', '.join(text.label for text in self.config.texts)} hold no token to keep: "
            f"{sum(cursor['rows'])} rows read, {sum(cursor['empty'])} of them with no more than "
            f"skip_positions={self.config.skip_positions} tokens, {sum(cursor['unusable'])} refused by the "
            f"chat template{refusal}"
        )

    def _provenance(self) -> dict[str, Any]:
        """Everything needed to know how the store came about."""
        cursor, labels = self.stream.cursor, [text.label for text in self.config.texts]
        per_text = {
            name: dict(zip(labels, cursor[name], strict=True)) for name in ("rows", "empty", "unusable")
        }
        return {
            "writer": "crosscoder_jax harvest",
            "config": _without(dataclasses.asdict(self.config), "store"),
            "models": {name: _describe(facts) for name, facts in self.plan.facts.items()},
            "hook_points": {source.stored.name: source.stored.hook_point for source in self.plan.sources},
            "model_dtype": self.config.model_dtype,
            "device": self.device,
            "chat_template": None if self.template is None else _sha256(self.template),
            "texts": {**per_text, "ended": self.stream.ended},
            "outliers": {
                "multiple": self.config.outlier_multiple,
                "norm_limits": self.limits,
                "dropped": self.outliers,
            },
            "versions": {lib.__name__: str(lib.__version__) for lib in (transformers, torch, datasets)},
        }


def _without(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def _describe(facts: ModelFacts) -> dict[str, Any]:
    return {
        "model": str(facts.reference),
        "revision": facts.revision,
        "blocks": facts.num_blocks,
        "width": facts.width,
    }


def _load_tokenizers(config: HarvestConfig, plan: _Plan) -> tuple[Any, str | None]:
    """Load the shared tokenizer and the template, having checked that both models' tokenizers agree."""
    base, chat = (load_tokenizer(plan.facts[name].pinned()) for name in ("base", "chat"))
    template = chat.chat_template or base.chat_template
    if config.chat_template is not None:
        template = _read_template(config.chat_template)
    elif isinstance(template, Mapping):
        template = template.get("default")
    check_tokenizers_agree(base, chat, PROBES)
    return chat, template


def _load_models(
    config: HarvestConfig, plan: _Plan, device: str, progress: Progress | None
) -> dict[str, Any]:
    """Load both models, one only where they are the same, and check that their layers can be read."""
    models: dict[str, Any] = {}
    for name, facts in plan.facts.items():
        if progress is not None:
            progress(len(models), len(plan.facts), "models")
        is_same = name == "chat" and facts == plan.facts["base"]
        model = models["base"] if is_same else load_model(facts, dtype=config.model_dtype, device=device)
        check_capture(model, plan.layers(name))
        models[name] = model
    if progress is not None:
        progress(len(models), len(models), "models")
    return models


def _padding_token(tokenizer: Any) -> int:
    """Any valid id: padding is masked and its activations are dropped."""
    candidates: Sequence[int | None] = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((index for index in candidates if index is not None), 0)


def _read_template(path: str) -> str:
    if not Path(path).is_file():
        raise ValueError(f"chat_template={path}: there is no such file")
    return Path(path).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


@contextlib.contextmanager
def _bars_off() -> Iterator[None]:
    """Keep ``datasets`` from drawing bars: progress is the caller's to show."""
    had_bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            datasets.utils.logging.enable_progress_bar()
