"""The loop: a store in, one or several crosscoders out, resumable at any moment."""

import contextlib
import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from crosscoder_jax.activations.batches import Batches
from crosscoder_jax.activations.nulls import as_null
from crosscoder_jax.activations.store import ActivationStore
from crosscoder_jax.activations.view import TokenView, spread_sample
from crosscoder_jax.crosscoder import Crosscoder
from crosscoder_jax.publishing import load, read_published, save
from crosscoder_jax.sharding import (
    BatchShare,
    Shardings,
    check_divisible,
    from_first,
    is_first_process,
    on_mesh,
)
from crosscoder_jax.sources import Sources
from crosscoder_jax.training.checkpoint import Checkpoints
from crosscoder_jax.training.config import TrainConfig
from crosscoder_jax.training.folders import (
    claim_folder,
    clear_folder,
    locked_folder,
    provenance,
    refuse_other_run,
    refuse_store_folder,
    run_identity,
)
from crosscoder_jax.training.journal import Journal
from crosscoder_jax.training.memory import runs_at_once
from crosscoder_jax.training.options import RunOptions as RunOptions
from crosscoder_jax.training.preemption import PreemptedError as PreemptedError
from crosscoder_jax.training.preemption import watched_for_preemption
from crosscoder_jax.training.state import TrainState, init_state
from crosscoder_jax.training.statistics import SAMPLE_TOKENS, DataStatistics, data_statistics
from crosscoder_jax.training.step import train_step
from crosscoder_jax.training.tracking import JsonLinesTracker, Tracker
from crosscoder_jax.training.warm_start import begin_with
from crosscoder_jax.training.watchdog import watchdog
from crosscoder_jax.typing import Progress


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
    that was never stopped; on another mesh or number of processes, within the rounding of sums that are
    taken in another order. A SIGTERM ends it after the step under way, saved. In a run of several processes
    all of them call this, with one ``folder`` that all see; the first one writes everything but the
    checkpoints, and has ``trackers``. The folder then holds ``config.json``, ``metrics.jsonl``,
    ``checkpoints/`` and the finished ``crosscoder/``. A finished run is left as it is, and its
    crosscoder, which may have been calibrated since, is loaded.

    Args:
        config: the recipe.
        store: activations of every source the crosscoder reads; see ``options.lanes`` for what of it each of
            several processes reads. A sample of all of it, for the normaliser, is read by the first alone.
        folder: of the run; made if missing.
        options: reading, logging, saving.
        mesh: with axes ``data`` and ``latent``, over all processes; one device without it.
        trackers: told the metrics besides ``metrics.jsonl``.
        progress: told the steps done.

    Raises:
        ValueError: if the folder holds another run or lies in the store, another process trains this one, the
            store lacks a source or has not the tokens of a batch, or a size does not spread over the mesh.
        FloatingPointError: if a NaN or an infinity appears, naming step and tensor.
        OSError: if a checkpoint cannot be written.
        PreemptedError: after a SIGTERM, when all is saved.
    """
    (crosscoder,) = fit_together(
        [config],
        store,
        [folder],
        options=options,
        mesh=mesh,
        make_trackers=lambda _: trackers,
        progress=progress,
    )
    return crosscoder


def fit_together(
    configs: Sequence[TrainConfig],
    store: ActivationStore,
    folders: Sequence[Path],
    *,
    options: RunOptions = RunOptions(),
    mesh: Mesh | None = None,
    make_trackers: Callable[[Path], Sequence[Tracker]] = lambda _: (),
    progress: Progress | None = None,
) -> list[Crosscoder]:
    """Train several crosscoders over one read of the data: several seeds, sizes or k.

    Every batch is read once and each run takes its step on it, so a run ends with the weights that
    :func:`fit` gives for its recipe, bit for bit, and leaves the same folder. A killed call goes on
    likewise: runs whose checkpoint is newer wait for the others. :func:`runs_at_once` of them are
    trained at a time, each group over a read of its own.

    Args:
        configs: the recipes, of one ``batch_size`` and one ``order_seed``.
        store: activations of every source the crosscoders read.
        folders: of the runs, one each.
        options: reading, logging, saving; the same for all.
        mesh: as for :func:`fit`.
        make_trackers: gives the trackers of a run from its folder, besides ``metrics.jsonl``.
        progress: told the steps done of the run that has most to do.

    Raises:
        ValueError: as :func:`fit`, or if the recipes order the data differently or share a folder.
        FloatingPointError: as :func:`fit`, naming the run; it stops the others, too.
        OSError: as :func:`fit`.
        PreemptedError: as :func:`fit`.
    """
    _require_one_order(configs, folders)
    if mesh is None and jax.process_count() > 1:
        raise ValueError(
            f"mesh=None in a run of {jax.process_count()} processes, which would each train alone: spread it "
            f"over their {jax.device_count()} devices with make_mesh"
        )
    store = as_null(store, options.null)
    for config, folder in zip(configs, folders, strict=True):
        part = "batch_size" if config.micro_batches == 1 else "batch_size / micro_batches"
        check_divisible(part, config.batch_size // config.micro_batches, mesh, "data")
        check_divisible("num_latents", config.crosscoder.num_latents, mesh, "latent")
        if options.is_optimizer_spread:
            check_divisible("width of all sources", config.crosscoder.sources.width, mesh, "data")
        refuse_store_folder(folder, store)
        refuse_other_run(folder, run_identity(config, store, options))
    is_finished = _agreed(lambda: [(folder / "crosscoder" / "config.json").is_file() for folder in folders])
    waiting = [
        _Run(config, folder, folder.name if len(configs) > 1 else "")
        for config, folder, is_done in zip(configs, folders, is_finished, strict=True)
        if not is_done
    ]
    at_once = _agreed(lambda: runs_at_once([run.config for run in waiting], mesh))
    groups = [waiting[start : start + at_once] for start in range(0, len(waiting), at_once)]
    trained: dict[Path, Crosscoder] = {}
    for index, group in enumerate(groups):
        told = _part_of(progress, index, len(groups))
        trained |= _train(group, store, options, mesh, make_trackers, told)
    return [trained[folder] if folder in trained else _load(folder, mesh) for folder in folders]


def _agreed(tell: Callable[[], Any]) -> Any:
    """Return on every process what the first one finds, which is plain data."""
    return json.loads(from_first(lambda: json.dumps(tell()).encode()))


def _load(folder: Path, mesh: Mesh | None) -> Crosscoder:
    with on_mesh(mesh):
        return load(folder / "crosscoder", shardings=Shardings.for_mesh(mesh))


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run that is not finished."""

    config: TrainConfig
    folder: Path
    name: str
    """In messages; empty if it is the only one."""


