"""A diff's passes over its held-out tokens: batches in order, on the mesh, and how far they have come."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Array, Integer

from crosscoder_jax.activations.batches import StoredBatch, sequential_batches
from crosscoder_jax.activations.view import TokenView
from crosscoder_jax.diffing.config import DiffConfig
from crosscoder_jax.sharding import Shardings, place
from crosscoder_jax.typing import Progress


def read_pass(
    view: TokenView, config: DiffConfig, progress: Progress | None, *, earlier_passes: int
) -> Iterator[StoredBatch]:
    """Yield every batch of a view once and tell, when the next one is asked for, that it is done.

    Args:
        view: held-out tokens.
        config: of the diff; without snippets it has one pass instead of two.
        progress: told the tokens read, over all passes.
        earlier_passes: how many there were before this one.

    Raises:
        StoreError: if a file of the store is damaged.
    """
    passes = 2 if config.num_snippet_latents else 1
    done = earlier_passes * view.num_tokens
    for batch in sequential_batches(view, config.batch_size):
        yield batch
        done += int(batch.is_valid.sum())
        if progress is not None:
            progress(done, passes * view.num_tokens, "tokens")


def placed_tokens(batch: StoredBatch, shardings: Shardings) -> tuple[Array, Array, Array]:
    """Return activations ``[batch, width]`` in the stored type, documents and validity ``[batch]``."""
    return (
        place(batch.acts, shardings.acts_bw),
        placed_column(batch.documents, shardings),
        place(batch.is_valid, shardings.per_batch_b),
    )


def placed_column(values: Integer[np.ndarray, "batch"], shardings: Shardings) -> Array:
    """Return one whole number below 2^31 per token ``[batch]``, as int32."""
    return place(values.astype(np.int32), shardings.per_batch_b)
