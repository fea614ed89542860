"""One process of a run: ``python -m experiments.soak.worker STORE RUN STEPS DATA LATENT COUNT ID PORT``.

Which tokens every step was given is left in ``RUN.seen/<step>-<first row>.npy``, as rows and token indices.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from crosscoder_jax.activations import ActivationStore
from crosscoder_jax.activations.batches import Batches
from crosscoder_jax.sharding import make_mesh, start_processes
from crosscoder_jax.training import loop
from crosscoder_jax.training.preemption import PREEMPTED, PreemptedError
from experiments.soak.config import SECONDS_A_STEP, options, recipe


class NotedBatches(Batches):
    """Batches that leave a note of each one that was asked for."""

    folder: Path

    def iterate(self, start_step: int, stop_step: int, rows: Any = None) -> Iterator[np.ndarray]:
        """Yield the batches; each token is known again by its activations, which no other token has."""
        store = self.view.store
        places = {row.tobytes(): i for i, row in enumerate(store.read(0, store.num_tokens))}
        share = np.arange(self.schedule.batch_size)[slice(None) if rows is None else rows]
        batches = super().iterate(start_step, stop_step, rows)
        for step, batch in enumerate(batches, start=start_step):
            note = np.stack([share, [places[row.tobytes()] for row in batch]])
            path = self.folder / f"{step}-{share[0]}.npy"
            staged = path.with_suffix(f".{os.getpid()}.tmp")
            with staged.open("wb") as file:
                np.save(file, note)
            staged.replace(path)
            time.sleep(SECONDS_A_STEP)
            yield batch


def main() -> None:
    """Train until the end, or until told to end."""
    store, run, *numbers = sys.argv[1:]
    steps, data, latent, count, index, port = map(int, numbers)
    jax.config.update("jax_enable_x64", True)
    if count > 1:
        start_processes(f"127.0.0.1:{port}", count, index)
    NotedBatches.folder = Path(f"{run}.seen")
    NotedBatches.folder.mkdir(exist_ok=True)
    loop.Batches = NotedBatches
    try:
        loop.fit(
            recipe(steps),
            ActivationStore.open(store),
            Path(run),
            options=options(),
            mesh=make_mesh(data, latent),
        )
    except PreemptedError:
        sys.exit(PREEMPTED)


if __name__ == "__main__":
    main()
