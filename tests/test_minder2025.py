"""The published runs: their numbers, what they need, and the whole way on tiny models."""

import dataclasses
import re
from pathlib import Path

import pytest
import tyro
from processes import Together, free_port

import crosscoder_jax as cc
from experiments.minder2025.pairs import HARDWARE, PAIRS, harvest_command, train_command
from experiments.minder2025.sizes import hours, plan_config, row, store_bytes
from experiments.minder2025.smoke import small_harvest, small_train

GEMMA = PAIRS["gemma-2-2b"]
H200 = HARDWARE["h200"]


def test_the_recipe_is_the_published_one():
    train = train_command(GEMMA, Path("run"), H200)
    assert (train.num_latents, train.num_steps) == (73_728, 97_656)
    recipe = train.recipe(cc.Sources((cc.Source("base", 2304), cc.Source("chat", 2304))))
    assert recipe.crosscoder.sparsity == cc.BatchTopK(100.0)
    assert (recipe.learning_rate, recipe.warmup_steps, recipe.batch_size) == (1e-4, 1000, 2048)
    assert (recipe.decoder_norm, recipe.clip_norm, recipe.loss) == (1.0, 1.0, cc.ErrorNorm())
    assert recipe.aux_k == cc.AuxK(1 / 32, dead_after_tokens=10_000_000)
    assert (recipe.is_centred, recipe.scaling) == (False, None)
    harvest = harvest_command(GEMMA, Path("run"))
    assert harvest.layers == (13,)
    # What is left to train on after 2 % are held out.
    assert harvest.max_tokens * 0.98 == pytest.approx(100e6)
    # 102M tokens of 2 x 2304 numbers of two bytes.
    assert store_bytes(GEMMA) == pytest.approx(0.94e12, rel=1e-3)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=lambda pair: pair.name)
@pytest.mark.parametrize("hardware", HARDWARE.values(), ids=lambda hardware: hardware.name)
def test_every_run_spreads_over_its_chips(pair, hardware):
    planned = plan_config(pair, hardware)
    assert planned.topology.num_chips == hardware.data_shards * hardware.latent_shards
    assert planned.recipe().crosscoder.num_latents == train_command(pair, Path("run"), hardware).num_latents


def test_a_line_of_the_table_is_what_shapes_say():
    cells = row(GEMMA, H200)
    # Weights and two moments of float32: 3 * 4 * (2 * 4608 * 73728 + ...) bytes are 7.6 GiB.
    assert cells[:4] == ("gemma-2-2b", "h200", "0.94", "7.6")
    assert "does not fit" not in cells[4]
    assert cells[6] == "-"  # no compiler for GPUs


def test_hours_are_those_of_all_steps():
    from crosscoder_jax.planning import make_plan

    (mesh,) = make_plan(plan_config(GEMMA, H200)).meshes
    assert hours(dataclasses.replace(mesh, xla_seconds=0.1)) == "2.7"  # 97,656 * 0.1 s / 3600


def differing(one, other):
    return {f.name for f in dataclasses.fields(one) if getattr(one, f.name) != getattr(other, f.name)}


def test_the_smoke_changes_sizes_and_nothing_else(tmp_path):
    """What is exercised is the recipe: only what makes it long differs."""
    train = train_command(GEMMA, tmp_path, H200)
    assert differing(train, small_train(train)) == {
        *("num_latents", "k", "num_steps", "batch_size", "warmup_steps", "learning_rate", "held_out"),
        "dead_after_tokens",
    }
    harvest = harvest_command(GEMMA, tmp_path)
    assert differing(harvest, small_harvest(harvest, tmp_path / "texts")) == {
        "texts",
        "max_tokens",
        "context",
        "model_dtype",
    }


@pytest.mark.parametrize("name", sorted(set(PAIRS) - {"llama-3.2-1b"}))  # which two hosts run below
def test_the_whole_way_on_tiny_models_of_the_same_architecture(name, tmp_path):
    pytest.importorskip("torch", reason="models are run in torch: install the extra 'lm'")
    from experiments.minder2025.__main__ import Minder2025, run

    report = run(Minder2025(pair=name, on="cpu", smoke=True, output=tmp_path))
    page = report.read_text()
    assert f"blocks.{PAIRS[name].layer}.resid_post" in page
    assert PAIRS[name].family in (tmp_path / "smoke/models" / name / "base" / "config.json").read_text()


def test_two_hosts_of_four_chips_train_and_measure_what_was_harvested(tmp_path):
    """As on a v5p-16, whose eight chips are CPU devices here."""
    pytest.importorskip("torch", reason="models are run in torch: install the extra 'lm'")
    from experiments.minder2025.__main__ import Minder2025, run

    run(Minder2025(pair="llama-3.2-1b", on="v5p-16", smoke=True, output=tmp_path, until="harvest"))
    words = ["--pair", "llama-3.2-1b", "--on", "v5p-16", "--smoke", "--output", tmp_path]
    words += ["--num-processes", 2, "--coordinator", f"127.0.0.1:{free_port()}", "--process-id"]
    commands = [["-m", "experiments.minder2025", *words, index] for index in range(2)]
    with Together(commands, tmp_path / "logs", devices=4) as both:
        assert both.wait(300) == [0, 0], both.output()
        assert both.output().count("report.html") == 1, "the first is heard"
    assert "blocks.8.resid_post" in (tmp_path / "smoke/llama-3.2-1b/report.html").read_text()


def test_two_hosts_without_a_harvest_are_refused(tmp_path):
    from experiments.minder2025.__main__ import Minder2025, run

    with pytest.raises(ValueError, match="there is no such folder"):
        run(Minder2025(on="v5p-16", output=tmp_path, distributed=True))


@pytest.mark.parametrize("name", PAIRS)
def test_the_readme_has_a_command_for_every_pair_and_chip(name):
    from experiments.minder2025.__main__ import Minder2025

    readme = (Path(__file__).parent.parent / "experiments/minder2025/README.md").read_text()
    told = re.findall(r"`python -m experiments\.minder2025 ([^`]+)`", readme)
    found = [tyro.cli(Minder2025, args=line.split()) for line in told]
    # A v5p-16 has two hosts of four chips, a v6e-8 one of eight.
    wanted = {("h200", False), ("v6e-8", False), ("v5p-16", True)}
    assert {(one.on, one.distributed) for one in found if one.pair == name} == wanted
