"""The command line: help, typos, config files, and the way from a store to a report."""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
import typing
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import training_cases
from interop_cases import PRETRAINED, write_saelens
from report_cases import make_run

import crosscoder_jax
from crosscoder_jax import cli
from crosscoder_jax.activations import (
    ActivationStore,
    SameModel,
    Split,
    SwapCoordinates,
    SwapDocuments,
    TokenView,
)
from crosscoder_jax.arguments import option_types
from crosscoder_jax.commands import Export, Train
from crosscoder_jax.interop import FORMATS, encode_array
from crosscoder_jax.report.files import read_run
from crosscoder_jax.sources import Source, Sources
from crosscoder_jax.training.config import TrainConfig

SMALL = shlex.split(
    "--num-latents 24 --k 3 --num-steps 40 --batch-size 64 --warmup-steps 4 --learning-rate 5e-3 "
    "--checkpoint-every 20 --held-out 0.25"
)


def fails(capsys, *arguments):
    """Run a command that must fail; return the exit code and the one line it printed."""
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return exit_.value.code, printed.err.strip()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "store"
    training_cases.write_store(folder)
    return folder


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    """A run that went through every command up to the report."""
    folder = tmp_path_factory.mktemp("cli-run") / "run"
    cli.main(["train", "--store", str(store), "--output", str(folder), *SMALL])
    for command in ("calibrate", "evaluate", "diff"):
        cli.main([command, "--run", str(folder)])
    return folder


