"""What a run needs of a topology, for every way to split it over the chips."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from crosscoder_jax.planning.chips import Chip
from crosscoder_jax.planning.compiling import compiled_steps
from crosscoder_jax.planning.config import STORED_BYTES, PlanConfig
from crosscoder_jax.planning.hosts import Hosts
from crosscoder_jax.planning.program import Collective, Program
from crosscoder_jax.planning.step import StateBytes, abstract_mesh, abstract_state, state_bytes
from crosscoder_jax.typing import Progress

PARTS = ("selection", "aux_k", "update", "dot_general")
"""Scopes of the step in the order in which an operation is told to one; dot_general is the products."""
SELECTION_PASSES = 3
"""Assumed passes of BatchTopK's search but the first; how many it takes depends on the scores and on the
guess: two to three where the running threshold is right to half a per cent."""
COPIES_WHERE_PUBLISHED = 3
"""Of the finished crosscoder in the memory of the host that writes it: its tensors, the file that safetensors
makes of them, and that as Python's bytes. Every other host has the tensors."""
Estimate = Literal["xla", "cycles"]
"""What speeds follow from: XLA's time and what it leaves out, or the compiler's cycles."""


@dataclasses.dataclass(frozen=True)
class ChipBytes:
    """Memory of one chip in bytes, by what it holds."""

    weights: int
    """Encoder, decoder, biases."""
    moments: int
    """Of the optimiser."""
    batch: int
    """Its share of the activations of one batch, and small state."""
    pre_acts: int
    """What the encoder puts out for the batch; a part of the temporaries."""
    temporaries: int | None
    """All that lives only within a step, as the compiler lays it out; ``None`` if nothing was compiled."""
    program: int
    """The compiled step, and outputs that reuse no argument."""
    assumed_temporaries: int = 0
    """What the temporaries are taken for where nothing was compiled: gradients, codes and their gradients."""

    @property
    def total(self) -> int:
        """All of it."""
        temporaries = self.assumed_temporaries if self.temporaries is None else self.temporaries
        return self.weights + self.moments + self.batch + temporaries + self.program


@dataclasses.dataclass(frozen=True)
class MeshPlan:
    """What one split over the chips needs and, as estimated, does."""

    data: int
    """Shards of the batch."""
    latent: int
    """Shards of the latents."""
    basis: Literal["compiled", "shapes"]
    """Whether the step was compiled, or sizes follow from shapes alone."""
    is_fitting: bool
    """Whether it fits into the memory of the chips."""
    reason: str
    """Why it does not fit; else empty."""
    bytes_per_chip: ChipBytes
    """Memory."""
    hosts: int
    """That the chips belong to."""
    data_shards_per_host: int = 1
    """Shards of the batch that the chips of one host hold, and that it reads; of the host that has most."""
    lanes: int = 1
    """The least ``--lanes`` with which every host reads its shards of the batch alone."""
    collectives: tuple[Collective, ...] = ()
    """Of one step, the largest first."""
    flops: float | None = None
    """Of one step on all chips, by the compiler's count: both sides of a conditional are in it."""
    model_flops: float = 0.0
    """Of a dense step on all chips: 10 * latents * width for every token."""
    xla_seconds: float | None = None
    """XLA's estimate of a step, ``optimal_seconds`` without operations of unknown time. Not a measurement;
    ``None`` where it is below what the chips' peak allows."""
    left_out_seconds: float = 0.0
    """What that estimate leaves out: the passes of float32 products but the first, and those of the
    selection's search, from shapes, at peak speed; and of loops that count all passes but the first, by the
    cycles that they take."""
    cycle_seconds: float | None = None
    """Another: the cycles the TPU compiler estimates for each operation, with the selection's passes, and
    collectives at the full speed of the links. Not a measurement."""
    cycle_shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Share of those cycles by part of the step."""
    estimate: Estimate = "xla"
    """What ``seconds`` and all that follows from it are from: the same for all meshes of a plan."""
    tokens_per_s: float | None = None
    """At the estimate ``seconds``."""
    utilization: float | None = None
    """Dense step's operations over what the chips could do in that time, estimated."""
    store_bytes_per_s: float | None = None
    """That the store must deliver to a host, the one that reads most, at that speed and with ``lanes``."""

    @property
    def seconds(self) -> float | None:
        """The estimate of a step that speeds follow from; ``None`` where there is none of that kind."""
        if self.estimate == "cycles":
            return self.cycle_seconds
        return None if self.xla_seconds is None else self.xla_seconds + self.left_out_seconds

    @property
    def chips(self) -> int:
        """How many chips it takes."""
        return self.data * self.latent


