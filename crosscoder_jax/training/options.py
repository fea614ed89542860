"""How a training run reads its data, logs and saves."""

import dataclasses

from crosscoder_jax.activations.nulls import Null
from crosscoder_jax.activations.split import Split


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How a run reads, logs and saves; but for split, window, lanes and null nothing changes the weights.

    Raises:
        ValueError: if a size is not positive.
    """

    split: Split = Split()
    """Which documents are held out."""
    window_tokens: int = 1 << 17
    """Tokens shuffled together; memory holds two windows."""
    lanes: int = 1
    """Streams of the store's files that share every batch evenly: a host reads those of its rows alone, so
    that as many as hosts, or a multiple, let each read its share. Divides the batch; changes the order of
    the data, and stays what it was when the run goes on elsewhere."""
    log_every: int = 10
    """Steps between logged metrics."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    step_timeout: float | None = None
    """Seconds without a step done, the compilation included, after which the process prints where each of its
    threads stands and ends with 76; ``None`` waits for ever."""
    is_optimizer_spread: bool = False
    """Spread the optimiser's moments over the mesh axis ``data``, too: they take less memory for each shard
    of the data, and a step gathers the updates; needs a width of all sources that the shards divide."""
    null: Null | None = None
    """Trains on null data made from the store, in place of the data itself."""

    def __post_init__(self) -> None:
        for name in ("window_tokens", "lanes", "log_every", "checkpoint_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.step_timeout is not None and not self.step_timeout > 0:
            raise ValueError(f"step_timeout={self.step_timeout} must be positive, or None to wait for ever")