def test_without_a_command_every_command_is_listed(capsys):
    cli.main([])
    printed = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"  {name}" in printed


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_describes_every_option(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([name, "--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    for option in option_types(cli.COMMANDS[name].config):
        assert f"--{option}" in printed


def test_the_command_of_a_run_is_kept_although_it_was_stopped(store, tmp_path, monkeypatch, capsys):
    from crosscoder_jax.training.journal import Journal

    def stop(*_):
        raise FloatingPointError("stopped")

    options = ["train", "--store", str(store), "--output", str(tmp_path / "run"), *SMALL]
    monkeypatch.setattr(Journal, "_refuse_nan", stop)
    assert fails(capsys, *options)[0] == 1
    saved = json.loads((tmp_path / "run" / "train.command.json").read_text())
    assert saved["num_latents"] == 24
    # A command that the folder refuses, since it holds another run, is not put in its place.
    assert "holds another run" in fails(capsys, *options, "--k", "4")[1]
    assert json.loads((tmp_path / "run" / "train.command.json").read_text()) == saved


def test_a_mistyped_command_is_refused_with_the_nearest(capsys):
    code, line = fails(capsys, "trian")
    assert code == 2
    assert line == "error: no command 'trian': did you mean 'train'?"


def test_a_mistyped_option_is_refused_with_the_nearest(capsys):
    code, line = fails(capsys, "train", "--num-latens", "3")
    assert code == 1
    assert line == "error: no option --num-latens: did you mean --num-latents?"


def test_a_mistyped_option_in_a_config_file_is_refused_with_the_nearest(capsys, tmp_path, run):
    saved = json.loads((run / "train.command.json").read_text())
    saved["num_latens"] = saved.pop("num_latents")
    (tmp_path / "typo.json").write_text(json.dumps(saved))
    code, line = fails(capsys, "train", "--config", tmp_path / "typo.json")
    assert code == 1
    assert "no field 'num_latens': did you mean 'num_latents'?" in line


def test_a_missing_store_is_one_line(capsys, tmp_path):
    code, line = fails(capsys, "train", "--store", tmp_path / "none", "--output", tmp_path / "run")
    assert code == 1
    assert line.count("\n") == 0
    assert "none" in line


def test_the_saved_config_reads_back_as_the_same_config(run):
    again = cli.parse("train", ["--config", str(run / "train.command.json")])
    assert isinstance(again, Train)
    assert (again.num_latents, again.k, again.held_out) == (24, 3.0, 0.25)


def test_a_finished_run_is_left_as_it_is(run, store):
    before = (run / "crosscoder" / "crosscoder.safetensors").read_bytes()
    cli.main(["train", "--store", str(store), "--output", str(run), *SMALL])
    cli.main(["calibrate", "--run", str(run)])
    assert (run / "crosscoder" / "crosscoder.safetensors").read_bytes() == before


def test_the_calibrated_threshold_lets_k_latents_a_token_pass(run, store):
    crosscoder = crosscoder_jax.load(run / "crosscoder")
    threshold = json.loads((run / "evaluation.json").read_text())["threshold"]
    assert float(crosscoder.threshold[...]) == threshold
    view = TokenView.of_split(ActivationStore.open(store), Split(0.25), held_out=True)
    # All scores by NumPy in float64: relu(normalised acts @ w_enc + b_enc) * sum of decoder norms.
    value = {
        name: np.asarray(getattr(crosscoder, name)[...], np.float64)
        for name in ("mean", "scale", "w_enc", "b_enc", "w_dec")
    }
    acts = view.read_positions(np.arange(view.num_tokens)).astype(np.float64)
    normalised = (acts - value["mean"]) * np.repeat(value["scale"], training_cases.WIDTHS)
    norms = [np.linalg.norm(part, axis=1) for part in np.split(value["w_dec"], training_cases.WIDTHS[:1], 1)]
    scores = np.maximum(normalised @ value["w_enc"] + value["b_enc"], 0) * sum(norms)
    # k = 3 to 0.1 %, or one pair where that is less, and scores that float32 cannot tell from the cut.
    unsure = np.sum(np.abs(scores - threshold) < 1e-5 * threshold)
    assert threshold > 0
    assert abs(np.sum(scores > threshold) - 3 * len(acts)) <= max(3e-3 * len(acts), 1.5) + unsure


def test_calibration_brings_the_measured_l0_to_k(run):
    measured = json.loads((run / "evaluation.json").read_text())
    # 0.1 % of the held-out tokens' k, or one pair where that is less than one.
    assert abs(measured["l0_inference_rule"] - 3) <= max(3e-3, 1.5 / measured["num_tokens"])


def test_a_run_is_measured_calibrated_and_diffed_on_a_mesh_as_on_one_device(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    for command in ("calibrate", "evaluate", "diff"):
        cli.main([command, "--run", str(copy), "--data-shards", "2", "--latent-shards", "4"])
    ours, theirs = (json.loads((folder / "evaluation.json").read_text()) for folder in (copy, run))
    for key in ("fve", "l0_inference_rule", "l0_training_rule", "threshold", "num_tokens"):
        # Float32 partial sums in another order; a threshold between the same two scores.
        assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key
    ours, theirs = (json.loads((folder / "diff" / "summary.json").read_text()) for folder in (copy, run))
    assert ours["counts"] == theirs["counts"]
    assert ours["num_tokens"] == theirs["num_tokens"]


def test_more_devices_than_there_are_is_one_line(capsys, run):
    code, line = fails(capsys, "evaluate", "--run", run, "--data-shards", "64")
    assert code == 1
    assert "data=64 x latent=1 needs 64 devices, and there are 8" in line


def test_the_diff_has_one_row_a_latent(run):
    rows = (run / "diff" / "latents.csv").read_text().splitlines()
    assert len(rows) == 1 + 24
    assert (run / "diff" / "latents.parquet").is_file()


def test_what_was_measured_names_the_crosscoder_it_was_measured_on(run):
    published = json.loads((run / "crosscoder" / "config.json").read_text())["weights_sha256"]
    fingerprint = json.loads((run / "config.json").read_text())["store_identity"]["fingerprint"]
    for name in ("evaluation.json", "diff/summary.json"):
        measured_on = json.loads((run / name).read_text())["measured_on"]
        assert measured_on == {"weights_sha256": published, "store_fingerprint": fingerprint}


def attributes_of(page):
    """The names of all attributes of all elements; what scripts and texts say is none."""
    names = set()
    parser = HTMLParser()
    parser.handle_starttag = lambda _, attributes: names.update(name for name, _ in attributes)
    parser.feed(page)
    return names


def test_the_report_is_one_file_with_the_run_in_it(run, tmp_path):
    page = tmp_path / "report.html"
    cli.main(["report", "--runs", str(run), "--output", str(page), "--title", "A <small> test"])
    text = page.read_text()
    assert "A &lt;small&gt; test" in text
    assert "<small> test" not in text
    names = attributes_of(text)
    assert "data-figure" in names
    assert not {"src", "srcset", "background"} & names


def test_a_report_before_the_diff_names_the_command_to_run(capsys, tmp_path, run):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes((run / "config.json").read_bytes())
    code, line = fails(capsys, "report", "--runs", tmp_path / "run", "--output", tmp_path / "r.html")
    assert code == 1
    assert "crosscoder-jax diff" in line


def test_encode_writes_indices_values_and_reconstruction(run, tmp_path):
    acts = np.random.default_rng(0).normal(size=(20, sum(training_cases.WIDTHS))).astype(np.float32)
    np.save(tmp_path / "acts.npy", acts)
    options = ["--crosscoder", run / "crosscoder", "--acts", tmp_path / "acts.npy"]
    cli.main(["encode", *map(str, options), "--output", str(tmp_path / "codes.npz")])
    with np.load(tmp_path / "codes.npz") as saved:
        assert saved["indices"].shape == saved["values"].shape
        assert saved["recon"].shape == acts.shape
        assert_encoded(saved, encode_array(crosscoder_jax.load(run / "crosscoder"), acts))


def assert_encoded(saved, expected):
    """The file holds what the function returns, and that is more than padding."""
    assert (expected.indices >= 0).any()
    for name in ("indices", "values", "recon"):
        np.testing.assert_array_equal(saved[name], getattr(expected, name), err_msg=name)


@pytest.mark.parametrize(("name", "axes"), [("batchtopk", (20,)), ("batchtopk_decoupled", (20, 2))])
def test_encode_reads_crosscoders_of_other_libraries(name, axes, tmp_path):
    acts = np.random.default_rng(0).normal(size=(20, 2, 32)).astype(np.float32)
    np.save(tmp_path / "acts.npy", acts)
    crosscoder = PRETRAINED / name / "hub"
    options = ["--crosscoder", crosscoder, "--acts", tmp_path / "acts.npy", "--output", tmp_path / "c.npz"]
    cli.main(["encode", *map(str, options)])
    with np.load(tmp_path / "c.npz") as saved:
        assert saved["recon"].shape == (20, 64)
        assert saved["indices"].shape[:-1] == axes
        assert_encoded(saved, encode_array(crosscoder_jax.load(crosscoder), acts))


def test_export_converts_from_and_to_other_formats(tmp_path, capsys):
    golden = PRETRAINED / "l1" / "hub"
    names = ["--source-names", "before", "after"]
    cli.main(["export", "--crosscoder", str(golden), "--output", str(tmp_path / "own"), *names])
    own = crosscoder_jax.load(tmp_path / "own")
    assert own.config.sources.names == ("before", "after")
    format = ["--format", "openmoss"]
    cli.main(["export", "--crosscoder", str(tmp_path / "own"), "--output", str(tmp_path / "theirs"), *format])
    assert "openmoss: " in capsys.readouterr().out
    theirs = crosscoder_jax.load(tmp_path / "theirs")
    np.testing.assert_array_equal(theirs.w_dec[...], own.w_dec[...])


def test_export_offers_every_format():
    offered = typing.get_args(typing.get_type_hints(Export)["format"])
    assert set(offered) == {"crosscoder_jax", *FORMATS}


def test_a_crosscoder_that_a_format_cannot_hold_is_one_line(capsys, run, tmp_path):
    options = ("--crosscoder", run / "crosscoder", "--output", tmp_path / "x", "--format", "openmoss")
    code, line = fails(capsys, "export", *options)
    assert code == 1
    assert "cannot be saved as 'openmoss', which keeps every positive latent" in line


def test_cached_activations_become_a_store(tmp_path, capsys):
    for seed, name in enumerate(("base", "chat")):
        write_saelens(tmp_path / name, seed=seed)
    store = tmp_path / "store"
    options = ["--store", store, "--base", f"web={tmp_path / 'base'}", "--chat", f"web={tmp_path / 'chat'}"]
    cli.main(["import-acts", *map(str, options), "--chat-model", "org/chat"])
    printed = capsys.readouterr().out
    assert "56 tokens of 7 documents" in printed
    assert "org/chat" in printed
    again = cli.parse("import-acts", ["--config", f"{store}.command.json"])
    assert again.texts() == {"web": {"base": tmp_path / "base", "chat": tmp_path / "chat"}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--base a", "cache 'a' must be label=folder"),
        ("--base web=a web=b", "label 'web' comes twice"),
        ("--base web=a --chat talk=b", "base has the labels ['web'], chat ['talk']"),
    ],
)
def test_caches_without_a_pair_are_one_line(options, message, capsys, tmp_path):
    code, line = fails(capsys, "import-acts", "--store", tmp_path / "store", *shlex.split(options))
    assert code == 1
    assert message in line
    assert not (tmp_path / "store").exists()


def test_encoding_a_pickled_array_is_refused(capsys, run, tmp_path):
    np.save(tmp_path / "acts.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    options = ("--crosscoder", run / "crosscoder", "--acts", tmp_path / "acts.npy")
    code, line = fails(capsys, "encode", *options, "--output", tmp_path / "codes.npz")
    assert code == 1
    assert "not a whole .npy file of numbers" in line
    assert not (tmp_path / "codes.npz").exists()


def test_another_store_of_other_models_is_refused(capsys, run, tmp_path):
    training_cases.write_store(tmp_path / "other", widths=(3, 3))
    code, line = fails(capsys, "evaluate", "--run", run, "--store", tmp_path / "other")
    assert code == 1
    assert "other models" in line


def test_a_folder_that_is_no_run_is_refused(capsys, tmp_path):
    code, line = fails(capsys, "diff", "--run", tmp_path)
    assert code == 1
    assert "is not a run folder" in line


def test_an_unfinished_run_is_refused_by_name(capsys, run, tmp_path):
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    code, line = fails(capsys, "calibrate", "--run", tmp_path)
    assert code == 1
    assert "is not finished: run 'train' again" in line


def test_the_recipe_of_the_command_holds_every_field_it_was_given(store):
    options = ["--store", str(store), "--output", "x", *SMALL, "--l1", "0.5", "--loss", "squared"]
    command = cli.parse("train", options)
    recipe = command.recipe(training_cases.sources())
    assert isinstance(recipe, TrainConfig)
    assert (recipe.num_steps, recipe.batch_size, recipe.learning_rate) == (40, 64, 5e-3)
    assert recipe.l1 is not None
    assert recipe.l1.weight == 0.5
    assert type(recipe.loss).__name__ == "SquaredError"
    assert type(recipe.crosscoder.sparsity).__name__ == "ReLU"


def test_how_to_read_save_and_spread_reaches_the_loop(store, tmp_path, monkeypatch):
    from crosscoder_jax.training import loop

    told = {}
    monkeypatch.setattr(loop, "fit_together", lambda *_, **settings: told.update(settings))
    spread = "--is-optimizer-spread --step-timeout 7 --lanes 2 --window-tokens 128 --log-every 3"
    cli.main(["train", "--store", str(store), "--output", str(tmp_path / "run"), *SMALL, *spread.split()])
    assert told["options"] == loop.RunOptions(
        split=Split(0.25),
        window_tokens=128,
        lanes=2,
        log_every=3,
        checkpoint_every=20,
        step_timeout=7,
        is_optimizer_spread=True,
    )
    assert told["mesh"] is None


@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ("", 1 / 32),
        ("--l1 0.041", None),  # as published: an L1 crosscoder revives nothing
        ("--l1 0.041 --aux-k-weight 0.03", 0.03),
        ("--aux-k-weight 0", None),
    ],
)
def test_dead_latents_are_revived_as_published_or_as_asked(options, weight):
    command = cli.parse("train", ["--store", "s", "--output", "o", *shlex.split(options)])
    aux_k = command.recipe(training_cases.sources()).aux_k
    assert (None if aux_k is None else aux_k.weight) == weight


LAYERS = Sources(tuple(Source(name, 3) for name in ("base.L1", "base.L2", "chat.L1", "chat.L2")))


def test_a_difference_needs_two_sources():
    command = Train(store=Path("s"), output=Path("o"), reads="difference")
    with pytest.raises(ValueError, match=r"needs two stored sources, not \('base.L1', .*: choose two with"):
        command.recipe(LAYERS)


@pytest.mark.parametrize("reads", ["all", "difference"])
def test_sources_are_chosen_by_name_and_in_their_order(reads):
    options = shlex.split(f"--store s --output o --sources base.L2 chat.L2 --reads {reads}")
    read = cli.parse("train", options).recipe(LAYERS).crosscoder.sources
    if reads == "all":
        assert read == Sources((Source("base.L2", 3), Source("chat.L2", 3)))
    else:
        assert read.entries[0].combination == (("chat.L2", 1.0), ("base.L2", -1.0))


def test_a_source_that_the_store_lacks_is_refused_with_those_it_has():
    command = Train(store=Path("s"), output=Path("o"), sources=("base.L3", "chat.L2"))
    with pytest.raises(ValueError, match=r"names 'base.L3', but the store has \('base.L1', 'base.L2'"):
        command.recipe(LAYERS)


def test_what_is_exclusive_by_design_is_told_apart_from_what_is_found(tmp_path, capsys):
    training_cases.write_store(tmp_path / "store", widths=(6, 6))
    train(tmp_path / "store", tmp_path / "run", "--dedicated", "0.25")
    capsys.readouterr()
    cli.main(["diff", "--run", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    table = pyarrow.parquet.read_table(tmp_path / "run" / "diff" / "latents.parquet").to_pydict()
    rows = list(zip(table["latent_class"], table["by_design"], table["verdict"], strict=True))
    for name in ("base-only", "chat-only"):
        claimed = [verdict for of_class, designed, verdict in rows if of_class == name and not designed]
        cells = [str(len(claimed)), str(claimed.count("confirmed"))]
        (line,) = (line for line in printed.splitlines() if name in line)
        assert [word for word in line.split() if word.isdigit()] == cells
    designed = [verdict for of_class, designed, verdict in rows if designed and "-only" in of_class]
    assert f"Not among these: {len(designed)} latents that write to one model by design." in printed
    assert f"Latent Scaling confirms {designed.count('confirmed')} of them" in " ".join(printed.split())


def test_training_on_a_few_tokens_of_outlying_norm_names_the_source_and_the_option(store, tmp_path, capsys):
    acts = training_cases.activations(1500, training_cases.WIDTHS)
    acts[700, training_cases.WIDTHS[0] :] *= 1000
    training_cases.write_store(tmp_path / "store", acts=acts)
    train(tmp_path / "store", tmp_path / "run", "--num-steps", "5")
    warned = " ".join(capsys.readouterr().err.split())
    name = training_cases.sources(training_cases.WIDTHS).names[1]
    assert re.search(rf"warning: a few tokens hold at least 9\d% of the squared norm of {name}", warned)
    assert "--outlier-multiple 5" in warned
    assert warned.count("warning") == 1
    train(store, tmp_path / "ordinary", "--num-steps", "5")
    assert "warning" not in capsys.readouterr().err


def test_a_difference_run_goes_the_same_way_and_has_no_classes(tmp_path):
    training_cases.write_store(tmp_path / "store", widths=(5, 5))
    run = tmp_path / "run"
    options = ["--store", str(tmp_path / "store"), "--output", str(run), *SMALL, "--reads", "difference"]
    cli.main(["train", *options])
    for command in ("calibrate", "evaluate", "diff"):
        cli.main([command, "--run", str(run)])
    header = (run / "diff" / "latents.csv").read_text().splitlines()[0]
    assert "norm_difference" in header
    assert "latent_class" not in header


def train(store, output, *options):
    cli.main(["train", "--store", str(store), "--output", str(output), *SMALL, *map(str, options)])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A store of two sources of one width, and in its folder a real run, a null run, both diffed."""
    folder = tmp_path_factory.mktemp("cli-pair")
    training_cases.write_store(folder / "store", widths=(5, 5))
    train(folder / "store", folder / "real")
    train(folder / "store", folder / "null", "--null", "swap-documents", "--seed", 3, "--data-seed", 1)
    for name in ("real", "null"):
        cli.main(["diff", "--run", str(folder / name), "--num-snippet-latents", "0"])
    return folder


def paths_of(content, where=""):
    """The path of every value in nested objects; what stands in a list is one value."""
    if not isinstance(content, dict):
        return {where}
    return {path for name, value in content.items() for path in paths_of(value, f"{where}/{name}")}


def test_the_runs_that_the_tests_of_the_report_read_hold_what_a_real_run_holds(pair, tmp_path):
    made = read_run(make_run(tmp_path / "made"))
    folder = shutil.copytree(pair / "real", tmp_path / "real")
    for name in ("evaluate", "diff"):
        cli.main([name, "--run", str(folder)])
    real = read_run(folder)
    called = {"base": "before", "chat": "after"}

    def names_of(content):
        """Its paths with the sources called as in the made run; of the texts only that there are some."""
        paths = {"/".join(called.get(part, part) for part in path.split("/")) for path in paths_of(content)}
        return {path.rpartition("/")[0] if path.startswith("/tokens_by_label") else path for path in paths}

    columns = {name.replace("base", "before").replace("chat", "after") for name in real.latents.columns}
    assert {name for name in made.latents.columns if not name.startswith("share_")} <= columns
    assert names_of(made.metrics[0]) <= names_of(real.metrics[0])
    assert names_of(made.evaluation) <= names_of(real.evaluation)
    assert names_of(made.summary) <= names_of(real.summary)
    assert made.snippets is not None
    assert real.snippets is not None
    assert made.snippets[0][0].keys() == next(kept for kept in real.snippets.values() if kept)[0].keys()
    # What the recipe holds depends on it: those of the two runs are not the same.
    assert {name for name in names_of(made.config) if not name.startswith("/train/")} == {
        name for name in names_of(real.config) if not name.startswith("/train/")
    }
    assert set(made.config["train"]) == set(real.config["train"])


def test_seeds_are_runs_of_their_own_that_every_command_reads(pair, tmp_path, capsys):
    train(pair / "store", tmp_path / "runs", "--seeds", 2, "--seed", 4)
    assert "2 crosscoders, 2 in turns over each read" in capsys.readouterr().out
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert folders == ["seed-4", "seed-5", "train.command.json"]
    for name in ("calibrate", "evaluate", "diff"):
        cli.main([name, "--run", str(tmp_path / "runs" / "seed-5")])
    assert (tmp_path / "runs" / "seed-5" / "diff" / "summary.json").is_file()
    # The saved command of one seed trains it alone, to the same weights.
    alone = tmp_path / "alone"
    saved = tmp_path / "runs" / "seed-4" / "train.command.json"
    cli.main(["train", "--config", str(saved), "--output", str(alone)])
    weights = Path("crosscoder/crosscoder.safetensors")
    assert (alone / weights).read_bytes() == (tmp_path / "runs" / "seed-4" / weights).read_bytes()


def test_a_folder_of_seeds_is_no_run_and_names_them(pair, tmp_path, capsys):
    for name in ("seed-0", "seed-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    code, line = fails(capsys, "diff", "--run", tmp_path)
    assert code == 1
    assert "it holds the runs seed-0, seed-1: name one of them" in line


@pytest.mark.parametrize(
    ("seeds", "message"), [(2, "is a run itself: choose another output"), (0, "seeds=0 must be")]
)
def test_several_seeds_need_a_folder_that_is_no_run(pair, capsys, seeds, message):
    arguments = ("--store", pair / "store", "--output", pair / "real", *SMALL, "--seeds", seeds)
    code, line = fails(capsys, "train", *arguments)
    assert code == 1
    assert message in line


def test_the_recipes_of_seeds_share_the_order_of_the_data():
    command = Train(store=Path("s"), output=Path("o"), seed=4, seeds=3)
    assert [(run.output.name, run.seed, run.data_seed, run.seeds) for run in command.runs()] == [
        *(("seed-4", 4, 4, 1), ("seed-5", 5, 4, 1), ("seed-6", 6, 4, 1)),
    ]
    assert [run.data_seed for run in dataclasses.replace(command, data_seed=1).runs()] == [1, 1, 1]
    assert command.runs()[2].recipe(training_cases.sources()).order_seed == 4
    single = dataclasses.replace(command, seeds=1)
    assert single.runs() == [single]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"null": "same-model"}, SameModel()),
        ({"null": "swap-documents", "seed": 2}, SwapDocuments(2)),
        ({"null": "swap-coordinates", "seed": 2}, SwapCoordinates(2)),
        ({"null": "swap-documents", "seed": 2, "data_seed": 5}, SwapDocuments(5)),
    ],
)
def test_null_data_of_the_command(options, expected):
    assert Train(store=Path("s"), output=Path("o"), **options).null_data() == expected


def test_null_data_of_sources_of_different_widths_is_refused(capsys, store, tmp_path):
    code, line = fails(
        capsys, "train", "--store", store, "--output", tmp_path / "r", *SMALL, "--null", "same-model"
    )
    assert code == 1
    assert "two sources of one width" in line
    assert not (tmp_path / "r").exists()


def test_a_diff_prints_and_saves_the_counts_of_the_null_run_beside_its_own(pair, capsys, tmp_path):
    capsys.readouterr()
    cli.main(["diff", "--run", str(pair / "real")])
    assert "null run" not in capsys.readouterr().out
    # What the null run has is put there by hand, so that it is known.
    path = pair / "null" / "diff" / "summary.json"
    summary = json.loads(path.read_text())
    summary["counts"] |= {"base-only": 31, "chat-only": 32}
    summary["confirmed_by_class"] = {"base-only": 21, "chat-only": 22}
    path.write_text(json.dumps(summary))
    cli.main(["diff", "--run", str(pair / "real"), "--null-run", str(pair / "null")])
    printed = capsys.readouterr().out
    rows = {
        line.split()[1]: line.replace("│", " ").split()[1:]
        for line in printed.splitlines()
        if "-only" in line
    }
    own = json.loads((pair / "real" / "diff" / "summary.json").read_text())
    for name, null in (("base-only", ["31", "21"]), ("chat-only", ["32", "22"])):
        mine = [str(own["counts"][name]), str(own["confirmed_by_class"][name])]
        assert rows[name] == mine + null
    assert own["null"]["kind"] == {"type": "SwapDocuments", "seed": 1}
    assert own["null"]["confirmed_by_class"] == {"base-only": 21, "chat-only": 22}
    cli.main(["report", "--runs", str(pair / "real"), "--output", str(tmp_path / "report.html")])
    text = (tmp_path / "report.html").read_text()
    assert "Null run claimed" in text
    assert '<td class="n">31</td><td class="n">21</td>' in text


def test_a_run_on_the_data_itself_is_no_null_run(pair, capsys):
    code, line = fails(capsys, "diff", "--run", pair / "null", "--null-run", pair / "real")
    assert code == 1
    assert "was trained on the data itself" in line


def test_no_model_has_null_data_to_splice_into(pair, capsys):
    code, line = fails(capsys, "evaluate", "--run", pair / "null", "--splice")
    assert code == 1
    assert "was trained on null data, which no model has" in line
    assert not (pair / "null" / "evaluation.json").exists()


def files_of(folder):
    """Every file below a folder with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("format", ["crosscoder_jax", "dictionary_learning"])
def test_export_onto_a_run_or_any_folder_that_holds_something_is_refused(format, pair, capsys, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    crosscoder = shutil.copytree(pair / "real" / "crosscoder", tmp_path / "crosscoder")
    for folder in (pair / "real", tmp_path / "notes", crosscoder):
        before = files_of(folder)
        options = ("--crosscoder", crosscoder, "--output", folder, "--format", format)
        code, line = fails(capsys, "export", *options)
        assert code == 1
        assert line.startswith(f"error: {folder}: already holds ")
        assert line.endswith(": choose another output folder")
        assert files_of(folder) == before


def test_a_refused_export_leaves_no_folder_behind(pair, capsys, tmp_path):
    options = ("--crosscoder", pair / "real" / "crosscoder", "--output", tmp_path / "new" / "x")
    assert fails(capsys, "export", *options, "--format", "openmoss")[0] == 1
    assert list(tmp_path.iterdir()) == []


def test_encode_and_export_save_their_configs_beside_their_results(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "acts.npy", training_cases.activations(4, (5, 5)))
    crosscoder = ["--crosscoder", str(pair / "real" / "crosscoder")]
    cli.main(["encode", *crosscoder, "--acts", "acts.npy", "--output", "missing/folder/codes.npz"])
    cli.main(["export", *crosscoder, "--output", "exported/v1.5/"])
    encode = cli.parse("encode", ["--config", "missing/folder/codes.command.json"])
    assert (encode.acts, encode.output) == (Path("acts.npy"), Path("missing/folder/codes.npz"))
    export = cli.parse("export", ["--config", "exported/v1.5.command.json"])
    assert (export.output, export.format) == (Path("exported/v1.5"), "crosscoder_jax")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --config nothere.json", "--config nothere.json: there is no such file"),
        ("encode --crosscoder x --acts nofile.npy --output a.npz", "nofile.npy: there is no such file"),
        ("encode --crosscoder x --acts a.npy --output folder", "folder: is a folder: name a file to write"),
        ("encode --crosscoder x --acts a.npy --output file/a.npz", "file: cannot be a folder, since file is"),
        ("export --crosscoder x --output file", "file: cannot be a folder, since file is a file: choose"),
        ("train --store x --output file/run", "file/run: cannot be a folder, since file is a file: choose"),
        ("train --store x --output run", "x: there is no such folder: name a store, or write one with"),
        ("import-acts --base a=b --store file", "file: cannot be a folder, since file is a file: choose"),
        ("report --runs x --output file/r.html", "file: cannot be a folder, since file is a file: choose"),
    ],
)
def test_paths_that_cannot_be_are_one_line_with_the_path_and_the_remedy(
    command, message, pair, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    given = shlex.split(command.replace("--crosscoder x", f"--crosscoder {pair / 'real' / 'crosscoder'}"))
    code, line = fails(capsys, *given)
    assert code == 1
    assert line.startswith(f"error: {message}")
    assert "Errno" not in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_missing_store_names_the_command_that_writes_one(capsys, tmp_path):
    code, line = fails(capsys, "train", "--store", tmp_path / "stor", "--output", tmp_path / "run")
    assert code == 1
    assert "crosscoder-jax harvest" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--k 25",
            "--k=25.0 active latents per token are more than --num-latents=24: take fewer, or a larger",
        ),
        ("--held-out 0", "--held-out=0.0 must lie between 0 and 1: calibrate, evaluate and diff measure on"),
        ("--held-out 1", "--held-out=1.0 must lie between 0 and 1"),
        ("--held-out 1e-9", "a held-out share of 1e-09 holds out none of its 75 documents: change the share"),
        ("--held-out 0.999999", "a held-out share of 0.999999 leaves none to train on of its 75 documents"),
        ("--batch-size 1500", "--batch-size=1500 is more than the 1100 tokens of"),
        ("--delta-weight -1", "--delta-weight=-1.0 weighs a loss: it must be finite and not negative"),
        ("--delta-weight 1", "--delta-weight=1.0 needs two sources of one width, not {'base': 6, 'chat': 5}"),
        (
            "--delta-weight 1 --delta-sources base mid",
            "--delta-sources=('base', 'mid') must be two of ('base',",
        ),
        ("--dedicated 0.6", "--dedicated=0.6 for each of ('base', 'chat') and --tied=0.0 are shares of 1.2"),
        (
            "--sparsity top-k --dedicated 0.25 --dedicated-k 0.5",
            "--dedicated-k=0.5 must be whole with --sparsity='top-k'",
        ),
        (
            "--sparsity jump-relu --dedicated 0.25 --dedicated-k 1",
            "--dedicated-k=1.0 with --sparsity='jump-relu': only what ranks latents keeps to a k: leave it",
        ),
        (
            "--dedicated 0.25 --dedicated-k 100",
            "--dedicated-k=100.0 is more than the 6 latents of --dedicated=0.25 of --num-latents=24",
        ),
        ("--nested 0.5", "--nested=(0.5,): shares=(0.5,) must be positive and ascend to 1"),
        ("--output {store}", "lies in the store"),
        ("--output {store}/run", "lies in the store"),
        ("--output {store}/run --seeds 2", "lies in the store"),
    ],
)
def test_training_that_makes_no_sense_is_refused_before_anything_is_written(
    options, message, store, capsys, tmp_path
):
    # Of the store's 75 documents of 20 tokens, 20 are held out at a share of 0.25.
    before = files_of(store)
    asked = shlex.split(options.format(store=store))
    code, line = fails(capsys, "train", "--store", store, "--output", tmp_path / "run", *SMALL, *asked)
    assert code == 1
    assert message in line
    assert files_of(store) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("num_tokens", "is_told"), [(40, True), (80, False)])
