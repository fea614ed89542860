"""The loop: a store in, a crosscoder out, resumable at any moment."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from crosscoder_jax.activations.atomic import read_json, remove_temporary_files, write_json_atomically
from crosscoder_jax.activations.batches import Batches
from crosscoder_jax.activations.split import Split
from crosscoder_jax.activations.store import ActivationStore
from crosscoder_jax.activations.view import TokenView, spread_sample
from crosscoder_jax.configs import config_differences, config_to_json
from crosscoder_jax.crosscoder import Crosscoder
from crosscoder_jax.publishing import load, save
from crosscoder_jax.sharding import Shardings, check_divisible
from crosscoder_jax.sources import Sources
from crosscoder_jax.training.checkpoint import Checkpoints
from crosscoder_jax.training.config import TrainConfig
from crosscoder_jax.training.state import TrainState, init_state
from crosscoder_jax.training.statistics import SAMPLE_TOKENS, data_statistics
from crosscoder_jax.training.step import Metrics, train_step
from crosscoder_jax.training.tracking import JsonLinesTracker, Tracker
from crosscoder_jax.typing import Progress


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How a run reads, logs and saves; apart from split and window, nothing here changes the weights."""

    split: Split = Split()
    """Which documents are held out."""
    window_tokens: int = 1 << 17
    """Tokens shuffled together; memory holds two windows."""
    log_every: int = 10
    """Steps between logged metrics."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step is always saved."""

    def __post_init__(self) -> None:
        for name in ("window_tokens", "log_every", "checkpoint_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")


def fit(
    config: TrainConfig,
    store: ActivationStore,
    folder: Path,
    *,
    options: RunOptions = RunOptions(),
    mesh: Mesh | None = None,
    trackers: Sequence[Tracker] = (),
    progress: Progress | None = None,
) -> Crosscoder:
    """Train a crosscoder on the store's training documents, or finish a run that was stopped.

    A run killed at any moment and started again ends with the same weights, bit for bit, as one
    that was never stopped. The folder then holds ``config.json``, ``metrics.jsonl``,
    ``checkpoints/`` and the finished ``crosscoder/``. A finished run is left as it is, and its
    crosscoder, which may have been calibrated since, is loaded.

    Args:
        config: the recipe.
        store: activations of every source the crosscoder reads.
        folder: of the run; made if missing.
        options: reading, logging, saving.
        mesh: with axes ``data`` and ``latent``; one device without it.
        trackers: told the metrics besides ``metrics.jsonl``.
        progress: told the steps done.

    Raises:
        ValueError: if the folder holds another run, the store lacks a source, or a size does not
            spread over the mesh.
        FloatingPointError: if a NaN or an infinity appears, naming step and tensor.
        OSError: if a checkpoint cannot be written.
    """
    check_divisible("batch_size", config.batch_size, mesh, "data")
    check_divisible("num_latents", config.crosscoder.num_latents, mesh, "latent")
    identity = run_identity(config, store, options)
    _refuse_other_run(folder, identity)
    if (folder / "crosscoder" / "config.json").is_file():
        return load(folder / "crosscoder")
    _clear(folder)
    view = TokenView.of_split(store, options.split, held_out=False)
    with contextlib.ExitStack() as stack:
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        checkpoints = Checkpoints(folder / "checkpoints")
        stack.callback(checkpoints.close)
        state = _start(config, view, checkpoints, Shardings.for_mesh(mesh))
        _claim(folder, identity, store)
        first_step = int(state.step)
        jsonl = JsonLinesTracker(folder / "metrics.jsonl", first_step=first_step)
        journal = _Journal(config, [jsonl, *trackers], options.log_every, progress)
        stack.callback(journal.close)
        schedule = view.schedule(config.batch_size, window_tokens=options.window_tokens, seed=config.seed)
        batches = Batches(view, schedule).iterate(first_step, config.num_steps)
        state = _run(state, batches, store.sources, config, mesh, checkpoints, journal, options)
        crosscoder = state.crosscoder()
        save(crosscoder, folder / "crosscoder", provenance=provenance(config, store))
    return crosscoder


def run_identity(config: TrainConfig, store: ActivationStore, options: RunOptions) -> dict[str, Any]:
    """Return as plain data everything that decides the weights of a run."""
    return {
        "train": config_to_json(config),
        "split": config_to_json(options.split),
        "window_tokens": options.window_tokens,
        "store_identity": {"fingerprint": store.manifest.fingerprint(), **store.manifest.identity()},
    }


def provenance(config: TrainConfig, store: ActivationStore) -> dict[str, Any]:
    """Return where a crosscoder comes from: stored sources, their texts, and the recipe."""
    return {
        "store": store.manifest.identity(),
        "stored_sources": config_to_json(store.sources),
        "harvest": store.manifest.provenance,
        "num_tokens": store.num_tokens,
        "train": config_to_json(config),
        "versions": library_versions(),
    }


