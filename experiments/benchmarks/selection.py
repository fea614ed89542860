"""The cut of BatchTopK: ``python -m experiments.benchmarks.selection``."""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crosscoder_jax.sparsity import top_scores_cut

SIZES = ((1024, 2048, 32), (2048, 16_384, 100), (4096, 2048, 32))
"""Tokens, latents and k."""
GUESS_ERROR = 0.003
"""By how much the running threshold is off: about the spread of cuts from batch to batch."""
COLUMNS = ("tokens x latents, k", "sort ms", "top_k ms", "search ms", "spread", "floor ms", "search / floor")


def typical_scores(tokens: int, latents: int, seed: int = 0) -> jax.Array:
    """Return scores as encoders give them: shifted normals of unequal spread, a part of them positive."""
    at, of = jax.random.split(jax.random.key(seed))
    spread = jnp.exp(0.5 * jax.random.normal(of, (latents,)))
    return jax.nn.relu(jax.random.normal(at, (tokens, latents)) * spread - 1)


def measure(tokens: int, latents: int, k: int, rounds: int) -> dict[str, Any]:
    """Time the search and what it replaces in turns, on the same scores; the cuts must be equal.

    The floor is one read of the scores, at half the time of a copy, which reads and writes.
    """
    scores, kept = typical_scores(tokens, latents), tokens * k
    sort = jax.jit(lambda scores: jnp.sort(scores.ravel())[-kept])
    top_k = jax.jit(lambda scores: jax.lax.top_k(scores.ravel(), kept)[0][-1])
    search = jax.jit(lambda scores, guess: top_scores_cut(scores, jnp.int32(kept), guess=guess))
    cut = sort(scores)
    guess = cut * (1 + GUESS_ERROR)
    assert cut == top_k(scores) == search(scores, guess)
    target, source = np.empty(scores.shape, np.float32), np.array(scores)
    ways: dict[str, Callable[[], Any]] = {
        "sort": lambda: sort(scores),
        "top_k": lambda: top_k(scores),
        "search": lambda: search(scores, guess),
        "copy": lambda: np.copyto(target, source),
    }
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(_seconds(way))
    medians = {name: float(np.median(taken)) for name, taken in seconds.items()}
    return {
        "tokens": tokens,
        "latents": latents,
        "k": k,
        "seconds": medians,
        "search_spread": float(np.ptp(seconds["search"])),
        "floor": medians["copy"] / 2,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _seconds(way: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(way())
    return time.perf_counter() - started


def row(found: dict[str, Any]) -> tuple[str, ...]:
    """Return a line of the table."""
    milliseconds = [1e3 * found["seconds"][name] for name in ("sort", "top_k", "search")]
    return (
        f"{found['tokens']:,} x {found['latents']:,}, {found['k']}",
        *(f"{value:.3g}" for value in milliseconds),
        f"{1e3 * found['search_spread']:.2g}",
        f"{1e3 * found['floor']:.2g}",
        f"{found['seconds']['search'] / found['floor']:.1f}",
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.selection", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = [measure(*size, rounds=options.rounds) for size in SIZES]
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{found[0]['device']}, jax {found[0]['jax']}, medians of {options.rounds} rounds")
    print("| " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|")
    for one in found:
        print("| " + " | ".join(row(one)) + " |")


if __name__ == "__main__":
    main()
