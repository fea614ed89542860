"""One round: a run that is killed, a run that is not, and how they differ."""

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crosscoder_jax.activations import ActivationStore, StoredSource, StoreWriter
from crosscoder_jax.activations.view import TokenView
from crosscoder_jax.publishing import load, tensors_of
from crosscoder_jax.training.preemption import PREEMPTED
from crosscoder_jax.training.tracking import read_metrics
from experiments.soak.config import (
    BATCH_SIZE,
    DEVICES,
    LANES,
    LAST_STEPS,
    MESHES,
    PROCESSES,
    SPLIT,
    Soak,
    num_steps,
    sources,
)

_LONGEST_WAIT = 300.0
"""Seconds in which a run must have taken its next step, or ended."""
_LONGEST_END = 60.0
"""Seconds in which all must have ended when one is killed, or told to end."""
_ENDS = ("all killed", "one killed", "told to end")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a round ended with."""

    starts: int
    """Times that processes were started."""
    kills: dict[str, int]
    """How often the run was ended in which way; what came after its end is not among them."""
    meshes: tuple[str, ...]
    """On which it was trained, in order."""
    difference: float
    """Largest of any weight from the run that was not killed."""
    is_covered: bool
    """Whether the batches of every epoch hold each training token once."""
    is_logged: bool
    """Whether the metrics have each step once."""


def write_store(folder: Path, num_tokens: int) -> ActivationStore:
    """Write activations of a few planted directions, no two tokens alike; documents of 20 tokens."""
    rng = np.random.default_rng(0)
    made = sources()
    directions = rng.normal(size=(12, made.width))
    strengths = rng.exponential(size=(num_tokens, 12)) * (rng.random((num_tokens, 12)) < 0.2)
    acts = (strengths @ directions + 0.1 * rng.normal(size=(num_tokens, made.width))).astype(np.float32)
    index = np.arange(num_tokens)
    stored = [StoredSource(s.name, s.width, f"made-up/{s.name}", None, "none") for s in made]
    writer = StoreWriter.create_or_resume(
        folder, sources=stored, dtype="float32", labels=("text",), config={}, chunk_tokens=32
    )
    with writer:
        if not writer.is_finished:
            writer.append(
                dict(zip(made.names, made.split(acts), strict=True)),
                tokens=index % 50,
                documents=index // 20,
                positions=index % 20 + 1,
                labels=np.zeros(num_tokens, np.int64),
            )
            writer.finish({"texts": "made up"})
    return ActivationStore.open(folder)


def play_round(config: Soak, number: int) -> Outcome:
    """Train one run to its end through all kills, another without, and compare them."""
    folder = config.output / f"round-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    store = write_store(folder / "store", config.num_tokens)
    view = TokenView.of_split(store, SPLIT, held_out=False)
    steps = num_steps(config, view.num_tokens)
    last = steps - LAST_STEPS
    if config.kills > last:
        raise ValueError(
            f"kills={config.kills} do not fit into {steps} steps, at the last {LAST_STEPS} of which nothing "
            "is killed: take more epochs"
        )
    rng = np.random.default_rng([config.seed, number])
    kills: dict[str, int] = dict.fromkeys(_ENDS, 0)
    meshes = []
    for at in np.sort(1 + rng.choice(last, config.kills, replace=False)).tolist():
        mesh, count = MESHES[rng.integers(len(MESHES))], int(rng.choice(PROCESSES))
        meshes.append(f"{mesh[0]}x{mesh[1]} in {count}")
        with _Processes(folder, "killed", steps, mesh, count) as processes:
            way, index = _ENDS[rng.integers(len(_ENDS))], int(rng.integers(count))
            if processes.wait_for_step(at) and processes.end(way, index):
                kills[way] += 1
    for name in ("killed", "whole"):
        with _Processes(folder, name, steps, MESHES[1], count=2) as processes:
            processes.wait_until_done()
    return Outcome(
        starts=config.kills + 1,
        kills=kills,
        meshes=tuple(meshes),
        difference=_difference(folder / "killed", folder / "whole"),
        is_covered=_is_covered(folder / "killed.seen", view, steps),
        is_logged=[row["step"] for row in read_metrics(folder / "killed" / "metrics.jsonl")]
        == list(range(1, steps + 1)),
    )


class _Processes:
    """The processes of one start, none of which is left behind."""

    def __init__(self, folder: Path, name: str, steps: int, mesh: tuple[int, int], count: int):
        self._run, self._log = folder / name, folder / f"{name}.log"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES // count)}
        port = _free_port()
        self._started = time.time()
        self._processes = []
        with self._log.open("ab") as log:
            for index in range(count):
                words = [folder / "store", self._run, steps, *mesh, count, index, port]
                command = [sys.executable, "-m", "experiments.soak.worker", *map(str, words)]
                self._processes.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
                )

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def wait_for_step(self, step: int) -> bool:
        """Return whether these processes have come to a step; or else they ended before."""
        last, since = -1, time.monotonic()
        while True:
            now = self._step()
            if now >= step:
                return True
            if now != last:
                last, since = now, time.monotonic()
            codes = [process.poll() for process in self._processes]
            if None not in codes:
                self._require(codes, {0})
                return False
            if any(codes) or time.monotonic() - since > _LONGEST_WAIT:
                raise RuntimeError(f"exit codes {codes} at step {now}: see {self._log}")
            time.sleep(0.05)

    def _step(self) -> int:
        """Return the last step in the metrics, 0 until this start has taken the file over."""
        path = self._run / "metrics.jsonl"
        if not path.exists() or path.stat().st_mtime < self._started:
            return 0
        rows = read_metrics(path)
        return rows[-1]["step"] if rows else 0

    def end(self, way: str, index: int) -> bool:
        """End the run in one of the ways, by the process with this index, and wait for all.

        Returns:
            Whether that is what ended the process, or else it was done before.
        """
        if way == "all killed":
            for process in self._processes:
                process.kill()
        else:
            order = signal.SIGKILL if way == "one killed" else signal.SIGTERM
            self._processes[index].send_signal(order)
        codes = [process.wait(_LONGEST_END) for process in self._processes]
        if way == "told to end":
            self._require(codes, {PREEMPTED, 0})  # 0 if it was told at the last step
        return codes[index] == (PREEMPTED if way == "told to end" else -signal.SIGKILL)

    def wait_until_done(self) -> None:
        """Wait for the end of the run."""
        self.wait_for_step(sys.maxsize)

    def _require(self, codes: Sequence[int | None], allowed: set[int]) -> None:
        if not set(codes) <= allowed:
            raise RuntimeError(f"exit codes {codes}, not among {sorted(allowed)}: see {self._log}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _difference(ours: Path, theirs: Path) -> float:
    killed, whole = (tensors_of(load(folder / "crosscoder")) for folder in (ours, theirs))
    return max(
        float(np.abs(killed[name] - whole[name]).max()) for name in ("w_enc", "b_enc", "w_dec", "b_dec")
    )


def _is_covered(folder: Path, view: TokenView, steps: int) -> bool:
    """Tell whether what was noted is a whole batch for each step, and each token once in every epoch."""
    batches = np.full((steps, BATCH_SIZE), -1)
    for path in folder.glob("*.npy"):
        step = int(path.name.split("-")[0])
        rows, tokens = np.load(path)
        # What is read again after a kill must be what was read before it.
        if np.any((batches[step, rows] >= 0) & (batches[step, rows] != tokens)):
            return False
        batches[step, rows] = tokens
    wanted = np.sort(view.token_index(np.arange(view.num_tokens)))
    epochs = _epochs(steps, view.num_tokens)
    return all(
        np.array_equal(np.sort(batches[epochs == epoch]), wanted) for epoch in range(int(epochs.max()) + 1)
    )


def _epochs(steps: int, train_tokens: int) -> np.ndarray:
    """Return the epoch that every row of every step is of.

    A batch is one piece of each lane after the other, and an epoch is dealt out to the lanes token by token.
    """
    rows = BATCH_SIZE // LANES
    lane, row = np.divmod(np.arange(BATCH_SIZE), rows)
    in_lane = np.arange(steps)[:, None] * rows + row
    return (in_lane * LANES + lane) // train_tokens
