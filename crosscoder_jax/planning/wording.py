"""A plan as tables, sentences and plain data."""

import dataclasses
from typing import Any, NamedTuple

from crosscoder_jax.configs import config_to_json
from crosscoder_jax.planning.config import PlanConfig
from crosscoder_jax.planning.plan import COPIES_WHERE_PUBLISHED, SELECTION_PASSES, MeshPlan, Plan
from crosscoder_jax.training.adam import Adam
from crosscoder_jax.training.muon import Muon

PART_NAMES = {
    "dot_general": "products",
    "selection": "selection",
    "aux_k": "revival of dead latents",
    "update": "{optimizer}",
    "other": "the rest",
}
"""What the parts of a step are called, in the order in which they are told."""


class Table(NamedTuple):
    """Columns and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def describe(config: PlanConfig) -> str:
    """Return run and chips in a line."""
    topology = config.topology
    revival = "AuxK" if config.aux_k_weight else "no AuxK"
    memory = f" of {topology.chip.memory_bytes / 2**30:,.0f} GiB" if topology.chip else ""
    widths = " + ".join(f"{width:,}" for width in config.widths)
    chips = "chip" if topology.num_chips == 1 else "chips"
    return (
        f"{topology.name}: {topology.num_chips} {chips}{memory}; {config.num_latents:,} latents of width "
        f"{widths}, k {config.k:g}, batch {config.batch_size:,}, {config.dtype} "
        f"at precision {config.precision}, {revival}"
    )


def memory_table(plan: Plan) -> Table:
    """Return what every split takes of a chip's memory, in GiB."""
    rows = []
    for mesh in plan.meshes:
        sizes = mesh.bytes_per_chip
        is_whole = mesh.basis == "shapes" or sizes.temporaries is not None  # else the compiler refused it
        rows.append(
            (
                f"{mesh.data}x{mesh.latent}",
                "yes" if mesh.is_fitting else "NO",
                _gib(sizes.total) if is_whole else "-",
                _gib(sizes.weights),
                _gib(sizes.moments),
                _gib(sizes.batch),
                _gib(sizes.pre_acts),
                "-" if sizes.temporaries is None else _gib(sizes.temporaries),
                mesh.reason,
            )
        )
    columns = ("mesh", "fits", "total", "weights", "moments", "batch", "pre-acts", "temporaries")
    if any(mesh.reason for mesh in plan.meshes):
        columns = (*columns, "why not")
    title = f"Memory of one chip, GiB ({plan.memory_bytes / 2**30:,.0f} there){_basis(plan)}"
    return Table(title, columns, tuple(row[: len(columns)] for row in rows))


def _basis(plan: Plan) -> str:
    if any(mesh.basis == "compiled" for mesh in plan.meshes):
        return ""
    if plan.config.topology.platform == "gpu":
        return ": sizes from shapes alone, no compiler for GPUs is used"
    return ": sizes from shapes alone"


def step_table(plan: Plan) -> Table | None:
    """Return what a step of every compiled split does; ``None`` if none was compiled."""
    compiled = [mesh for mesh in plan.meshes if mesh.flops is not None]
    if not compiled:
        return None
    columns = ("mesh", "TFLOP", "data MB", "latent MB", "XLA ms", "step ms", "tokens/s", "peak", "select")
    by_cycles = " (step ms by its cycles, as XLA tells no time of some mesh)" if _is_by_cycles(plan) else ""
    return Table(
        f"One step, as the compiler estimates it{by_cycles}: nothing here is a measurement",
        (*columns, "MB/s"),
        tuple(_step_row(mesh) for mesh in compiled),
    )


LEGEND = (
    "mesh: shards of the batch x shards of the latents.  pre-acts: what the encoder puts out, a part of the "
    "temporaries.  data MB, latent MB: what collectives over that axis leave on a chip.  XLA ms: its "
    "optimal_seconds.  step ms: that and what it leaves out, further passes of float32 products, of the "
    f"selection's search ({SELECTION_PASSES}) and of other loops.  peak: FLOPs of the dense step, 10 x "
    "latents x width a token, of what the chips can do in bfloat16 in that time.  select: share of the "
    "compiler's cycles.  MB/s: what the store must deliver to the host that reads most, if train is given "
    "--lanes with which each reads the rows of its chips alone."
)
"""What the columns are."""


def _is_by_cycles(plan: Plan) -> bool:
    return any(mesh.estimate == "cycles" for mesh in plan.meshes)


def _step_row(mesh: MeshPlan) -> tuple[str, ...]:
    return (
        f"{mesh.data}x{mesh.latent}",
        _short(mesh.flops, 1e-12),
        _short(_sent(mesh, over="data"), 1e-6),
        _short(_sent(mesh, over="latent"), 1e-6),
        _short(mesh.xla_seconds, 1e3),
        _short(mesh.seconds, 1e3),
        _short(mesh.tokens_per_s),
        _percent(mesh.utilization),
        _percent(mesh.cycle_shares.get("selection")),
        _short(mesh.store_bytes_per_s, 1e-6),
    )


def _sent(mesh: MeshPlan, *, over: str) -> int | None:
    """Return the bytes of the collectives over one axis; those over both count with the latents."""
    sent = sum(
        one.passes * one.num_bytes
        for one in mesh.collectives
        if (one.axes == ("data",) if over == "data" else one.axes != ("data",))
    )
    return sent or None


