"""Training checkpoints: everything a run needs to go on as if it had never stopped.

All calls to Orbax are here. A checkpoint is written under a temporary name and renamed when it is
whole, so a process killed while saving leaves the one before it.
"""

import gc
import logging
import shutil
import sys
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from jax.sharding import NamedSharding, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from crosscoder_jax.training.state import TrainState

_logger = logging.getLogger(__name__)
_NOISY_LOGGERS = ("absl", "asyncio")
_SETTLE_SECONDS = 0.2

KEPT = 2
"""Checkpoints kept: the newest and, in case the disk damages it, the one before."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: made if missing.
    """

    def __init__(self, folder: Path):
        self._folder = folder.absolute()
        self._has_failed = False
        if jax.process_index() == 0:
            self._remove_partial()
        self._checkpointer = ocp.training.Checkpointer(
            str(self._folder),
            # Orbax's own policies and protocols disagree on the type of a parameter.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # pyright: ignore[reportArgumentType]
            preservation_policy=ocp.training.preservation_policies.LatestN(KEPT),  # pyright: ignore[reportArgumentType]
        )

    @property
    def latest_step(self) -> int | None:
        """The newest step that was saved whole, or ``None``."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: TrainState) -> None:
        """Save and return when the checkpoint is on disk.

        Raises:
            OSError: if it cannot be written, as on a full disk; the checkpoints before it are kept.
        """
        with _Quietly() as attempt:
            self._checkpointer.save_checkpointables(step, {"state": _named(state)})
        if attempt.failure is not None:
            self._has_failed = True
            self._remove_partial()
            free = shutil.disk_usage(self._folder).free
            raise OSError(
                f"{self._folder}: step {step} could not be saved with {free / 2**20:.0f} MiB free: make "
                f"room, and the run goes on from step {self.latest_step or 0} ({attempt.failure})"
            )

    def restore(self, abstract_state: TrainState) -> TrainState:
        """Load the newest checkpoint onto the mesh that is set.

        Args:
            abstract_state: shapes and shardings, from :func:`jax.eval_shape` of the initial state.

        Raises:
            ValueError: if it is damaged or belongs to another crosscoder.
        """
        step = self.latest_step
        wanted = _named(jax.tree.map(_placed, abstract_state))
        restored = {}
        with _Quietly() as attempt:
            restored = self._checkpointer.load_checkpointables(step, {"state": wanted})["state"]
        if attempt.failure is not None:
            raise ValueError(
                f"{self._folder}: the checkpoint of step {step} cannot be read: "
                f"delete the folder {step} to go on from the one before it ({attempt.failure})"
            )
        return jax.tree.unflatten(jax.tree.structure(abstract_state), [restored[name] for name in wanted])

    def close(self) -> None:
        """Let go of the folder; a failure of :meth:`save` is not told twice."""
        if not self._has_failed:
            self._checkpointer.close()
            return
        with _Quietly():
            self._checkpointer.close()
        self._remove_partial()

    def _remove_partial(self) -> None:
        for path in self._folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)


class _Quietly:
    """Catch an error of Orbax as one line.

    Orbax logs the traceback of each of its threads and abandons what else it was doing, which then
    complains into the void: together they would bury what we say. The whole is logged as debug
    information.
    """

    failure: str | None = None

    def __enter__(self) -> "_Quietly":
        self._levels = {name: logging.getLogger(name).level for name in _NOISY_LOGGERS}
        for name in _NOISY_LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        is_caught = isinstance(error, Exception)
        if is_caught:
            self.failure = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            _logger.debug("Orbax failed", exc_info=error)
            _let_go_of(error)
        sys.unraisablehook = self._hook
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)
        return is_caught


def _let_go_of(error: BaseException) -> None:
    """Wait for what was abandoned and collect what the frames of an error hold."""
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is not None and current.__traceback__ is not None:
            pending += [current.__cause__, current.__context__]
            current.with_traceback(None)
    time.sleep(_SETTLE_SECONDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


def _named(state: TrainState) -> dict[str, Any]:
    """Return the leaves by name, so that a checkpoint depends on no class of ours or of flax."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Replicate leaves that the layout says nothing of."""
    if leaf.sharding is not None:
        return leaf
    mesh = jax.sharding.get_mesh()
    device = jax.devices()[0]
    sharding = SingleDeviceSharding(device) if mesh.empty else NamedSharding(mesh, jax.P())
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