def _train(
    runs: Sequence[_Run],
    store: ActivationStore,
    options: RunOptions,
    mesh: Mesh | None,
    make_trackers: Callable[[Path], Sequence[Tracker]],
    progress: Progress | None,
) -> dict[Path, Crosscoder]:
    """Train some runs in turns over one read of the data; return what they end with by folder."""
    view = TokenView.of_split(store, options.split, held_out=False)
    _require_a_batch(runs[0].config, view)
    with contextlib.ExitStack() as stack:
        step_is_done = stack.enter_context(watchdog(options.step_timeout))
        is_preempted = stack.enter_context(watched_for_preemption())
        started = _started(runs, view, mesh, stack, is_optimizer_spread=options.is_optimizer_spread)
        stack.enter_context(on_mesh(mesh))
        # The run that has most to do tells the progress, so that every step is told once.
        longest = max(started, key=lambda begun: begun[0].config.num_steps - int(begun[1].step))[0]
        trainings = []
        for run, state, checkpoints in started:
            identity = run_identity(run.config, store, options)
            claim_folder(run.folder, identity, store, run.config.start)
            trackers: list[Tracker] = []
            if is_first_process():
                jsonl = JsonLinesTracker(run.folder / "metrics.jsonl", first_step=int(state.step))
                trackers = [jsonl, *make_trackers(run.folder)]
            told = progress if run is longest else None
            journal = Journal(run.config, trackers, options.log_every, progress=told, name=run.name)
            stack.callback(journal.close)
            trainings.append(_Training(run, state, checkpoints, journal, options.checkpoint_every))

        def after_step(step: int) -> None:
            step_is_done()
            if is_preempted(step):
                _end_early(trainings)

        _take_steps(trainings, view, options, mesh, after_step)
        return {training.run.folder: training.finish(store, options) for training in trainings}


def _started(
    runs: Sequence[_Run],
    view: TokenView,
    mesh: Mesh | None,
    stack: contextlib.ExitStack,
    *,
    is_optimizer_spread: bool,
) -> list[tuple[_Run, TrainState, Checkpoints]]:
    """Return the state of each run, from its newest checkpoint or from the data, before any is claimed."""

    @functools.cache
    def statistics(recipe: TrainConfig) -> DataStatistics:
        def estimate() -> bytes:
            sample = jnp.asarray(spread_sample(view, SAMPLE_TOKENS))
            derived = _derive(sample, recipe.crosscoder.sources, view.store.sources)
            return data_statistics(np.asarray(derived), recipe).to_bytes()

        return DataStatistics.from_bytes(from_first(estimate), recipe)

    started = []
    for run in runs:
        stack.enter_context(locked_folder(run.folder, "training"))
        clear_folder(run.folder)
        checkpoints = Checkpoints(run.folder / "checkpoints")
        stack.callback(checkpoints.close)
        shardings = Shardings.for_mesh(mesh, is_optimizer_spread=is_optimizer_spread)
        make = functools.partial(init_state, run.config, shardings=shardings)
        is_new = checkpoints.latest_step is None
        data = statistics(run.config.without_seeds())._asdict() if is_new else {}
        with on_mesh(mesh):
            state = make(**data) if is_new else checkpoints.restore(jax.eval_shape(make))
            if is_new and run.config.start is not None:
                state = begin_with(state, read_published(run.config.start.crosscoder), run.config.start)
        started.append((run, state, checkpoints))
    return started