def test_more_than_a_thousand_epochs_are_said_to_be(num_tokens, is_told, tmp_path, capsys, monkeypatch):
    from crosscoder_jax.training import loop

    monkeypatch.setattr(loop, "fit_together", lambda *_, **__: [])
    # Of documents 0 to 3, of 20 tokens each, 1 and 2 are held out: 20 or 40 tokens are left of 40 or 80.
    training_cases.write_store(tmp_path / "store", num_tokens=num_tokens)
    options = ["--num-steps", 501, "--batch-size", 40, "--held-out", 0.5]
    train(tmp_path / "store", tmp_path / "run", *options)
    told = (
        "--num-steps 501 of --batch-size 40 are 1,002 epochs of the 20 tokens to train on: take fewer steps"
    )
    warned = capsys.readouterr().err
    assert (told in warned) == is_told
    assert ("epochs" in warned) == is_told


def test_numbers_of_other_weights_or_another_store_are_said_by_diff_and_report(pair, capsys, tmp_path):
    run = shutil.copytree(pair / "real", tmp_path / "run")
    report = ["report", "--runs", str(run), "--output", str(tmp_path / "r.html")]
    cli.main(report)
    assert "warning" not in capsys.readouterr().err
    measured = json.loads((run / "diff" / "summary.json").read_text())["measured_on"]
    older = {"measured_on": measured | {"weights_sha256": "of weights since replaced"}}
    (run / "evaluation.json").write_text(json.dumps(older))
    cli.main(report)
    again = f"run crosscoder-jax evaluate --run {run} again"
    since = "is older than its crosscoder, which was calibrated or replaced since"
    told = capsys.readouterr().err
    assert re.search(rf"warning: The evaluation.json of the .* {since}: {again}", told)
    assert told.count("warning") == 1
    training_cases.write_store(tmp_path / "other", widths=(5, 5), num_tokens=1000)
    cli.main(["diff", "--run", str(run), "--store", str(tmp_path / "other"), "--num-snippet-latents", "0"])
    told = capsys.readouterr().err
    assert f"warning: {run}: its evaluation.json {since}: {again}" in told
    assert f"warning: {run}: its table in diff/ is of another store than it was trained on" in told


