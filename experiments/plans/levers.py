"""What each way to save memory saves of a run that does not fit, or hardly."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from crosscoder_jax.planning import MeshPlan, PlanConfig, make_plan
from crosscoder_jax.training.adam import Adam
from crosscoder_jax.training.muon import Muon
from experiments.plans.sizes import SIZES, Size

COLUMNS = ("chips", "latents", "lever", "weights GiB", "moments GiB", "temporaries GiB", "of GiB", "step ms")

LEVERS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "first moment in bfloat16": {"optimizer": Adam(first_moment="bfloat16")},
    "second moment factored": {"optimizer": Adam(second_moment="factored")},
    "Muon": {"optimizer": Muon()},
    "codes made anew": {"is_rematerialized": True},
    "pre-activations in bfloat16": {"pre_acts": "bfloat16"},
    "4 micro-batches": {"micro_batches": 4},
    "16 micro-batches": {"micro_batches": 16},
    "optimizer spread over the data": {"is_optimizer_spread": True},
    "all of them": {
        "optimizer": Adam(first_moment="bfloat16", second_moment="factored"),
        "pre_acts": "bfloat16",
        "micro_batches": 4,
        "is_optimizer_spread": True,
    },
}


def rows() -> Iterator[tuple[str, ...]]:
    """Plan a published size with each, ten million latents with none and with all, and dead ones."""
    published, ten_million = SIZES[1], SIZES[7]
    for name in LEVERS:
        yield _row(published, name, (2, 4))
    for name in ("none", "all of them"):
        yield _row(ten_million, name, (1, 256))


def _row(size: Size, name: str, mesh: tuple[int, int]) -> tuple[str, ...]:
    config: PlanConfig = dataclasses.replace(size.config(is_reviving=True), meshes=(mesh,), **LEVERS[name])
    plan = make_plan(config)
    (planned,) = plan.meshes
    begin = (f"{size.product}, {mesh[0]}x{mesh[1]}", f"{config.num_latents:,}", name)
    return (*begin, *_memory(planned), f"{plan.memory_bytes / 2**30:.0f}", _milliseconds(planned))


def _memory(mesh: MeshPlan) -> tuple[str, str, str]:
    sizes = mesh.bytes_per_chip
    temporaries = mesh.reason if sizes.temporaries is None else f"{sizes.temporaries / 2**30:.1f}"
    return f"{sizes.weights / 2**30:.1f}", f"{sizes.moments / 2**30:.1f}", temporaries


def _milliseconds(mesh: MeshPlan) -> str:
    return "-" if mesh.seconds is None else f"{1e3 * mesh.seconds:.3g}"
