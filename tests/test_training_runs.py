"""A run folder opened again: what it finds, what it refuses, and calibrating it over and over."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import pytest
from training_cases import OPTIONS, recipe, small_run, write_store

import crosscoder_jax as cc
from crosscoder_jax.activations.setting import lock_folder
from crosscoder_jax.publishing import load_provenance
from crosscoder_jax.training.runs import Run


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("runs") / "store")


@pytest.fixture
def folder(store, tmp_path):
    small_run(store, tmp_path / "run", config=recipe(num_steps=5))
    return tmp_path / "run"


def with_threshold(run, threshold):
    crosscoder = run.crosscoder()
    crosscoder.threshold[...] = jnp.float32(threshold)
    return crosscoder


class KilledError(BaseException):
    pass


def test_a_recipe_from_before_a_field_existed_has_its_default(folder, store):
    path = folder / "config.json"
    recorded = json.loads(path.read_text())
    del recorded["train"]["delta"], recorded["train"]["crosscoder"]["groups"]
    path.write_text(json.dumps(recorded))
    assert small_run(store, folder, config=recipe(num_steps=5)).config.groups == ()


def test_a_run_knows_its_recipe_its_store_and_what_was_held_out(folder, store):
    run = Run.open(folder)
    assert run.train == recipe(num_steps=5)
    assert run.split == OPTIONS.split
    assert run.store.path == store.path
    held_out = run.held_out().num_tokens
    # Documents of 20 tokens; a fifth of the 75, give or take what a hash of so few does.
    assert held_out % 20 == 0
    assert 5 <= held_out // 20 <= 25


def test_a_replaced_crosscoder_keeps_its_provenance_and_gains_the_notes(folder):
    run = Run.open(folder)
    before = load_provenance(folder / "crosscoder")
    run.replace_crosscoder(with_threshold(run, 0.25), calibrated_on_tokens=300)
    assert float(run.crosscoder().threshold[...]) == 0.25
    assert load_provenance(folder / "crosscoder") == before | {"calibrated_on_tokens": 300}


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_calibration_killed_at_any_rename_leaves_a_run_that_works(folder, store, monkeypatch, renames):
    run, replace, done = Run.open(folder), Path.replace, []
    before, after = float(run.crosscoder().threshold[...]), 0.25

    def replace_and_die(self, target):
        if len(done) == renames:
            raise KilledError
        done.append(target)
        return replace(self, target)

    crosscoder = with_threshold(run, after)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", replace_and_die)
        with pytest.raises(KilledError):
            run.replace_crosscoder(crosscoder)
    # The config is the second file to be renamed: from then on the new threshold holds.
    expected = before if renames < 2 else after
    assert float(Run.open(folder).crosscoder().threshold[...]) == expected
    again = small_run(store, folder, config=recipe(num_steps=5))
    assert float(again.threshold[...]) == expected
    run.replace_crosscoder(with_threshold(run, 0.5))
    assert float(cc.load(folder / "crosscoder").threshold[...]) == 0.5


def test_what_was_measured_changes_with_the_threshold_and_with_the_store(folder, tmp_path):
    run = Run.open(folder)
    before = run.measured_on()
    assert (
        before["store_fingerprint"]
        == json.loads((folder / "config.json").read_text())["store_identity"]["fingerprint"]
    )
    run.replace_crosscoder(run.crosscoder())
    assert run.measured_on() == before
    run.replace_crosscoder(with_threshold(run, 0.25))
    calibrated = run.measured_on()
    assert calibrated["weights_sha256"] != before["weights_sha256"]
    assert calibrated["store_fingerprint"] == before["store_fingerprint"]
    other = Run.open(folder, write_store(tmp_path / "other", num_tokens=400).path).measured_on()
    assert other["weights_sha256"] == calibrated["weights_sha256"]
    assert other["store_fingerprint"] != before["store_fingerprint"]


def test_a_crosscoder_is_replaced_by_one_process_at_a_time(folder):
    run = Run.open(folder)
    lock = lock_folder(folder)
    with pytest.raises(ValueError, match="another process is writing this run: wait until it ends"):
        run.replace_crosscoder(run.crosscoder())
    os.close(lock)
    run.replace_crosscoder(with_threshold(run, 0.75))
    assert float(run.crosscoder().threshold[...]) == 0.75


def test_a_folder_without_a_config_is_no_run(tmp_path):
    with pytest.raises(ValueError, match=r"config.json: is missing: .* make one with 'train'"):
        Run.open(tmp_path)


@pytest.mark.parametrize("name", ["store_path", "store_identity", "train", "split"])
def test_a_config_that_train_did_not_write_is_refused_by_what_it_lacks(folder, name):
    path = folder / "config.json"
    recorded = json.loads(path.read_text())
    del recorded[name]
    path.write_text(json.dumps(recorded))
    with pytest.raises(ValueError, match=rf"config.json: lacks '{name}': it was not written by 'train'"):
        Run.open(folder)


def test_an_unfinished_run_has_no_crosscoder(folder):
    (folder / "crosscoder" / "config.json").unlink()
    with pytest.raises(ValueError, match="is not finished: run 'train' again"):
        Run.open(folder).crosscoder()


def test_another_store_of_the_same_models_is_read_and_one_of_others_refused(folder, tmp_path):
    same = write_store(tmp_path / "same", num_tokens=400)
    assert Run.open(folder, same.path).store.num_tokens == 400
    other = write_store(tmp_path / "other", widths=(3, 3), num_tokens=100)
    with pytest.raises(ValueError, match="other models"):
        Run.open(folder, other.path)
