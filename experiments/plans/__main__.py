"""Plan every size: ``python -m experiments.plans``; ``--update-readme`` writes the tables into the README."""

import argparse
from pathlib import Path

from crosscoder_jax.planning import MeshPlan, Plan, make_plan
from experiments.plans import aims, levers
from experiments.plans.sizes import SIZES, Size
from experiments.readme import markdown_table, replace_section

Line = tuple[str, ...]
README = Path(__file__).parent / "README.md"
COLUMNS = (
    *("chips", "latents", "batch", "mesh", "state GiB", "temporaries GiB", "of GiB", "XLA ms", "step ms"),
    *("tokens/s", "of peak", "selecting", "MB/s a host", "checkpoint GB"),
)


def row(size: Size, plan: Plan) -> tuple[str, ...]:
    """Return a line of the table: the cheapest mesh, or why there is none."""
    there = f"{plan.memory_bytes / 2**30:.0f}"
    begin = (size.product, f"{plan.config.num_latents:,}", f"{size.batch_size:,}")
    checkpoint = f"{plan.checkpoint_bytes / 1e9:,.0f}"
    mesh = plan.cheapest
    if mesh is None:
        closest = plan.meshes[0]
        reasons = f"does not fit: {closest.reason}"
        state = closest.bytes_per_chip.weights + closest.bytes_per_chip.moments
        return (*begin, "-", f"{state / 2**30:.1f}", reasons, there, *["-"] * 6, checkpoint)
    return (*begin, *_numbers(mesh, there), checkpoint)


def _numbers(mesh: MeshPlan, there: str) -> tuple[str, ...]:
    sizes = mesh.bytes_per_chip
    milliseconds = "-" if mesh.xla_seconds is None else f"{1e3 * mesh.xla_seconds:.3g}"
    return (
        f"{mesh.data}x{mesh.latent}",
        f"{(sizes.weights + sizes.moments) / 2**30:.1f}",
        f"{(sizes.temporaries or 0) / 2**30:.1f}",
        there,
        milliseconds,
        f"{1e3 * (mesh.seconds or 0):.3g}",
        f"{mesh.tokens_per_s or 0:,.0f}",
        f"{mesh.utilization or 0:.0%}",
        f"{mesh.cycle_shares.get('selection', 0):.0%}",
        f"{(mesh.store_bytes_per_s or 0) / 1e6:,.0f}",
    )


def main() -> None:
    """Plan every size without AuxK and with it."""
    parser = argparse.ArgumentParser(prog="python -m experiments.plans", description=__doc__)
    parser.add_argument("--update-readme", action="store_true")
    is_updating = parser.parse_args().update_readme
    sections: dict[str, tuple[Line, list[Line]]] = {}
    for section, is_reviving in (("without-aux-k", False), ("with-aux-k", True)):
        lines, met = [], []
        for size in SIZES:
            plan = make_plan(size.config(is_reviving=is_reviving))
            lines.append(_told(section, row(size, plan)))
            met.append(aims.row(size, plan))
        sections[section] = COLUMNS, lines
        if not is_reviving:
            sections["aims"] = aims.COLUMNS, [_told("aims", line) for line in met]
    sections["levers"] = levers.COLUMNS, [_told("levers", line) for line in levers.rows()]
    if is_updating:
        for section, (columns, lines) in sections.items():
            replace_section(README, section, markdown_table(columns, lines))


def _told(section: str, line: Line) -> Line:
    print(section, *line, sep="  ", flush=True)
    return line


if __name__ == "__main__":
    main()
