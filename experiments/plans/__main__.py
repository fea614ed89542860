"""Plan every size: ``python -m experiments.plans``; ``--update-readme`` writes the tables into the README."""

import argparse
from pathlib import Path

from crosscoder_jax.planning import MeshPlan, Plan, make_plan
from experiments.plans import levers
from experiments.plans.sizes import SIZES, Size
from experiments.readme import markdown_table, replace_section

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
    for section, is_reviving in (("without-aux-k", False), ("with-aux-k", True)):
        rows = []
        for size in SIZES:
            config = size.config(is_reviving=is_reviving)
            rows.append(row(size, make_plan(config)))
            print(section, *rows[-1], sep="  ", flush=True)
        table = markdown_table(COLUMNS, rows)
        if is_updating:
            replace_section(README, section, table)
    rows = []
    for line in levers.rows():
        print("levers", *line, sep="  ", flush=True)
        rows.append(line)
    if is_updating:
        replace_section(README, "levers", markdown_table(levers.COLUMNS, rows))


if __name__ == "__main__":
    main()