def library_versions() -> dict[str, str]:
    """Return the versions of what decides the numbers of a run."""
    names = ("crosscoder-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def _refuse_other_run(folder: Path, identity: Mapping[str, Any]) -> None:
    path = folder / "config.json"
    if not path.exists():
        return
    recorded = read_json(path)
    differences = config_differences(identity, {name: recorded.get(name) for name in identity})
    if differences:
        raise ValueError(
            f"{folder} holds another run: {'; '.join(differences)}: "
            "choose another output folder, or give the old settings to go on"
        )


def _claim(folder: Path, identity: Mapping[str, Any], store: ActivationStore) -> None:
    """Write what the run is, once it has what it needs to start: a faulty recipe claims no folder."""
    path = folder / "config.json"
    if not path.exists():
        record = {"store_path": str(store.path.absolute()), "versions": library_versions()}
        write_json_atomically(path, {**identity, **record})


def _clear(folder: Path) -> None:
    """Make the folders of a run and remove what a killed process left half-written."""
    for path in (folder, folder / "crosscoder"):
        path.mkdir(parents=True, exist_ok=True)
        remove_temporary_files(path)


def _start(
    config: TrainConfig, view: TokenView, checkpoints: Checkpoints, shardings: Shardings
) -> TrainState:
    if checkpoints.latest_step is not None:
        return checkpoints.restore(jax.eval_shape(lambda: init_state(config, shardings=shardings)))
    stored = view.store.sources
    sample = spread_sample(view, SAMPLE_TOKENS).astype(np.float32)
    derived = np.asarray(config.crosscoder.sources.derive(jnp.asarray(sample), stored))
    statistics = data_statistics(derived, config)
    return init_state(
        config,
        mean=statistics.mean,
        scale=statistics.scale,
        b_dec=statistics.b_dec,
        shardings=shardings,
    )


def _run(
    state: TrainState,
    batches: Iterator[np.ndarray],
    stored: Sources,
    config: TrainConfig,
    mesh: Mesh | None,
    checkpoints: Checkpoints,
    journal: "_Journal",
    options: RunOptions,
) -> TrainState:
    last_saved = checkpoints.latest_step
    with warnings.catch_warnings():
        # A donation that fails doubles the memory: an error, not a warning.
        warnings.filterwarnings("error", message="Some donated buffers were not usable")
        for step in range(int(state.step) + 1, config.num_steps + 1):
            acts = _derive(put_batch(next(batches), mesh), config.crosscoder.sources, stored)
            state, metrics = train_step(state, acts, config=config)
            journal.record(step, metrics, last_saved)
            if step % options.checkpoint_every == 0 or step == config.num_steps:
                journal.settle(last_saved)
                checkpoints.save(step, state)
                last_saved = step
    return state


def put_batch(batch: np.ndarray, mesh: Mesh | None) -> Array:
    """Put a batch ``[batch, width]`` on the devices, tokens spread over the ``data`` axis."""
    if mesh is None:
        return jnp.asarray(batch)
    sharding = NamedSharding(mesh, jax.P("data", None))
    return jax.make_array_from_callback(batch.shape, sharding, lambda index: batch[index])


@functools.partial(jax.jit, static_argnames=("sources", "stored"))
def _derive(acts: Array, sources: Sources, stored: Sources) -> Array:
    return sources.derive(acts.astype(jnp.float32), stored)


class _Journal:
    """Reads metrics one step late, so that the device never waits for the host."""

    def __init__(
        self, config: TrainConfig, trackers: Sequence[Tracker], log_every: int, progress: Progress | None
    ):
        self._config, self._trackers = config, trackers
        self._log_every, self._progress = log_every, progress
        self._pending: tuple[int, Metrics] | None = None
        self._logged: tuple[int, float] | None = None

    def record(self, step: int, metrics: Metrics, last_saved: int | None) -> None:
        self.settle(last_saved)
        self._pending = (step, metrics)

    def settle(self, last_saved: int | None) -> None:
        """Check and log the step that is still pending."""
        if self._pending is None:
            return
        step, metrics = self._pending[0], jax.device_get(self._pending[1])
        self._pending = None
        values = {name: float(value) for name, value in metrics.items()}
        _refuse_nan(step, values, last_saved)
        if step % self._log_every == 0 or step in (1, self._config.num_steps):
            self._log(step, {n: v for n, v in values.items() if not n.startswith("is_finite/")})
        if self._progress is not None:
            self._progress(step, self._config.num_steps, "steps")

    def _log(self, step: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        if self._logged is not None:
            since_step, since = self._logged
            values["tokens_per_s"] = (step - since_step) * self._config.batch_size / max(now - since, 1e-9)
        self._logged = (step, now)
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def _refuse_nan(step: int, values: Mapping[str, float], last_saved: int | None) -> None:
    wrong = [
        name.removeprefix("is_finite/") for name, v in values.items() if name.startswith("is_f") and not v
    ]
    if not wrong and math.isfinite(values["loss"]):
        return
    # What is wrong first makes everything after it wrong too.
    stages = (
        [name for name in wrong if name == "batch"],
        [name for name in wrong if name == "loss"],
        [name for name in wrong if name.startswith("gradient")],
        wrong,
    )
    first = next((stage for stage in stages if stage), ["loss"])
    saved = f"the checkpoint of step {last_saved} is good" if last_saved else "no checkpoint was saved yet"
    cause = "verify the store" if "batch" in wrong else "lower the learning rate or lengthen the warm-up"
    raise FloatingPointError(f"step {step}: NaN or infinity in {', '.join(first)}; {saved}: {cause}")