INTERRUPTED = """
import dataclasses, signal, sys
from crosscoder_jax import cli
from crosscoder_jax.commands import Evaluate

def compile_for_long(config):
    import jax, jax.numpy as jnp
    jax.block_until_ready(jnp.zeros(3) + 1)
    def slow(x):
        for i in range(400):
            x = jnp.sort(jnp.sin(x) @ x + i, axis=i % 2)
        return x
    lowered = jax.jit(slow).lower(jnp.zeros((8, 8)))
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    lowered.compile()
    raise SystemExit("the compilation was over before it was interrupted")

name = sys.argv[1]
cli.COMMANDS[name] = dataclasses.replace(cli.COMMANDS[name], config=Evaluate, run=compile_for_long)
sys.argv[1:] = [name, "--run", "x"]
cli.main()
"""


@pytest.mark.parametrize(
    ("command", "way"), [("evaluate", "begins anew"), ("train", "goes on from what is saved")]
)
def test_an_interrupt_while_xla_compiles_ends_with_130_and_one_line(command, way):
    # The interpreter's own end takes the compiler's client away under it: a segmentation fault.
    script = [sys.executable, "-c", INTERRUPTED, command]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.stderr == f"error: interrupted: the same command, given again, {way}\n"
    assert done.returncode == 130


def test_an_interrupt_leaves_a_program_that_called_the_command_alive(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    command = dataclasses.replace(cli.COMMANDS["diff"], run=interrupt)
    monkeypatch.setitem(cli.COMMANDS, "diff", command)
    code, line = fails(capsys, "diff", "--run", "x")
    assert code == 130
    assert line == "error: interrupted: the same command, given again, begins anew"


def test_what_is_said_to_go_on_is_what_can():
    resumed = {name for name, command in cli.COMMANDS.items() if command.is_resumed}
    assert resumed == {"harvest", "train", "import-acts"}
