"""One process of several that train: ``training_process.py JOBS COORDINATOR COUNT ID``.

JOBS is a JSON file, a list of jobs done one after another: ``folder`` of the run, ``mesh``, whether it
``is_warm``, begun with another, and ``stop_at`` the step after which the last process is sent SIGTERM. What
a process saw is left beside the run as ``<folder>.<count>.<id>.npz``: what was kept of each token at each
step, and which files of the store it read.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np

from crosscoder_jax.sharding import start_processes

SECONDS_A_STEP = 0.3
"""After a SIGTERM: the order takes a moment to reach the others."""


def main():
    jobs, coordinator, count, index = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    jax.config.update("jax_enable_x64", True)
    start_processes(coordinator, count, index)
    for job in json.loads(jobs.read_text()):
        work(job, is_last=index == count - 1)


def work(job, *, is_last):
    from processes_cases import train

    from crosscoder_jax.training.preemption import PreemptedError

    def progress(done, total, unit):
        seen["last"] = done
        if job["stop_at"] is None or done < job["stop_at"]:
            return
        if is_last and done == job["stop_at"]:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SECONDS_A_STEP)

    folder = Path(job["folder"])
    seen = {}
    try:
        train(folder, tuple(job["mesh"]), seen, progress, is_warm=job["is_warm"])
    except PreemptedError as error:
        seen["told"] = str(error)
    assert (job["stop_at"] is None) == ("told" not in seen), job
    np.savez(
        f"{folder}.{jax.process_count()}.{jax.process_index()}.npz",
        **{name: np.asarray(value) for name, value in seen.items()},
    )


if __name__ == "__main__":
    main()