@dataclasses.dataclass(frozen=True)
class Plan:
    """All splits that were tried."""

    config: PlanConfig
    """What was planned for."""
    memory_bytes: int
    """Of one chip."""
    checkpoint_bytes: int
    """Of a training state on disk."""
    crosscoder_bytes: int
    """Of the finished crosscoder, which every host holds whole when it is published, and the first of them
    ``COPIES_WHERE_PUBLISHED`` times."""
    meshes: tuple[MeshPlan, ...]
    """By shards of the data."""

    @property
    def cheapest(self) -> MeshPlan | None:
        """The split that fits with the least chip-seconds per token, as estimated; ``None`` if none fits.

        Where nothing estimates times it is the one that takes the least memory.
        """
        fitting = [mesh for mesh in self.meshes if mesh.is_fitting]
        return min(fitting, key=_cost, default=None)


def make_plan(config: PlanConfig, progress: Progress | None = None) -> Plan:
    """Plan a run for every split of its batch and latents over the chips.

    Splits whose state alone is larger than a chip are not compiled.

    Args:
        config: run and chips.
        progress: told the splits done.

    Raises:
        ModuleNotFoundError: if the topology's compiler is not installed, naming the extra.
        ValueError: if the recipe makes no run, spreads over the chips in no way, or the compiler does not
            know the topology.
    """
    recipe, splits = config.recipe(), config.splits()
    memory = _memory_bytes(config)
    sizes = {split: _sizes(config, split) for split in splits}
    whole = next(iter(sizes.values()))[1]
    too_large = {split for split in splits if sizes[split][0].total > memory}
    is_compiled = config.topology.platform != "gpu"
    waiting = [split for split in splits if is_compiled and split not in too_large]
    planned = {split: _from_shapes(config, split, sizes[split][0], memory) for split in splits}
    if waiting:
        steps = compiled_steps(
            recipe, config.topology, waiting, is_optimizer_spread=config.is_optimizer_spread
        )
        for done, facts in enumerate(steps, start=1):
            split = (facts["mesh"][0], facts["mesh"][1])
            planned[split] = _from_compiler(config, planned[split], facts, memory)
            if progress is not None:
                progress(done, len(waiting), "meshes")
    estimate = _estimate_of_all(list(planned.values()))
    meshes = tuple(_with_speeds(config, planned[split], estimate) for split in splits)
    return Plan(config, memory, whole.total, whole.weights, meshes)


def _estimate_of_all(meshes: Sequence[MeshPlan]) -> Estimate:
    """Return the kind of estimate that there is of more of the meshes that fit: XLA's if of as many."""
    fitting = [mesh for mesh in meshes if mesh.is_fitting]
    by_xla = sum(mesh.xla_seconds is not None for mesh in fitting)
    by_cycles = sum(mesh.cycle_seconds is not None for mesh in fitting)
    return "cycles" if by_cycles > by_xla else "xla"


def _cost(mesh: MeshPlan) -> tuple[float, int]:
    seconds = mesh.seconds
    # Without an estimate the split that leaves most memory free.
    return (float("inf") if seconds is None else seconds * mesh.chips, mesh.bytes_per_chip.total)


def _memory_bytes(config: PlanConfig) -> int:
    if config.topology.chip is not None:
        return config.topology.chip.memory_bytes
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return memory // config.topology.num_chips


def _sizes(config: PlanConfig, split: tuple[int, int]) -> tuple[StateBytes, StateBytes]:
    mesh = abstract_mesh(*split)
    state = abstract_state(config.recipe(), mesh, is_optimizer_spread=config.is_optimizer_spread)
    return state_bytes(state, mesh)


