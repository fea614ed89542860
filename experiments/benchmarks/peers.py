"""One training step of other libraries: ``PYTHON peers.py LIBRARY WIDTH LATENTS K BATCH ROUNDS``.

Needs torch and the library, and nothing of ours, so that it runs in an environment of its own::

    pip install --no-deps dictionary-learning eai-sparsify
    pip install torch==2.13.0 accelerate circuitsvis datasets einops natsort nnsight
    pip install schedulefree simple-parsing transformers

Each with its defaults. They train one model: two sources of a width are one of twice that, at the same cost.
"""
# The libraries are in an environment of their own.
# pyright: reportMissingImports=false

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable

LIBRARIES = ("dictionary-learning", "eai-sparsify")


def dictionary_learning(width: int, latents: int, k: int, batch: int) -> Callable[[], None]:
    """Return a step of its BatchTopK trainer."""
    import torch
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    trainer = BatchTopKTrainer(10_000, 2 * width, latents, k, layer=0, lm_name="none", device="cpu")
    acts, steps = torch.randn(batch, 2 * width), iter(range(1, 10_000))
    return lambda: trainer.update(next(steps), acts)


def sparsify(width: int, latents: int, k: int, batch: int) -> Callable[[], None]:
    """Return a step of its TopK coder, in the order of its trainer, with its default optimiser."""
    import torch
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    coder = SparseCoder(2 * width, SparseCoderConfig(num_latents=latents, k=k))
    rate = 5e-3 / (latents / 2**14) ** 0.5
    optimizer = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=rate), momentum=0.95)
    optimizer.train()
    acts = torch.randn(batch, 2 * width)

    def step() -> None:
        coder.set_decoder_norm_to_unit_norm()
        coder(acts).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Measure one library."""
    library, *numbers = sys.argv[1:]
    *sizes, rounds = (int(number) for number in numbers)
    import torch

    step = {"dictionary-learning": dictionary_learning, "eai-sparsify": sparsify}[library](*sizes)
    seconds = []
    for _ in range(rounds + 2):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    from importlib.metadata import version

    print(
        json.dumps(
            {
                "library": library,
                "seconds": statistics.median(seconds[2:]),
                "spread": max(seconds[2:]) - min(seconds[2:]),
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "versions": f"{version(library)}, torch {torch.__version__}",
            }
        )
    )


if __name__ == "__main__":
    main()