class _Training:
    """A run while it trains: its state, its checkpoints and its journal."""

    def __init__(
        self, run: _Run, state: TrainState, checkpoints: Checkpoints, journal: Journal, checkpoint_every: int
    ):
        self.run, self.step = run, int(state.step)
        self._state, self._recipe = state, run.config.without_seeds()
        self._checkpoints, self._checkpoint_every = checkpoints, checkpoint_every
        self._journal = journal
        self._last_saved = checkpoints.latest_step

    @property
    def steps_left(self) -> int:
        return self.run.config.num_steps - self.step

    def take_step(self, acts: Array) -> None:
        self._state, metrics = train_step(self._state, acts, config=self._recipe)
        self.step += 1
        self._journal.record(self.step, metrics, self._last_saved)
        if self.step % self._checkpoint_every == 0 or not self.steps_left:
            self.save()

    def save(self) -> None:
        """Save the state as it is, unless that was done."""
        self._journal.settle(self._last_saved)
        if self.step != self._last_saved:
            self._checkpoints.save(self.step, self._state)
            self._last_saved = self.step

    def finish(self, store: ActivationStore, options: RunOptions) -> Crosscoder:
        crosscoder = self._state.crosscoder()
        folder = self.run.folder / "crosscoder"
        save(crosscoder, folder, provenance=provenance(self.run.config, store, options))
        return crosscoder


def _take_steps(
    trainings: Sequence[_Training],
    view: TokenView,
    options: RunOptions,
    mesh: Mesh | None,
    after_step: Callable[[int], None],
) -> None:
    first = min(training.step for training in trainings)
    last = max(training.run.config.num_steps for training in trainings)
    config = trainings[0].run.config
    schedule = view.schedule(
        config.batch_size, window_tokens=options.window_tokens, seed=config.order_seed, lanes=options.lanes
    )
    share = BatchShare(config.batch_size, mesh)
    batches = Batches(view, schedule).iterate(first, last, share.rows)
    with warnings.catch_warnings():
        # A donation that fails doubles the memory: an error, not a warning.
        warnings.filterwarnings("error", message="Some donated buffers were not usable")
        for step in range(first, last):
            batch = share.place(next(batches))
            for training in trainings:
                # A run that a stopped process left ahead of the others waits for them.
                if training.step == step and training.steps_left:
                    sources = training.run.config.crosscoder.sources
                    training.take_step(_derive(batch, sources, view.store.sources))
            after_step(step)


def _end_early(trainings: Sequence[_Training]) -> None:
    """Save every run and raise, unless all have taken their last step."""
    if not any(training.steps_left for training in trainings):
        return
    for training in trainings:
        training.save()
    steps = ", ".join(str(training.step) for training in trainings)
    raise PreemptedError(f"told to end (SIGTERM): step {steps} is saved, the same call goes on from there")


def put_batch(batch: np.ndarray, mesh: Mesh | None) -> Array:
    """Put a batch ``[batch, width]`` that this process has whole on the devices, spread over ``data``."""
    return BatchShare(len(batch), mesh).place(batch)


@functools.partial(jax.jit, static_argnames=("sources", "stored"))
def _derive(acts: Array, sources: Sources, stored: Sources) -> Array:
    return sources.read(acts, stored)


def _part_of(progress: Progress | None, index: int, parts: int) -> Progress | None:
    """Return what tells one of several equal parts of the work as a part of the whole."""
    if progress is None or parts == 1:
        return progress
    return lambda done, total, unit: progress(index * total + done, parts * total, unit)


def _require_a_batch(config: TrainConfig, view: TokenView) -> None:
    if config.batch_size > view.num_tokens:
        raise ValueError(
            f"batch_size={config.batch_size} is more than the {view.num_tokens} tokens of {view.store.path} "
            "to train on: take smaller batches, or harvest more"
        )


def _require_one_order(configs: Sequence[TrainConfig], folders: Sequence[Path]) -> None:
    if not configs or len(set(folders)) != len(configs):
        raise ValueError(
            f"{len(configs)} recipes and the folders {[str(folder) for folder in folders]}: "
            "give at least one recipe, and each a folder of its own"
        )
    for name in ("batch_size", "order_seed"):
        values = sorted({getattr(config, name) for config in configs})
        if len(values) > 1:
            raise ValueError(
                f"{name}={values} must be one for all runs that share a read of the data: "
                "train the others by themselves"
            )