def _from_shapes(config: PlanConfig, split: tuple[int, int], state: StateBytes, memory: int) -> MeshPlan:
    data, latent = split
    width, codes = sum(config.widths), (config.batch_size // data) * (config.num_latents // latent)
    pre_acts = (2 if config.pre_acts == "bfloat16" else 4) * codes
    sizes = ChipBytes(
        weights=state.weights,
        moments=state.moments,
        batch=state.statistics + 4 * width * config.batch_size // data,
        pre_acts=pre_acts,
        temporaries=None,
        program=0,
        assumed_temporaries=pre_acts + _gradient_bytes(config, state.weights, 4 * codes),
    )
    chip = config.topology.chip
    per_host = config.topology.num_chips if chip is None else chip.per_host
    reason = ""
    if sizes.total > memory:
        needed = f"{sizes.total / 2**30:,.1f} GiB by shapes"
        reason = f"its state alone is {state.total / 2**30:,.1f} GiB" if state.total > memory else needed
    # As JAX lists them, chips of a host are neighbours.
    hosts = Hosts.of(np.arange(data * latent).reshape(data, latent) // per_host)
    return MeshPlan(
        data,
        latent,
        basis="shapes",
        is_fitting=not reason,
        reason=reason,
        bytes_per_chip=sizes,
        hosts=hosts.number,
        data_shards_per_host=hosts.data_shards,
        lanes=hosts.lanes,
        model_flops=10.0 * config.num_latents * width * config.batch_size,
    )


def _gradient_bytes(config: PlanConfig, weights: int, code: int) -> int:
    """Return what a step takes for gradients and codes beside the pre-activations, where nothing is compiled.

    A gradient like the weights, the code and its gradient. Reviving adds the decoder's gradient of its own,
    the code of dead latents, its gradient and what they are ranked by. Of a batch in parts the codes are
    those of a part, and its gradients lie beside the sum of those before. Codes that are made anew for the
    backward pass take as much, since one is there at a time either way. As many as the TPU compiler lays out
    for 73,728 latents on 2x4 chips, within 15 %.

    Args:
        config: run and chips.
        weights: bytes of the weights of a chip.
        code: bytes of one code of a chip's tokens.
    """
    is_in_parts, is_reviving = config.micro_batches > 1, bool(config.aux_k_weight)
    gradients, codes = (1.5, 2) if is_in_parts else (1.0, 2)
    if is_reviving:
        gradients, codes = gradients + (3.0 if is_in_parts else 0.5), codes + 3
    return round(gradients * weights) + codes * code // config.micro_batches


def _from_compiler(config: PlanConfig, shapes: MeshPlan, facts: Mapping[str, Any], memory: int) -> MeshPlan:
    if "no_mesh" in facts:
        return dataclasses.replace(shapes, is_fitting=False, reason=facts["no_mesh"])
    hosts = Hosts.of(np.array(facts["processes"]))
    shapes = dataclasses.replace(
        shapes,
        basis="compiled",
        hosts=hosts.number,
        data_shards_per_host=hosts.data_shards,
        lanes=hosts.lanes,
    )
    if "refusal" in facts:
        return dataclasses.replace(shapes, is_fitting=False, reason=_lacking(facts["refusal"]))
    sizes = dataclasses.replace(
        shapes.bytes_per_chip,
        batch=facts["arguments"] - shapes.bytes_per_chip.weights - shapes.bytes_per_chip.moments,
        temporaries=facts["temporaries"],
        program=facts["program"] + facts["outputs"] - facts["aliased"],
    )
    is_fitting = sizes.total <= memory
    program = Program(facts["text"], (shapes.data, shapes.latent), loop_passes=SELECTION_PASSES)
    measured = dataclasses.replace(
        shapes,
        is_fitting=is_fitting,
        reason="" if is_fitting else f"{sizes.total / 2**30:,.1f} GiB",
        bytes_per_chip=sizes,
        collectives=tuple(program.collectives()),
        flops=None if facts["flops"] is None else facts["flops"] * shapes.chips,
    )
    seconds = _without_unknown(
        facts["optimal_seconds"], program.num_custom_calls, _least_seconds(config, measured)
    )
    return _with_times(config, measured, seconds, program)


def _least_seconds(config: PlanConfig, mesh: MeshPlan) -> float:
    """Return what the chips need at least for what XLA counts, which is one part of a batch in parts.

    One of the five products of a step, the encoder's, is of the whole batch.
    """
    chip, counted = config.topology.chip, (1 + 4 / config.micro_batches) / 5
    return 0.0 if chip is None else counted * mesh.model_flops / (chip.peak_flops * mesh.chips)


def _without_unknown(seconds: float | None, num_unknown: int, least: float) -> float | None:
    """Return XLA's estimate without the operations of unknown time, each of which it counts as -1 second.

    Some of them it does not count, so as many are added back as the chips' peak asks for.

    Examples:
        >>> round(_without_unknown(-6.9, 11, least=0.05), 3)
        0.1
    """
    if not seconds:
        return None
    candidates = (seconds + number for number in range(num_unknown + 1))
    return next((candidate for candidate in candidates if candidate >= least), None)


def _lacking(refusal: str) -> str:
    """Return the numbers of a compiler's refusal.

    Examples:
        >>> _lacking("Ran out of memory on HBM, temporaries (23.02G) exceeds available HBM (15.75G).")
        'temporaries of 23.02G, 15.75G there'
        >>> _lacking("Ran out of memory in memory space hbm. Used 20.5G of 15.7G hbm. Exceeded")
        '20.5G used, 15.7G there'
    """
    if found := re.search(r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", refusal):
        return f"temporaries of {found[1]}, {found[2]} there"
    if found := re.search(r"Used ([\d.]+\w) of ([\d.]+\w)", refusal):
        return f"{found[1]} used, {found[2]} there"
    return " ".join(refusal.split())[:200]


def _with_times(config: PlanConfig, mesh: MeshPlan, xla_seconds: float | None, program: Program) -> MeshPlan:
    cycles = program.cycles(PARTS)
    chip, total = config.topology.chip, sum(cycles.values())
    if chip is None or chip.clock_hz is None:
        return mesh
    linked = _link_seconds(mesh.collectives, chip.link_bytes_per_s)
    return dataclasses.replace(
        mesh,
        xla_seconds=xla_seconds,
        left_out_seconds=_left_out_seconds(config, mesh, chip) + _repeated_seconds(xla_seconds, program),
        cycle_seconds=total / chip.clock_hz + linked if total else None,
        cycle_shares={part: part_cycles / total for part, part_cycles in cycles.items()},
    )


def _with_speeds(config: PlanConfig, mesh: MeshPlan, estimate: Estimate) -> MeshPlan:
    """Return a mesh with what follows from one kind of estimate of its step."""
    mesh, chip = dataclasses.replace(mesh, estimate=estimate), config.topology.chip
    if chip is None or mesh.seconds is None:
        return mesh
    tokens_per_s = config.batch_size / mesh.seconds
    bytes_per_token = sum(config.widths) * STORED_BYTES[config.stored_dtype]
    return dataclasses.replace(
        mesh,
        tokens_per_s=tokens_per_s,
        utilization=mesh.model_flops / (mesh.seconds * chip.peak_flops * mesh.chips),
        store_bytes_per_s=tokens_per_s * bytes_per_token * mesh.data_shards_per_host / mesh.data,
    )


def _left_out_seconds(config: PlanConfig, mesh: MeshPlan, chip: Chip) -> float:
    """Return what XLA's estimate of a step leaves out.

    It counts a product of float32 once, which takes TPUs up to six passes in bfloat16, and a loop once.
    """
    both, one_side = {"default": (1, 1), "high": (3, 2), "highest": (6, 3)}[config.precision]
    # Two of the five products of a step have no gradient in them; reviving adds one of three.
    passes = [both] * 5 if config.dtype == "float32" else [1, 1, *[one_side] * 3]
    if config.aux_k_weight:
        passes += [both] * 3 if config.dtype == "float32" else [1, one_side, one_side]
    flops = mesh.model_flops / 5 * sum(number - 1 for number in passes)
    searched = (SELECTION_PASSES - 1) * mesh.bytes_per_chip.pre_acts
    return flops / (chip.peak_flops * mesh.chips) + searched / chip.memory_bytes_per_s


def _repeated_seconds(xla_seconds: float | None, program: Program) -> float:
    return 0.0 if xla_seconds is None else xla_seconds * (program.repetition - 1)


def _link_seconds(collectives: Sequence[Collective], bytes_per_s: float) -> float:
    """Return how long the collectives take at the full speed of the links, as rings send them."""
    rounds = {"all-reduce": 2, "collective-permute": 1}
    sent = sum(
        rounds.get(one.kind, 1) * one.passes * one.num_bytes * (one.group_size - 1) / max(one.group_size, 1)
        for one in collectives
    )
    return sent / bytes_per_s
