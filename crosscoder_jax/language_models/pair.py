"""Two models or more with one tokenizer, run on the same padded batches."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from crosscoder_jax.language_models.batches import Kept, OutlierLimits, kept_rows, pad_windows
from crosscoder_jax.language_models.capture import capture_residuals, check_capture
from crosscoder_jax.language_models.config import HarvestConfig, TextSource
from crosscoder_jax.language_models.documents import Encoder, Window, WindowStream
from crosscoder_jax.language_models.loading import ModelFacts, load_model, load_tokenizer, usable_device
from crosscoder_jax.language_models.plan import Plan, read_template
from crosscoder_jax.language_models.tokenizers import check_tokenizers_agree
from crosscoder_jax.typing import Progress

CALIBRATION_TOKENS = 2_048
"""Tokens from the beginning of the texts over which the median norms of the outlier filter are taken."""


class ModelPair:
    """The models of a harvest, loaded, and their common tokenizer.

    Args:
        config: Of the harvest.
        plan: Which layers of which models.
        progress: Told the models loaded.
        uses_head: Whether the models' predictions are wanted too.

    Raises:
        ValueError: when the device cannot be used, the tokenizers disagree, a model cannot be loaded or its
            layers cannot be read.
    """

    def __init__(
        self, config: HarvestConfig, plan: Plan, progress: Progress | None = None, *, uses_head: bool = False
    ):
        self._config, self._plan = config, plan
        self.device = usable_device(config.device)
        self.tokenizer, self.template = _load_tokenizers(config, plan)
        self._models = _load_models(config, plan, self.device, progress, uses_head=uses_head)

    def open_stream(
        self, cursor: dict[str, Any] | None = None, texts: Sequence[TextSource] | None = None
    ) -> WindowStream:
        """Begin the texts of the harvest, or some of them, or go on with them at a cursor."""
        return WindowStream(
            self._config.texts if texts is None else texts,
            Encoder(self.tokenizer, self.template),
            context=self._config.context,
            is_split=self._config.is_split,
            skip_positions=self._config.skip_positions,
            shuffle_seed=self._config.shuffle_seed,
            cursor=cursor,
        )

    def check_texts(self) -> None:
        """Read the beginning of every text, before anything is stored.

        Raises:
            ValueError: when one of them cannot be read or encoded, or none holds a token to keep.
        """
        streams = [self.open_stream(texts=[text]) for text in self._config.texts]
        begun = [stream.take(1) for stream in streams]
        if not any(begun):
            raise ValueError(_nothing_to_keep(self._config, streams))

    def batches(self, stream: WindowStream) -> Iterator[Kept]:
        """Run the models on one batch after the other; padding and first positions are left out.

        Raises:
            ValueError: when a text cannot be read further, or holds a token that a model does not know.
        """
        while windows := stream.take(self._config.batch_size):
            yield kept_rows(self.capture(*self.pad(windows)), windows, self._config.skip_positions)

    def pad(
        self, windows: Sequence[Window]
    ) -> tuple[Int[torch.Tensor, "batch context"], Int[torch.Tensor, "batch context"]]:
        """Return token ids and attention mask of the harvest's shape, on the device of the models.

        Raises:
            ValueError: when a sequence holds a token that a model does not know.
        """
        pad = _padding_token(self.tokenizer)
        ids, mask = pad_windows(windows, self._config.batch_size, self._config.context, pad)
        self._check_ids(ids)
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device)

    def calibrate(self, multiple: float) -> OutlierLimits:
        """Find the norms above which a token is an outlier, from the first tokens of the texts.

        Args:
            multiple: Limit in units of the median norm.
        """
        seen, norms = 0, []
        for batch in self.batches(self.open_stream()):
            norms.append(batch.norms())
            seen += batch.num_tokens
            if seen >= CALIBRATION_TOKENS:
                break
        return {
            name: multiple * float(np.median(np.concatenate([of_batch[name] for of_batch in norms])))
            for name in norms[0]
        }

    def model(self, name: str) -> nn.Module:
        """Return the model of a name: ``base``, ``chat`` or one between."""
        return self._models[name]

    def capture(
        self,
        input_ids: Int[torch.Tensor, "batch context"],
        attention_mask: Int[torch.Tensor, "batch context"],
    ) -> dict[str, Float[torch.Tensor, "batch context _"]]:
        """Run the models and return the residuals ``[batch, context, width]`` by source name."""
        acts: dict[str, torch.Tensor] = {}
        for name, model in self._models.items():
            residuals = capture_residuals(model, input_ids, attention_mask, self._plan.layers(name))
            acts |= {s.stored.name: residuals[s.layer] for s in self._plan.sources if s.model == name}
        return acts

    def _check_ids(self, ids: np.ndarray) -> None:
        largest = int(ids.max())
        for name, model in self._models.items():
            known = model.get_input_embeddings().num_embeddings
            if largest >= known:
                raise ValueError(
                    f"token {largest} ({self.tokenizer.convert_ids_to_tokens(largest)!r}) has no embedding "
                    f"in {name} ({self._plan.facts[name].reference}), which has {known}: "
                    f"its weights do not belong to its tokenizer"
                )


def _load_tokenizers(config: HarvestConfig, plan: Plan) -> tuple[Any, str | None]:
    """Load the shared tokenizer and the template, having checked that the models' tokenizers agree."""
    tokenizers = {name: load_tokenizer(facts.pinned()) for name, facts in plan.facts.items()}
    base, chat = tokenizers["base"], tokenizers["chat"]
    for name, tokenizer in tokenizers.items():
        if name != "base":
            check_tokenizers_agree(base, tokenizer, name=name)
    if config.chat_template is not None:
        return chat, read_template(config.chat_template)
    template = chat.chat_template or base.chat_template
    return chat, template.get("default") if isinstance(template, Mapping) else template


def _load_models(
    config: HarvestConfig, plan: Plan, device: str, progress: Progress | None, *, uses_head: bool
) -> dict[str, Any]:
    """Load the models, one only where they are the same, and check that their layers can be read."""
    models: dict[str, Any] = {}
    loaded: list[tuple[ModelFacts, Any]] = []
    for name, facts in plan.facts.items():
        if progress is not None:
            progress(len(models), len(plan.facts), "models")
        model = next((model for known, model in loaded if known == facts), None)
        if model is None:
            model = load_model(facts, dtype=config.model_dtype, device=device, uses_head=uses_head)
            loaded.append((facts, model))
        check_capture(model, plan.layers(name))
        models[name] = model
    if progress is not None:
        progress(len(models), len(models), "models")
    return models


def _padding_token(tokenizer: Any) -> int:
    """Any valid id: padding is masked and its activations are dropped."""
    candidates: Sequence[int | None] = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((index for index in candidates if index is not None), 0)


def _nothing_to_keep(config: HarvestConfig, streams: Sequence[WindowStream]) -> str:
    rows, empty, unusable = (
        sum(sum(stream.cursor[name]) for stream in streams) for name in ("rows", "empty", "unusable")
    )
    refusals = [stream.first_refusal for stream in streams if stream.first_refusal]
    return (
        f"the texts {', '.join(text.label for text in config.texts)} hold no token to keep: {rows} rows "
        f"read, {empty} of them with no more than skip_positions={config.skip_positions} tokens, "
        f"{unusable} refused by the chat template{f'; {refusals[0]}' if refusals else ''}"
    )
