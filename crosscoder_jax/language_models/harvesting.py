"""Both models on the same tokens, one after the other in each batch, into one activation store."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from crosscoder_jax.activations.manifest import Manifest
from crosscoder_jax.activations.writer import StoreWriter
from crosscoder_jax.language_models.batches import Kept, OutlierLimits
from crosscoder_jax.language_models.config import HarvestConfig
from crosscoder_jax.language_models.harvested import WRITER
from crosscoder_jax.language_models.loading import ModelFacts
from crosscoder_jax.language_models.pair import ModelPair
from crosscoder_jax.language_models.plan import Plan, fingerprint, plan_harvest, sha256_of_text
from crosscoder_jax.language_models.rows import bars_off
from crosscoder_jax.language_models.vocabulary import vocabulary_bytes
from crosscoder_jax.typing import Progress


def harvest(
    config: HarvestConfig,
    progress: Progress | None = None,
    *,
    on_accepted: Callable[[], None] = lambda: None,
) -> Manifest:
    """Store paired activations of two models on the same tokens.

    An unfinished store of the same config is completed from its last checkpoint, a finished one is returned
    as it is without loading a model. The finished store does not depend on where it was interrupted. Nothing
    is created before models, tokenizers and texts have been found to be usable.

    Args:
        config: Models, layers, texts and what is kept.
        progress: Told the ``models`` loaded, then the ``tokens`` kept so far; the total falls to what there
            is when the texts end first.
        on_accepted: Called when models, texts and store have been found to fit, before the first token is
            stored; not for a store that is finished.

    Returns:
        The manifest of the finished store.

    Raises:
        ValueError: when a model, layer or text does not exist, the tokenizers disagree, the texts hold no
            token to keep, the store was written by another config or is being written, a model gives NaN
            (naming source, document and position), or the disk is full; the store can be completed later.
    """
    plan = plan_harvest(config)
    settings = fingerprint(config, plan)
    folder = Path(config.store)
    with contextlib.ExitStack() as stack:
        stack.enter_context(bars_off())
        writer = None
        if folder.is_dir() and any(folder.iterdir()):
            writer = stack.enter_context(_open_writer(config, plan, settings))
            if writer.is_finished:
                return writer.manifest
        pair = ModelPair(config, plan, progress)
        pair.check_texts()
        if writer is None:
            writer = stack.enter_context(_open_writer(config, plan, settings))
        on_accepted()
        return _Run(config, pair, writer, progress).finish(plan)


def _open_writer(config: HarvestConfig, plan: Plan, settings: dict[str, Any]) -> StoreWriter:
    return StoreWriter.create_or_resume(
        config.store,
        sources=[source.stored for source in plan.sources],
        dtype=config.dtype,
        labels=[text.label for text in config.texts],
        config=settings,
    )


class _Run:
    """Batch after batch from the writer's cursor on, until enough is kept."""

    def __init__(
        self, config: HarvestConfig, pair: ModelPair, writer: StoreWriter, progress: Progress | None
    ):
        self.config, self.pair, self.writer, self.progress = config, pair, writer, progress
        state = writer.cursor or {"texts": None, "kept": 0, "outliers": 0, "limits": None}
        self.kept, self.outliers = state["kept"], state["outliers"]
        self.limits: OutlierLimits | None = state["limits"]
        self.stream = pair.open_stream(state["texts"])

    def finish(self, plan: Plan) -> Manifest:
        """Append batches until ``max_tokens`` are kept or the texts end, and finish the store."""
        if self.config.outlier_multiple is not None and self.limits is None:
            self.limits = self.pair.calibrate(self.config.outlier_multiple)
        total, checkpointed = self.config.max_tokens, self.kept
        for batch in self.pair.batches(self.stream):
            self._append(batch)
            self._report(total)
            if self.kept >= total:
                break
            if self.kept - checkpointed >= self.config.checkpoint_tokens:
                self.writer.checkpoint(self._state())
                checkpointed = self.kept
        if self.kept < total:
            self._report(self.kept)
        vocabulary = vocabulary_bytes(self.pair.tokenizer)
        return self.writer.finish(provenance=self._provenance(plan), vocabulary=vocabulary)

    def _report(self, total: int) -> None:
        if self.progress is not None:
            self.progress(self.kept, total, "tokens")

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

    def _provenance(self, plan: Plan) -> dict[str, Any]:
        """Everything needed to know how the store came about."""
        fields = dataclasses.asdict(self.config)
        del fields["store"]
        template = self.pair.template
        return {
            "writer": WRITER,
            "config": fields,
            "models": {name: _describe(facts) for name, facts in plan.facts.items()},
            "hook_points": {source.stored.name: source.stored.hook_point for source in plan.sources},
            "model_dtype": self.config.model_dtype,
            "device": self.pair.device,
            "chat_template": None if template is None else sha256_of_text(template),
            "texts": self._read_texts(),
            "outliers": {
                "multiple": self.config.outlier_multiple,
                "norm_limits": self.limits,
                "dropped": self.outliers,
            },
            "versions": {lib.__name__: str(lib.__version__) for lib in (transformers, torch, datasets)},
        }

    def _read_texts(self) -> dict[str, Any]:
        """Rows read, passed over as empty, and refused by the template, by label; texts that ended."""
        labels, cursor = [text.label for text in self.config.texts], self.stream.cursor
        names = ("rows", "empty", "unusable")
        counts = {name: dict(zip(labels, cursor[name], strict=True)) for name in names}
        return {**counts, "ended": self.stream.ended}


def _describe(facts: ModelFacts) -> dict[str, Any]:
    return {
        "model": str(facts.reference),
        "revision": facts.revision,
        "blocks": facts.num_blocks,
        "width": facts.width,
    }
