"""A plan as tables, sentences and plain data."""

import dataclasses
from typing import Any, NamedTuple

from crosscoder_jax.configs import config_to_json
from crosscoder_jax.planning.config import PlanConfig
from crosscoder_jax.planning.plan import SELECTION_PASSES, MeshPlan, Plan

PART_NAMES = {
    "dot_general": "products",
    "selection": "selection",
    "aux_k": "revival of dead latents",
    "update": "Adam",
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
    return Table(
        "One step, as the compiler estimates it: nothing here is a measurement",
        (*columns, "MB/s"),
        tuple(_step_row(mesh) for mesh in compiled),
    )


LEGEND = (
    "mesh: shards of the batch x shards of the latents.  pre-acts: what the encoder puts out, a part of the "
    "temporaries.  data MB, latent MB: what collectives over that axis leave on a chip.  XLA ms: its "
    "optimal_seconds.  step ms: that and what it leaves out, further passes of float32 products, of the "
    f"selection's search ({SELECTION_PASSES}) and of other loops.  peak: FLOPs of the dense step, 10 x "
    "latents x width a token, of what the chips can do in bfloat16 in that time.  select: share of the "
    "compiler's cycles.  MB/s: what the store must deliver to each host."
)
"""What the columns are."""


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
        return [
            f"No mesh fits into {plan.memory_bytes / 2**30:,.0f} GiB a chip: take more chips, a smaller "
            "--batch-size, or --dtype bfloat16"
        ]
    lines = [f"Cheapest mesh that fits: {mesh.data}x{mesh.latent}{_speed(mesh)}"]
    if mesh.cycle_shares:
        shares = (
            f"{name} {mesh.cycle_shares[part]:.0%}"
            for part, name in PART_NAMES.items()
            if mesh.cycle_shares.get(part, 0) >= 0.005
        )
        lines.append(
            f"Where its cycles go ({_short(mesh.cycle_seconds, 1e3)} ms by them): {', '.join(shares)}"
        )
    if mesh.seconds is None and plan.config.topology.chip is not None:
        lines.append(_at_peak(plan, mesh))
    if mesh.store_bytes_per_s is not None:
        hosts = "the host" if mesh.hosts == 1 else f"each of {mesh.hosts} hosts"
        lines.append(f"The store must deliver {_bytes(mesh.store_bytes_per_s)}/s to {hosts}")
    lines.append(f"A checkpoint takes {_bytes(plan.checkpoint_bytes)}")
    return lines


def _at_peak(plan: Plan, mesh: MeshPlan) -> str:
    chip = plan.config.topology.chip
    assert chip is not None
    seconds = mesh.model_flops / (chip.peak_flops * mesh.chips)
    return (
        f"A dense step is {mesh.model_flops / 1e12:,.4g} TFLOP: at the chips' peak, so no faster than "
        f"{seconds * 1e3:,.3g} ms or {plan.config.batch_size / seconds:,.0f} tokens/s"
    )


def _speed(mesh: MeshPlan) -> str:
    if mesh.tokens_per_s is None or mesh.utilization is None:
        return ""
    return f", estimated {mesh.tokens_per_s:,.0f} tokens/s, {mesh.utilization:.0%} of peak"


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Return all of a plan as plain data; bytes, seconds and shares without units."""
    return {
        "config": config_to_json(plan.config),
        "memory_bytes": plan.memory_bytes,
        "checkpoint_bytes": plan.checkpoint_bytes,
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
