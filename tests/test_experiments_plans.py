"""The sizes that are planned for, and the lines of their tables."""

import dataclasses

import pytest

from crosscoder_jax.planning import MeshPlan, Plan
from crosscoder_jax.planning.plan import ChipBytes
from crosscoder_jax.training.muon import Muon
from experiments.plans import aims, levers
from experiments.plans.__main__ import COLUMNS, README, row
from experiments.plans.sizes import SIZES
from experiments.readme import markdown_table, replace_section

GIB = 2**30
SIZE = SIZES[0]
MESH = MeshPlan(
    1,
    8,
    basis="compiled",
    is_fitting=True,
    reason="",
    bytes_per_chip=ChipBytes(GIB, 2 * GIB, 0, GIB, 4 * GIB, 0),
    hosts=2,
    xla_seconds=0.0101,
    left_out_seconds=0.0011,
    cycle_shares={"selection": 0.18},
    tokens_per_s=1_234_567.0,
    utilization=0.405,
    store_bytes_per_s=5.5e8,
)


@pytest.mark.parametrize("is_reviving", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size.topology} {size.batch_size}")
def test_every_size_is_a_run_on_all_chips(size, is_reviving):
    config = size.config(is_reviving=is_reviving)
    assert {data * latent for data, latent in config.splits()} == {config.topology.num_chips}
    assert (config.recipe().aux_k is not None) == is_reviving


def test_product_names_count_what_they_count():
    cores = {"v5p": 2, "v5e": 1, "v6e": 1}
    for size in SIZES:
        kind, number = size.product.split("-")
        chips = size.config(is_reviving=False).topology.num_chips
        assert chips * cores[kind] == int(number)


def test_a_line_tells_the_cheapest_mesh():
    plan = Plan(SIZE.config(is_reviving=False), 16 * GIB, 8_150_000_000, 10**9, (MESH,))
    line = row(SIZE, plan)
    assert line == (
        *("v5e-8", "73,728", "2,048", "1x8", "3.0", "4.0", "16", "10.1", "11.2"),
        *("1,234,567", "40%", "18%", "550", "8"),
    )
    assert len(line) == len(COLUMNS)


def test_a_line_tells_why_nothing_fits():
    refused = dataclasses.replace(MESH, is_fitting=False, reason="Used 20G of 15G hbm")
    line = row(SIZE, Plan(SIZE.config(is_reviving=False), 16 * GIB, 10**9, 10**9, (refused,)))
    assert "does not fit: Used 20G of 15G hbm" in line
    assert len(line) == len(COLUMNS)


def test_aims_are_told_from_the_plans():
    config = SIZE.config(is_reviving=False)
    # 40.5 % of peak, 18 % of the cycles for selection; 4 GiB of temporaries, 1 GiB of weights.
    assert aims.row(SIZE, Plan(config, 16 * GIB, 10**9, 10**9, (MESH,))) == (
        *("v5e-8", "73,728", "2,048"),
        *("no, 40.5%", "no, 18.0%", "no, 4.0 of them"),
    )
    better = dataclasses.replace(
        MESH,
        utilization=0.7,
        cycle_shares={"selection": 0.099},
        bytes_per_chip=ChipBytes(GIB, 2 * GIB, 0, 0, GIB // 2, 0),
    )
    line = aims.row(SIZE, Plan(config, 16 * GIB, 10**9, 10**9, (better,)))
    assert line[3:] == ("yes, 70.0%", "yes, 9.9%", "yes, 0.5 of them")
    assert len(line) == len(aims.COLUMNS)
    refused = dataclasses.replace(MESH, is_fitting=False, reason="too large")
    assert aims.row(SIZE, Plan(config, 16 * GIB, 10**9, 10**9, (refused,)))[3:] == ("does not fit",) * 3


def test_every_lever_is_one_row_of_the_published_size():
    """And of ten million latents the first and the last one."""
    levers_of = list(levers.LEVERS.values())
    assert {"optimizer": Muon()} in levers_of
    assert {"is_rematerialized": True} in levers_of
    for changes in levers_of:
        dataclasses.replace(SIZES[1].config(is_reviving=True), meshes=((2, 4),), **changes)


def test_the_readme_has_every_section_that_the_command_writes(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(README.read_text())
    for section, columns in (("aims", aims.COLUMNS), ("levers", levers.COLUMNS)):
        replace_section(readme, section, markdown_table(columns, []))
        assert f"<!-- begin {section} -->\n| {' | '.join(columns)} |" in readme.read_text()


def test_the_readme_has_both_tables_and_in_each_a_line_for_every_size():
    for section in ("without-aux-k", "with-aux-k"):
        _, _, rest = README.read_text().partition(f"<!-- begin {section} -->\n")
        table = rest.partition(f"<!-- end {section} -->")[0].splitlines()
        assert table[0] == f"| {' | '.join(COLUMNS)} |"
        assert len(table) == 2 + len(SIZES)
