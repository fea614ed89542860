"""How a training run reads its data, logs and saves."""

import dataclasses

from crosscoder_jax.activations.nulls import Null
from crosscoder_jax.activations.split import Split


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How a run reads, logs and saves; apart from split, window and null nothing here changes the weights.

    Raises:
        ValueError: if a size is not positive.
    """

    split: Split = Split()
    """Which documents are held out."""
    window_tokens: int = 1 << 17
    """Tokens shuffled together; memory holds two windows."""
    log_every: int = 10
    """Steps between logged metrics."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    null: Null | None = None
    """Trains on null data made from the store, in place of the data itself."""

    def __post_init__(self) -> None:
        for name in ("window_tokens", "log_every", "checkpoint_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
