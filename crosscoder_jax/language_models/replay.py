"""The texts of a harvest run through its models once more, on documents that were not trained on.

**Which positions.** Replaced, wherever a residual stream is replaced, are the positions that the harvest
stores: no padding, none of the first ``skip_positions`` of a sequence (BOS, or whatever token is the
attention sink), and no norm outlier of any source. All others keep what the model itself computed.
Counted is the prediction made *at* each replaced position whose next token is in the same sequence, so
neither BOS nor padding is ever predicted.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from crosscoder_jax.activations.split import Split
from crosscoder_jax.activations.store import ActivationStore
from crosscoder_jax.language_models.batches import OutlierLimits, kept_positions
from crosscoder_jax.language_models.config import SpliceConfig
from crosscoder_jax.language_models.documents import Window
from crosscoder_jax.language_models.harvested import harvest_config, refuse_changes, with_changes
from crosscoder_jax.language_models.pair import ModelPair
from crosscoder_jax.language_models.plan import plan_harvest
from crosscoder_jax.language_models.splicing import run_spliced
from crosscoder_jax.sources import Sources
from crosscoder_jax.typing import Progress

IsPredicted = Callable[[Window], Bool[np.ndarray, "token"]]
"""Tells which tokens of a sequence are those whose prediction is of interest."""


@dataclasses.dataclass(frozen=True)
class Replayed:
    """A padded batch of sequences and what the models computed on it, on the device of the models."""

    windows: Sequence[Window]
    """The sequences, one a row, before padding."""
    ids: Int[torch.Tensor, "batch context"]
    mask: Int[torch.Tensor, "batch context"]
    is_spliced: Bool[torch.Tensor, "batch context"]
    """Positions whose residual stream may be replaced."""
    is_counted: Bool[torch.Tensor, "batch context"]
    """Positions whose prediction counts."""
    acts: Mapping[str, Float[torch.Tensor, "batch context _"]]
    """Residuals by source, raw activation units, in the models' precision."""

    def rows(self, sources: Sources) -> Float[np.ndarray, "token width"]:
        """Return the activations of every position, padding included, sources side by side."""
        parts = [self.acts[name].float().cpu().numpy() for name in sources.names]
        return np.concatenate(parts, axis=-1).reshape(-1, sources.width)

    def as_residual(self, values: Float[np.ndarray, "token _"]) -> Float[torch.Tensor, "batch context _"]:
        """Return rows of all positions in the batch's shape, on the device of the models."""
        return torch.from_numpy(np.array(values)).view(*self.ids.shape, -1).to(self.ids.device)

    def restricted(self, is_predicted: IsPredicted) -> "Replayed":
        """Count only the predictions *of* some tokens; each is made at the position before."""
        wanted = np.zeros(self.is_counted.shape, bool)
        for row, window in enumerate(self.windows):
            wanted[row, : len(window.input_ids) - 1] = is_predicted(window)[1:]
        is_counted = self.is_counted & torch.from_numpy(wanted).to(self.is_counted.device)
        return dataclasses.replace(self, is_counted=is_counted)

    def documents(self) -> Int[np.ndarray, "token"]:
        """Return the document of each counted prediction, row by row."""
        documents = np.array([window.document for window in self.windows], np.int64)
        return documents[np.nonzero(self.is_counted.cpu().numpy())[0]]


class Replay:
    """The sequences of a store's held-out documents, or of other texts, batch by batch.

    Args:
        store: written by a harvest.
        split: of the run.
        config: other texts, and how much of them.
        progress: told the ``models`` loaded, then the predictions counted, in ``tokens``.

    Raises:
        ValueError: if the store was not written by a harvest, models or texts are no longer those of the
            harvest, or a model lacks its head.
    """

    def __init__(
        self,
        store: ActivationStore,
        split: Split,
        config: SpliceConfig = SpliceConfig(),
        progress: Progress | None = None,
    ):
        self._config, self._progress = config, progress
        self._harvest = with_changes(harvest_config(store), config)
        self.plan = plan_harvest(self._harvest)
        refuse_changes(store, self._harvest, self.plan, is_own_texts=config.texts is None)
        self.pair = ModelPair(self._harvest, self.plan, progress, uses_head=True)
        self._held_out = split if config.texts is None else None
        self._limits: OutlierLimits | None = store.manifest.provenance["outliers"]["norm_limits"]

    def __iter__(self) -> Iterator[Replayed]:
        """Yield whole sequences until ``max_tokens`` predictions are counted."""
        stream, skip = self.pair.open_stream(), self._harvest.skip_positions
        windows = _chosen_windows(stream, self._held_out, self._config.max_tokens, skip)
        done = 0
        for chosen in iter(lambda: list(itertools.islice(windows, self._harvest.batch_size)), []):
            batch = self._run(chosen)
            yield batch
            done += int(batch.is_counted.sum())
            self._tell(min(done, self._config.max_tokens), self._config.max_tokens)
        self._tell(done, done)

    def run(
        self, model: str, source: str, batch: Replayed, residual: Float[torch.Tensor, "batch context width"]
    ) -> Float[torch.Tensor, "batch context vocabulary"]:
        """Return a model's logits with the residual stream of a source replaced.

        Args:
            model: by its name, ``base`` or ``chat``.
            source: which says the layer.
            batch: the sequences.
            residual: what takes the place of the block's output, raw activation units.
        """
        (layer,) = {planned.layer for planned in self.plan.sources if planned.stored.name == source}
        return run_spliced(self.pair.model(model), batch.ids, batch.mask, layer, residual, batch.is_spliced)

    def _run(self, windows: Sequence[Window]) -> Replayed:
        ids, mask = self.pair.pad(windows)
        acts = self.pair.capture(ids, mask)
        is_spliced = kept_positions(acts, windows, self._harvest.skip_positions, self._limits)
        is_counted = _with_next_token(is_spliced, windows)
        spliced, counted = (torch.from_numpy(array).to(ids.device) for array in (is_spliced, is_counted))
        return Replayed(windows, ids, mask, spliced, counted, acts)

    def _tell(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(done, total, "tokens")


def _chosen_windows(
    stream: Iterable[Window], held_out: Split | None, max_tokens: int, skip_positions: int
) -> Iterator[Window]:
    """Yield whole sequences of held-out documents until there are ``max_tokens`` predictions."""
    num_tokens = 0
    for window in stream:
        if num_tokens >= max_tokens:
            return
        if held_out is None or held_out.is_held_out(np.array([window.document]))[0]:
            num_tokens += len(window.input_ids) - skip_positions - 1
            yield window


def _with_next_token(
    is_spliced: Bool[np.ndarray, "batch context"], windows: Sequence[Window]
) -> Bool[np.ndarray, "batch context"]:
    """Leave out the last token of each sequence, whose next one is not known."""
    is_counted = is_spliced.copy()
    for row, window in enumerate(windows):
        is_counted[row, len(window.input_ids) - 1] = False
    return is_counted
