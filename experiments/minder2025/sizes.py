"""What the runs need: ``python -m experiments.minder2025.sizes``; ``--update-readme`` writes the table."""

import argparse
from pathlib import Path

from crosscoder_jax.planning import MeshPlan, PlanConfig, Topology, make_plan
from experiments.minder2025.pairs import (
    BATCH_SIZE,
    EPOCHS,
    HARDWARE,
    HELD_OUT,
    PAIRS,
    TOKENS,
    Hardware,
    Pair,
)
from experiments.readme import markdown_table, replace_section

README = Path(__file__).with_name("README.md")
COLUMNS = ("pair", "on", "store TB", "state GiB a chip", "all GiB a chip", "of GiB", "hours", "reported")
_STORED_BYTES = 2


def plan_config(pair: Pair, hardware: Hardware) -> PlanConfig:
    """Return what to plan for: the published float32, every product at highest precision."""
    return PlanConfig(
        topology=Topology.parse(hardware.topology),
        widths=(pair.width, pair.width),
        num_latents=pair.num_latents,
        k=100.0,
        batch_size=BATCH_SIZE,
        dtype="float32",
        meshes=((hardware.data_shards, hardware.latent_shards),),
    )


def store_bytes(pair: Pair) -> int:
    """Return the size of the activations on disk."""
    return round(TOKENS / (1 - HELD_OUT)) * 2 * pair.width * _STORED_BYTES


def row(pair: Pair, hardware: Hardware) -> tuple[str, ...]:
    """Return a line of the table."""
    plan = make_plan(plan_config(pair, hardware))
    (mesh,) = plan.meshes
    sizes = mesh.bytes_per_chip
    return (
        pair.name,
        hardware.name,
        f"{store_bytes(pair) / 1e12:.2f}",
        f"{(sizes.weights + sizes.moments) / 2**30:.1f}",
        f"{sizes.total / 2**30:.1f}" if mesh.is_fitting else f"{sizes.total / 2**30:.1f}, does not fit",
        f"{plan.memory_bytes / 2**30:.0f}",
        hours(mesh),
        pair.published,
    )


def hours(mesh: MeshPlan) -> str:
    """Return the estimate of the whole training, or that there is none."""
    if mesh.seconds is None:
        return "-"
    return f"{mesh.seconds * (EPOCHS * TOKENS // BATCH_SIZE) / 3600:.1f}"


def main() -> None:
    """Plan every pair on every hardware but the machine at hand."""
    parser = argparse.ArgumentParser(prog="python -m experiments.minder2025.sizes", description=__doc__)
    parser.add_argument("--update-readme", action="store_true")
    is_updating = parser.parse_args().update_readme
    chips = [hardware for hardware in HARDWARE.values() if hardware.name != "cpu"]
    rows = []
    for pair in PAIRS.values():
        for hardware in chips:
            rows.append(row(pair, hardware))
            print(*rows[-1], sep="  ", flush=True)
    if is_updating:
        replace_section(README, "sizes", markdown_table(COLUMNS, rows))


if __name__ == "__main__":
    main()
