"""Compile steps in another process, so that no compiler disturbs this one."""

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from crosscoder_jax.configs import config_to_json
from crosscoder_jax.planning.topology import Topology
from crosscoder_jax.training.config import TrainConfig

_WORKER = "crosscoder_jax.planning.worker"
_NO_TPU_HERE = {
    # libtpu asks a cloud machine's metadata server what it runs on, and waits for it for minutes elsewhere.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Nothing runs on a TPU: another process may, or may plan, too.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def require_compiler(topology: Topology) -> None:
    """Refuse a topology whose compiler is not installed.

    Raises:
        ModuleNotFoundError: naming the extra that brings it.
    """
    if topology.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            f"topology={topology.name!r} needs the TPU compiler libtpu, which is not installed: "
            "pip install 'crosscoder-jax[tpu]', which needs no TPU"
        )


def compiled_steps(
    recipe: TrainConfig,
    topology: Topology,
    meshes: Sequence[tuple[int, int]],
    *,
    is_optimizer_spread: bool = False,
) -> Iterator[Mapping[str, Any]]:
    """Compile the step for every mesh; yield what the compiler says of each as it comes.

    Yields:
        ``no_mesh`` where the chips make none like that; or ``processes``, whose each chip of the mesh is, and
        ``refusal`` where memory was too small, or else bytes, ``flops``, ``optimal_seconds`` and the
        program's ``text``.

    Raises:
        ModuleNotFoundError: if the compiler is not installed.
        ValueError: if it does not know the topology, or fails in another way, with what it said.
    """
    require_compiler(topology)
    request = {
        "platform": topology.platform,
        "topology": topology.name,
        "recipe": config_to_json(recipe),
        "meshes": [list(mesh) for mesh in meshes],
        "is_optimizer_spread": is_optimizer_spread,
    }
    with tempfile.TemporaryFile("w+") as errors, _worker(topology, errors) as worker:
        try:
            yield from _answers(worker, request)
            if worker.wait():
                errors.seek(0)
                raise ValueError(_failure(topology, errors.read()))
        finally:
            worker.kill()


def _worker(topology: Topology, errors: IO[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", _WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env=_environment(topology),
    )


def _answers(worker: "subprocess.Popen[str]", request: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    # A worker that has failed already reads nothing; what it said is told after.
    with contextlib.suppress(BrokenPipeError), worker.stdin as stdin:
        json.dump(request, stdin)
    for line in worker.stdout:
        if line.startswith("{"):  # compilers write to standard output, too
            yield json.loads(line)


def _environment(topology: Topology) -> dict[str, str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if topology.platform == "tpu":
        return environment | _NO_TPU_HERE
    flags = environment.get("XLA_FLAGS", "")
    forced = f"--xla_force_host_platform_device_count={topology.num_chips}"
    return environment | {"XLA_FLAGS": f"{flags} {forced}".strip()}


def _failure(topology: Topology, said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    last = re.sub(r"^[\w.]+Error: (?:[A-Z_]+: )?", "", lines[-1].strip()) if lines else "it said nothing"
    return f"topology={topology.name!r} could not be compiled for: {last}: check the shape, or update libtpu"
