"""Training checkpoints: everything a run needs to go on as if it had never stopped.

All calls to Orbax are here. A checkpoint is written under a temporary name and renamed when it is
whole, so a process killed while saving leaves the one before it.
"""

import errno
import gc
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from crosscoder_jax.sharding import is_first_process
from crosscoder_jax.training.state import TrainState

_logger = logging.getLogger(__name__)
_NOISY_LOGGERS = ("absl", "asyncio")
_SETTLE_SECONDS = 0.2
_FAILURES = (OSError, ValueError, LookupError, RuntimeError)
"""What Orbax and TensorStore raise about files; anything else is a mistake in the code."""
_MOST_LISTED = 4
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

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
        leaves = _named(state)
        with _Quietly() as attempt:
            self._checkpointer.save_checkpointables(step, {"state": leaves})
        if attempt.error is not None:
            self._has_failed = True
            self._remove_partial()
            free = shutil.disk_usage(self._folder).free
            is_full = _is_disk_full(attempt.error) or free < sum(leaf.nbytes for leaf in leaves.values())
            remedy = f"with {free / 2**20:.0f} MiB free: make room, and" if is_full else "for another reason:"
            raise OSError(
                f"{self._folder}: step {step} could not be saved {remedy} the run goes on from step "
                f"{self.latest_step or 0} ({_first_line(attempt.error)})"
            )

    def restore(self, abstract_state: TrainState) -> TrainState:
        """Load the newest checkpoint onto the mesh that is set.

        Args:
            abstract_state: shapes and shardings, from :func:`jax.eval_shape` of the initial state.

        Raises:
            ValueError: if it is damaged, or holds other arrays than the state: those of another
                crosscoder or of another release.
        """
        step = self.latest_step
        wanted = _named(jax.tree.map(_placed, abstract_state))
        differences, restored = [], {}
        with _Quietly() as attempt:
            # None if the description is damaged, too: loading then says how.
            stored = self._checkpointer.checkpointables_metadata(step).metadata["state"]
            differences = [] if stored is None else _differences(stored, wanted)
            if not differences:
                restored = self._checkpointer.load_checkpointables(step, {"state": wanted})["state"]
        if differences:
            raise ValueError(
                f"{self._folder}: the checkpoint of step {step} is whole, but of another crosscoder or "
                f"release ({_listed(differences)}): choose another output folder, or go on with what wrote it"
            )
        if attempt.error is not None:
            earlier = [c.step for c in self._checkpointer.checkpoints if c.step != step]
            goal = f"go on from step {max(earlier)}" if earlier else "begin again"
            raise ValueError(
                f"{self._folder}: the checkpoint of step {step} cannot be read "
                f"({_first_line(attempt.error)}): if it is damaged, move the folder {step} away to {goal}"
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
        if not is_first_process():
            return
        for path in self._folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)


class _Quietly:
    """Catch an error of the disk or of Orbax, to be told in one line.

    Orbax logs the traceback of each of its threads and abandons what else it was doing, which then
    complains into the void: together they would bury what we say. The whole is logged as debug
    information. An error of our own, such as a TypeError, passes as it is.
    """

    error: Exception | None = None

    def __enter__(self) -> "_Quietly":
        self._levels = {name: logging.getLogger(name).level for name in _NOISY_LOGGERS}
        for name in _NOISY_LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._pass_on
        return self

    def _pass_on(self, unraisable: Any) -> None:
        """Leave out what threads of an abandoned save say to the loop that is gone, and nothing else."""
        if "Event loop is closed" not in str(unraisable.exc_value):
            self._hook(unraisable)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if is_caught := isinstance(error, _FAILURES):
            self.error = error
            _logger.debug("Orbax failed", exc_info=error)
            _let_go_of(error)
        sys.unraisablehook = self._hook
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)
        return is_caught


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what led to it, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: Exception) -> str:
    """Return what the first cause says: what Orbax wraps around it is about Orbax."""
    cause = list(_causes(error))[-1]
    return (str(cause).strip() or type(cause).__name__).splitlines()[0][:300]


def _is_disk_full(error: Exception) -> bool:
    return any(
        (isinstance(cause, OSError) and cause.errno in _FULL)
        or any(os.strerror(n) in str(cause) for n in _FULL)
        for cause in _causes(error)
    )


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


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> list[str]:
    """Return what a checkpoint holds other than what is wanted, one line an array."""
    found, asked = ({name: _described(leaf) for name, leaf in leaves.items()} for leaves in (stored, wanted))
    names = [*asked, *(name for name in found if name not in asked)]
    return [
        f"{name.removesuffix('.value').removeprefix('.')} is {found.get(name, 'missing')} there and "
        f"{asked.get(name, 'missing')} here"
        for name in names
        if found.get(name) != asked.get(name)
    ]


def _described(leaf: Any) -> str:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        # Orbax stores the numbers of a key.
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _listed(lines: Sequence[str]) -> str:
    rest = len(lines) - _MOST_LISTED
    return "; ".join([*lines[:_MOST_LISTED], *([f"and {rest} more"] if rest > 0 else [])])


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Replicate leaves that the layout says nothing of."""
    if leaf.sharding is not None:
        return leaf
    mesh = jax.sharding.get_mesh()
    device = jax.devices()[0]
    sharding = SingleDeviceSharding(device) if mesh.empty else NamedSharding(mesh, jax.P())
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
