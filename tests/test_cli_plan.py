"""The command `plan`: its options, its tables, its JSON."""

import dataclasses
import json
import shlex

import pytest

from crosscoder_jax import cli
from crosscoder_jax.planning import PlanConfig, Topology
from crosscoder_jax.sources import Source, Sources

GPU = "plan --topology 2xA100-40GB --sources 6,10 --latents 64 --k 4 --batch 32"
"""Planned from shapes, so at once."""


def test_options_are_those_of_the_plan():
    words = (
        "--topology v5p:4x4x8 --sources 2304,2304 --latents 1048576 --k 128 --batch 65536 --dtype bfloat16"
    )
    command = cli.parse("plan", [*words.split(), "--meshes", "8x16", "1x128"])
    assert command.config() == PlanConfig(
        Topology.parse("v5p:4x4x8"),
        (2304, 2304),
        1_048_576,
        k=128.0,
        batch_size=65_536,
        meshes=((8, 16), (1, 128)),
    )
    assert cli.parse("plan", ["--topology=cpu:1", "--sources=4", "--latents=8"]).num_latents == 8


def test_the_json_is_all_that_is_printed(capsys):
    cli.main([*shlex.split(GPU), "--json"])
    printed = capsys.readouterr()
    data = json.loads(printed.out)
    assert data["config"]["num_latents"] == 64
    assert [(mesh["data"], mesh["latent"]) for mesh in data["meshes"]] == [(1, 2), (2, 1)]
    assert data["cheapest"] in ([1, 2], [2, 1])


def test_the_tables_fit_a_terminal_of_100_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    cli.main(shlex.split(GPU))
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line and line[0] in "┏┃┡│└"]
    assert len(table) >= 6
    assert max(len(line) for line in table) <= 100
    assert lines[0].startswith("2xA100-40GB: 2 chips of 37 GiB; 64 latents of width 6 + 10, k 4, batch 32")
    assert any(line.endswith("sizes from shapes alone, no compiler for GPUs is used") for line in lines)
    assert any(line.startswith("Cheapest mesh that fits: ") for line in lines)


def test_what_is_planned_is_what_train_would_run():
    sources = Sources((Source("source0", 6), Source("source1", 10)))
    words = ["--num-latents", "64", "--k", "4", "--dtype", "bfloat16", "--precision", "default"]
    trained = cli.parse("train", ["--store", "store", "--output", "run", *words]).recipe(sources)
    planned = cli.parse("plan", ["--topology", "cpu:1", "--sources", "6,10", *words]).config().recipe()
    assert planned == dataclasses.replace(trained, num_steps=planned.num_steps)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--topology v5q:2x2 --sources 8", "error: --topology='v5q:2x2' is not known, perhaps 'v5"),
        (
            "--topology cpu:2 --sources 8,x",
            "error: --sources=8,x must be whole numbers with ',' between them",
        ),
        ("--topology cpu:2 --sources 8 --meshes 2", "error: --meshes=2 must be shards of the data x shards"),
        ("--topology cpu:2 --sources 8 --meshes 3x1", "error: --meshes=3x1 needs 3 chips, and cpu:2 has 2"),
        ("--topology cpu:2 --sources 8 --latents 0", "error: --num-latents=0 must be positive"),
        ("--topology cpu:4 --sources 8 --latents 101 --k 1 --batch 3", "error: --num-latents=101 and"),
        (
            "--topology cpu:2 --sources 8 --latents 9",
            "error: --k=100.0 active latents per token are more than",
        ),
    ],
)
def test_mistakes_are_one_line_that_names_the_option(options, says, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["plan", *options.split()])
    assert exit_.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line.startswith(says)
