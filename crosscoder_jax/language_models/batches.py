"""Between sequences and rows of the store: padding to the fixed shape, and dropping what is not kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from crosscoder_jax.language_models.documents import Window

OutlierLimits = dict[str, float]
"""Largest norm that is kept, in raw activation units, by source name."""


def pad_windows(
    windows: Sequence[Window], batch_size: int, context: int, pad: int
) -> tuple[Int[np.ndarray, "batch context"], Int[np.ndarray, "batch context"]]:
    """Pad sequences on the right, and a short batch with rows of padding, to ``[batch_size, context]``.

    Returns:
        Token ids and the attention mask. A row of padding attends to its own first token, since a softmax
        over nothing is NaN.
    """
    ids = np.full((batch_size, context), pad, np.int64)
    mask = np.zeros((batch_size, context), np.int64)
    mask[:, 0] = 1
    for row, window in enumerate(windows):
        ids[row, : len(window.input_ids)] = window.input_ids
        mask[row, : len(window.input_ids)] = 1
    return ids, mask


@dataclass(frozen=True)
class Kept:
    """Rows for the store: activations in raw units, and where each came from."""

    acts: Mapping[str, Float[np.ndarray, "token _"]]
    """float32 by source name."""
    tokens: Int[np.ndarray, "token"]
    documents: Int[np.ndarray, "token"]
    positions: Int[np.ndarray, "token"]
    labels: Int[np.ndarray, "token"]

    @property
    def num_tokens(self) -> int:
        """Number of rows."""
        return len(self.tokens)

    def norms(self) -> dict[str, Float[np.ndarray, "token"]]:
        """L2 norm of every row, by source name."""
        return {name: np.linalg.norm(acts, axis=1) for name, acts in self.acts.items()}

    def within(self, limits: OutlierLimits) -> "Kept":
        """Keep the rows whose norm is within the limit in every source, so that the sources stay paired.

        A row with NaN stays: it is a fault for the store to refuse, not an outlier.
        """
        outlying = np.zeros(self.num_tokens, bool)
        for name, norms in self.norms().items():
            outlying |= norms > limits[name]
        return self._rows(~outlying)

    def first(self, count: int) -> "Kept":
        """Keep the first ``count`` rows."""
        return self._rows(np.arange(self.num_tokens) < count)

    def _rows(self, which: Bool[np.ndarray, "token"]) -> "Kept":
        if which.all():
            return self
        return Kept(
            {name: acts[which] for name, acts in self.acts.items()},
            self.tokens[which],
            self.documents[which],
            self.positions[which],
            self.labels[which],
        )


def kept_rows(
    acts: Mapping[str, Float[torch.Tensor, "batch context _"]], windows: Sequence[Window], skip_positions: int
) -> Kept:
    """Take the tokens out of a padded batch: no padding, and not the first positions of a sequence."""
    chosen = [(row, slice(skip_positions, len(window.input_ids))) for row, window in enumerate(windows)]
    lengths = [len(window.input_ids) - skip_positions for window in windows]
    return Kept(
        {
            name: torch.cat([residual[row, tokens] for row, tokens in chosen]).float().cpu().numpy()
            for name, residual in acts.items()
        },
        np.concatenate([window.input_ids[skip_positions:] for window in windows]),
        np.repeat(np.array([window.document for window in windows], np.int32), lengths),
        np.concatenate([window.positions[skip_positions:] for window in windows]),
        np.repeat(np.array([window.label for window in windows], np.int16), lengths),
    )
