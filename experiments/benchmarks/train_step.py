"""One training step beside its floor and its peers: ``python -m experiments.benchmarks.train_step``.

The floor is what no BatchTopK crosscoder with Adam can do without, measured on the same machine:
the encoder's product, one read and one write of every array of the optimiser, one read of the batch.
"""

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.peers import LIBRARIES
from experiments.readme import markdown_table, replace_section

README = Path(__file__).with_name("README.md")


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a step."""

    width: int
    """Of each of the two sources."""
    latents: int
    k: int
    batch: int

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"2 x {self.width}, {self.latents:,}, {self.k}, {self.batch:,}"


CASES = (Case(512, 8192, 64, 1024), Case(576, 16_384, 64, 2048), Case(512, 65_536, 64, 1024))
COLUMNS = (
    "2 x width, latents, k, batch",
    "seconds a step",
    "spread",
    "floor",
    "step / floor",
    "peak GiB",
)


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Time steps of a fresh crosscoder, and the parts of their floor, in this process."""
    import jax

    import crosscoder_jax as cc

    sources = cc.Sources((cc.Source("base", case.width), cc.Source("chat", case.width)))
    recipe = cc.TrainConfig(
        cc.CrosscoderConfig(sources, case.latents, sparsity=cc.BatchTopK(k=case.k)),
        num_steps=10_000,
        batch_size=case.batch,
    )
    state = cc.init_state(recipe)
    acts = jax.random.normal(jax.random.key(1), (case.batch, 2 * case.width))

    def step() -> None:
        nonlocal state
        state, metrics = cc.train_step(state, acts, config=recipe)
        jax.block_until_ready((state.params, metrics))

    seconds = times(step, rounds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    product = jax.jit(lambda acts, w_enc: jax.numpy.matmul(acts, w_enc, precision="highest"))
    w_enc = state.crosscoder().w_enc[...]
    encoder = float(np.median(times(lambda: jax.block_until_ready(product(acts, w_enc)), rounds)))
    # Weights, first and second moments of encoder and decoder, read and written.
    moved = 3 * 2 * w_enc.nbytes
    floor = encoder + moved * copy_seconds_per_byte() + acts.nbytes * copy_seconds_per_byte() / 2
    return {
        "library": "crosscoder_jax",
        "seconds": float(np.median(seconds)),
        "spread": float(np.ptp(seconds)),
        "encoder": encoder,
        "floor": floor,
        "peak": peak,
        "device": jax.devices()[0].device_kind,
        "versions": f"jax {jax.__version__}",
    }


def times(work: Callable[[], object], rounds: int) -> list[float]:
    """Return seconds of each round, after one that compiles and one that warms up."""
    taken = []
    for _ in range(rounds + 2):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return taken[2:]


def copy_seconds_per_byte() -> float:
    """Return the time to read and write a byte of an array far larger than caches."""
    source = np.ones(2**26, np.float32)
    target = np.empty_like(source)
    return float(np.median(times(lambda: np.copyto(target, source), 5))) / source.nbytes


def run(python: str, module: Sequence[str], case: Case, rounds: int) -> dict[str, Any]:
    """Measure in a process of its own, so that neither memory nor threads are shared."""
    sizes = [str(value) for value in dataclasses.astuple(case)]
    done = subprocess.run(
        [python, *module, *sizes, str(rounds)], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare(case: Case, rounds: int, turns: int, peers_python: str | None) -> list[dict[str, Any]]:
    """Measure ours and each peer in turns: A B C A B C."""
    ways = {"crosscoder_jax": (sys.executable, ["-m", "experiments.benchmarks.train_step", "--sizes"])}
    if peers_python is not None:
        peers = str(Path(__file__).with_name("peers.py"))
        ways |= {name: (peers_python, [peers, name]) for name in LIBRARIES}
    found = {name: [] for name in ways}
    for _ in range(turns):
        for name, (python, module) in ways.items():
            found[name].append(run(python, module, case, rounds))
    return [_medians(of_library) | {"case": dataclasses.asdict(case)} for of_library in found.values()]


def _medians(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    numbers = ("seconds", "spread", "encoder", "floor", "peak")
    middle = {key: float(np.median([one[key] for one in found])) for key in numbers if key in found[0]}
    return found[0] | middle


def row(found: dict[str, Any]) -> tuple[str, ...]:
    """Return a line of our own table."""
    return (
        Case(**found["case"]).name,
        f"{found['seconds']:.3f}",
        f"{found['spread']:.3f}",
        f"{found['floor']:.3f}",
        f"{found['seconds'] / found['floor']:.2f}",
        f"{found['peak'] / 2**30:.2f}",
    )


def peer_rows(found: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return a line of each library beside ours."""
    ours = found[0]
    return [
        (
            Case(**one["case"]).name,
            f"{one['library']} ({one['versions']})",
            f"{one['seconds']:.3f}",
            f"{one['seconds'] / ours['seconds']:.1f}",
            f"{one['peak'] / 2**30:.2f}",
            f"{ours['peak'] / one['peak']:.2f}",
        )
        for one in found
    ]


PEER_COLUMNS = (COLUMNS[0], "library", "seconds a step", "times ours", "peak GiB", "our peak / its")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.train_step", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps in each process")
    parser.add_argument("--turns", type=int, default=2, help="processes of each library, taking turns")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter that has the peers, see peers.py")
    parser.add_argument("--cases", type=int, nargs="*", default=list(range(len(CASES))))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--update-readme", action="store_true")
    parser.add_argument("--sizes", type=int, nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sizes:
        *sizes, rounds = options.sizes
        print(json.dumps(measure(Case(*sizes), rounds)))
        return
    found = [compare(CASES[i], options.rounds, options.turns, options.peers) for i in options.cases]
    if options.json:
        print(json.dumps(found, indent=1))
        return
    ours = markdown_table(COLUMNS, [row(of_case[0]) for of_case in found])
    where = f"{machine()}, {found[0][0]['versions']}, {time.strftime('%Y-%m-%d')}; float32, medians of "
    where += f"{options.rounds} steps in each of {options.turns} processes."
    text = f"{ours}\n{where}\n"
    if options.peers:
        rows = [line for of_case in found for line in peer_rows(of_case)]
        text = f"{ours}\n{markdown_table(PEER_COLUMNS, rows)}\n{where}\n"
    print(text)
    if options.update_readme:
        replace_section(README, "train_step", text)


def machine() -> str:
    """Return processor and number of cores."""
    import os

    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else 'an unnamed processor'}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