def _short(value: float | None, scale: float = 1.0) -> str:
    """Return a number in three digits.

    Examples:
        >>> _short(25_932.1), _short(0.0253, 1e3), _short(None)
        ('25,932', '25.3', '-')
    """
    if value is None:
        return "-"
    value *= scale
    if value >= 1e6:
        return f"{value / 1e6:,.3g}M"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def closing_lines(plan: Plan) -> list[str]:
    """Return the cheapest split and what it asks for, or that none fits and what would help."""
    mesh = plan.cheapest
    if mesh is None:
        there = f"{plan.memory_bytes / 2**30:,.0f} GiB a chip"
        return [f"No mesh fits into {there}: {_remedies(plan.config)}"]
    lines = [_choice(plan, mesh)]
    if mesh.cycle_shares:
        shares = (
            f"{name.format(optimizer=_optimizer(plan.config))} {mesh.cycle_shares[part]:.0%}"
            for part, name in PART_NAMES.items()
            if mesh.cycle_shares.get(part, 0) >= 0.005
        )
        lines.append(
            f"Where its cycles go ({_short(mesh.cycle_seconds, 1e3)} ms by them): {', '.join(shares)}"
        )
    if mesh.seconds is None and plan.config.topology.chip is not None:
        lines.append(_at_peak(plan, mesh))
    if mesh.store_bytes_per_s is not None:
        lines.append(_reading(mesh, mesh.store_bytes_per_s))
    lines.append(f"A checkpoint takes {_bytes(plan.checkpoint_bytes)}")
    lines.append(_publishing(plan, mesh))
    return lines


def _choice(plan: Plan, mesh: MeshPlan) -> str:
    if mesh.tokens_per_s is None or mesh.utilization is None:
        says = "the one that takes the least memory, as nothing here estimates times"
        return f"Cheapest mesh that fits: {mesh.data}x{mesh.latent}, {says}"
    by_cycles = " by the compiler's cycles" if _is_by_cycles(plan) else ""
    return (
        f"Cheapest mesh that fits: {mesh.data}x{mesh.latent}, estimated {mesh.tokens_per_s:,.0f} tokens/s, "
        f"{mesh.utilization:.0%} of peak{by_cycles}"
    )


def _optimizer(config: PlanConfig) -> str:
    return "Muon" if isinstance(config.optimizer, Muon) else "Adam"


def _remedies(config: PlanConfig) -> str:
    """Return what would take less memory and is not asked for yet."""
    options = {
        "--micro-batches": config.micro_batches == 1,
        "--is-rematerialized": not config.is_rematerialized and config.micro_batches == 1,
        "--is-optimizer-spread": not config.is_optimizer_spread,
        "--first-moment bfloat16": config.optimizer.first_moment == "full",
        "--second-moment factored": isinstance(config.optimizer, Adam)
        and config.optimizer.second_moment == "full",
        "--pre-acts bfloat16": config.pre_acts == "full",
        "--dtype bfloat16": config.dtype == "float32",
    }
    left = [option for option, is_left in options.items() if is_left]
    first = "take more chips or a smaller --batch-size"
    return f"{first}, or save memory with {', '.join(left)}" if left else first


def _reading(mesh: MeshPlan, bytes_per_s: float) -> str:
    """Return how fast hosts must read, and what makes each of them read no more than that."""
    if mesh.hosts == 1:
        return f"The store must deliver {_bytes(bytes_per_s)}/s to the host"
    says = f"The store must deliver {_bytes(bytes_per_s)}/s to each of {mesh.hosts} hosts"
    if mesh.lanes == 1:
        return f"{says}, which all need every row"
    whole = bytes_per_s * mesh.data / mesh.data_shards_per_host
    return (
        f"{says} if train is given --lanes {mesh.lanes} or a multiple; without, every host reads the whole "
        f"store, at {_bytes(whole)}/s"
    )


def _publishing(plan: Plan, mesh: MeshPlan) -> str:
    size, most = _bytes(plan.crosscoder_bytes), _bytes(COPIES_WHERE_PUBLISHED * plan.crosscoder_bytes)
    if mesh.hosts == 1:
        return f"To finish the host needs {most} of memory, {COPIES_WHERE_PUBLISHED} times the crosscoder"
    says = f"To finish each of {mesh.hosts} hosts needs {size} of memory, the whole crosscoder"
    return f"{says}, and the first one {most}"


def _at_peak(plan: Plan, mesh: MeshPlan) -> str:
    chip = plan.config.topology.chip
    assert chip is not None
    seconds = mesh.model_flops / (chip.peak_flops * mesh.chips)
    return (
        f"A dense step is {mesh.model_flops / 1e12:,.4g} TFLOP: at the chips' peak, so no faster than "
        f"{seconds * 1e3:,.3g} ms or {plan.config.batch_size / seconds:,.0f} tokens/s"
    )


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Return all of a plan as plain data; bytes, seconds and shares without units."""
    return {
        "config": config_to_json(plan.config),
        "memory_bytes": plan.memory_bytes,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "crosscoder_bytes": plan.crosscoder_bytes,
        "finishing_bytes": COPIES_WHERE_PUBLISHED * plan.crosscoder_bytes,
        "times_are": "estimates of compilers, not measurements",
        "cheapest": None if plan.cheapest is None else [plan.cheapest.data, plan.cheapest.latent],
        "meshes": [_mesh_to_json(mesh) for mesh in plan.meshes],
    }


def _mesh_to_json(mesh: MeshPlan) -> dict[str, Any]:
    data = dataclasses.asdict(mesh)
    data["bytes_per_chip"]["total"] = mesh.bytes_per_chip.total
    data["chips"] = mesh.chips
    return data


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f}" if size < 10 * 2**30 else f"{size / 2**30:,.1f}"


def _bytes(size: float) -> str:
    """Return a size in the unit that suits it.

    Examples:
        >>> _bytes(2_147_483_648), _bytes(950)
        ('2.15 GB', '950 B')
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
