"""Several processes of one run on this machine, for tests: started together, none left behind."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def free_port():
    """A port that the system has free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(devices):
    """Of a process with so many CPU devices, and nothing of JAX that is set for this one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return kept | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}


class Together:
    """The processes of one run, as a context that kills those that are left.

    Args:
        commands: the words after the interpreter, of each process.
        folder: for what they print.
        devices: CPU devices of each.
    """

    def __init__(self, commands, folder, *, devices):
        folder.mkdir(parents=True, exist_ok=True)
        self._logs = [folder / f"process-{i}.log" for i in range(len(commands))]
        self.processes = []
        for command, log in zip(commands, self._logs, strict=True):
            with log.open("wb") as file:
                words = [sys.executable, *map(str, command)]
                self.processes.append(
                    subprocess.Popen(
                        words, env=environment(devices), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self, timeout):
        """The exit codes, once all have ended; those that do not in time fail the test."""
        deadline = time.monotonic() + timeout
        try:
            return [process.wait(max(deadline - time.monotonic(), 0)) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s\n{self.output()}") from None

    def output(self):
        """What all of them printed so far."""
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')}" for log in self._logs)
