"""The loop: what it writes, what it refuses, and what it leaves behind when something fails."""

import contextlib
import dataclasses
import json
import resource
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import OPTIONS, activations, files, recipe, small_run, sources, write_store

import crosscoder_jax as cc
from crosscoder_jax.activations import Batches, Split, TokenView, spread_sample
from crosscoder_jax.configs import config_from_json
from crosscoder_jax.training import loop
from crosscoder_jax.training.config import TrainConfig
from crosscoder_jax.training.loop import fit
from crosscoder_jax.training.state import init_state
from crosscoder_jax.training.statistics import data_statistics
from crosscoder_jax.training.step import train_step
from crosscoder_jax.training.tracking import read_metrics

CONFIG = recipe(num_steps=23)
"""The recipe of ``small_run``: logged every 4 steps, saved every 5, 23 in all."""
LOGGED = [1, 4, 8, 12, 16, 20, 23]
TENSORS = ("w_enc", "b_enc", "w_dec", "b_dec", "mean", "scale", "threshold")


class StoppedError(Exception):
    pass


def stop_at(step):
    def progress(done, total, unit):
        if done == step:
            raise StoppedError

    return progress


def tensors(crosscoder):
    return {name: np.asarray(getattr(crosscoder, name)[...]) for name in TENSORS}


def assert_equal(ours, theirs):
    for name, value in tensors(ours).items():
        np.testing.assert_array_equal(value, tensors(theirs)[name], err_msg=name)


def checkpoint_steps(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("loop") / "store")


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """An uninterrupted run and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return small_run(store, folder), folder


def test_a_run_is_the_steps_on_the_scheduled_batches(store, whole):
    """By hand: normaliser from a spread sample, batch ``i`` of the schedule at step ``i``."""
    view = TokenView.of_split(store, OPTIONS.split, held_out=False)
    statistics = data_statistics(spread_sample(view, view.num_tokens), CONFIG)
    state = init_state(CONFIG, mean=statistics.mean, scale=statistics.scale, b_dec=statistics.b_dec)
    batches = Batches(view, view.schedule(32, window_tokens=256, seed=CONFIG.seed))
    for step in range(23):
        state, _ = train_step(state, jnp.asarray(batches.batch(step)), config=CONFIG)
    assert_equal(whole[0], state.crosscoder())


def test_the_folder_of_a_run(whole):
    crosscoder, folder = whole
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoints",
        "config.json",
        "crosscoder",
        "metrics.jsonl",
    ]
    assert_equal(cc.load(folder / "crosscoder"), crosscoder)
    recorded = json.loads((folder / "config.json").read_text())
    assert config_from_json(TrainConfig, recorded["train"]) == CONFIG
    assert config_from_json(Split, recorded["split"]) == OPTIONS.split
    assert checkpoint_steps(folder) == [20, 23]


def test_metrics_of_logged_steps(whole):
    metrics = read_metrics(whole[1] / "metrics.jsonl")
    assert [m["step"] for m in metrics] == LOGGED
    assert {"loss", "fve", "fve/base", "fve/chat", "l0", "dead", "threshold", "lr", "grad_norm"} <= set(
        metrics[0]
    )
    assert not any(name.startswith("is_finite") for name in metrics[0])
    assert all(m["tokens_per_s"] > 0 for m in metrics[1:])
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]
    # The last step is number 22 of the schedule: 1/5 of the decay over round(0.2 * 23) steps.
    assert metrics[-1]["lr"] == pytest.approx(CONFIG.learning_rate / 5)


def test_held_out_documents_play_no_part(store, whole, tmp_path):
    """Another store in which only they differ gives the same crosscoder."""
    acts = activations(1500)
    is_held_out = OPTIONS.split.is_held_out(np.arange(1500) // 20)
    assert 0.05 < is_held_out.mean() < 0.5
    acts[is_held_out] = 77.0
    other = write_store(tmp_path / "store", acts=acts)
    assert_equal(small_run(other, tmp_path / "run"), whole[0])


def test_progress_and_trackers_are_told(store, tmp_path):
    told, logged, closed = [], [], []

    class Recorder:
        def log(self, step, metrics):
            logged.append((step, metrics["loss"]))

        def close(self):
            closed.append(True)

    def progress(done, total, unit):
        told.append((done, total, unit))

    small_run(store, tmp_path, progress=progress, trackers=[Recorder()])
    assert told == [(step, 23, "steps") for step in range(1, 24)]
    assert logged == [(m["step"], m["loss"]) for m in read_metrics(tmp_path / "metrics.jsonl")]
    assert closed == [True]


def test_a_finished_run_returns_at_once_and_is_left_alone(store, whole, monkeypatch):
    monkeypatch.setattr(loop, "train_step", None)
    monkeypatch.setattr(loop, "Checkpoints", None)
    crosscoder, folder = whole
    before = files(folder)
    assert_equal(small_run(store, folder), crosscoder)
    assert files(folder) == before


def test_a_calibrated_threshold_survives_another_call(store, whole, tmp_path):
    small_run(store, tmp_path)
    calibrated = cc.load(tmp_path / "crosscoder")
    calibrated.threshold[...] = jnp.float32(0.625)
    cc.save(calibrated, tmp_path / "crosscoder")
    assert float(small_run(store, tmp_path).threshold[...]) == 0.625
    assert float(cc.load(tmp_path / "crosscoder").threshold[...]) == 0.625


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": recipe(num_steps=23, learning_rate=2e-2)}, r"train\.learning_rate: 0\.02, was 0\.01"),
        ({"config": recipe(num_steps=24)}, r"train\.num_steps: 24, was 23"),
        (
            {"config": recipe(num_steps=23, sparsity=cc.BatchTopK(k=4.0))},
            r"train\.crosscoder\.sparsity\.k: 4\.0, was 3\.0",
        ),
        (
            {"options": dataclasses.replace(OPTIONS, split=Split(0.2, seed=1))},
            r"split\.seed: 1, was 0",
        ),
        ({"options": dataclasses.replace(OPTIONS, window_tokens=512)}, "window_tokens: 512, was 256"),
    ],
)
@pytest.mark.parametrize("is_finished", [True, False])
def test_another_recipe_is_refused_with_a_diff(store, whole, tmp_path, changes, message, is_finished):
    folder = whole[1]
    if not is_finished:
        folder = tmp_path
        (folder / "config.json").write_bytes((whole[1] / "config.json").read_bytes())
    before = files(folder)
    with pytest.raises(ValueError, match=message) as caught:
        small_run(store, folder, **changes)
    assert "choose another output folder" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count(", was ") == 1, "what is equal is not listed"
    assert files(folder) == before


def test_another_store_is_refused(whole, tmp_path):
    other = write_store(tmp_path / "store", acts=activations(1500, seed=7))
    before = files(whole[1])
    with pytest.raises(ValueError, match=r"holds another run: store_identity\.fingerprint: "):
        small_run(other, whole[1])
    assert files(whole[1]) == before


def test_what_changes_no_weight_may_change(store, whole, tmp_path):
    with pytest.raises(StoppedError):
        small_run(store, tmp_path, progress=stop_at(12))
    options = dataclasses.replace(OPTIONS, log_every=1, checkpoint_every=2)
    assert_equal(small_run(store, tmp_path, options=options), whole[0])


def test_a_recipe_that_cannot_start_claims_no_folder(store, whole, tmp_path):
    third = cc.Sources((*sources().entries, cc.Source("third", 4)))
    with pytest.raises(ValueError, match="source 'third' reads 'third'"):
        small_run(store, tmp_path, config=recipe(num_steps=23, sources=third))
    assert not (tmp_path / "config.json").exists()
    assert_equal(small_run(store, tmp_path), whole[0])


@pytest.mark.parametrize("inside", [".", "run", "acts/run"])
def test_a_run_in_the_folder_of_its_store_is_refused(tmp_path, inside):
    store = write_store(tmp_path / "store", num_tokens=100)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"lies in the store .*: choose a folder beside it"):
        small_run(store, tmp_path / "store" / inside)
    assert files(tmp_path) == before
    assert not (tmp_path / "store" / "run").exists()


def test_a_batch_larger_than_what_there_is_to_train_on_is_refused(store, tmp_path):
    tokens = TokenView.of_split(store, OPTIONS.split, held_out=False).num_tokens
    with pytest.raises(ValueError, match=rf"batch_size={tokens + 1} is more than the {tokens} tokens of"):
        small_run(store, tmp_path / "run", config=recipe(batch_size=tokens + 1, num_steps=1, warmup_steps=0))
    assert not (tmp_path / "run").exists()
    small_run(store, tmp_path / "run", config=recipe(batch_size=tokens, num_steps=1, warmup_steps=0))


def test_derived_sources_of_a_bfloat16_store(tmp_path):
    """A difference SAE: one source, computed in float32 from what is stored in bf16."""
    store = write_store(tmp_path / "store", widths=(5, 5), dtype="bfloat16", num_tokens=600)
    stored = store.sources.entries
    config = recipe(num_steps=4, sources=cc.Sources((cc.difference(stored[1], stored[0]),)))
    crosscoder = fit(config, store, tmp_path / "run", options=OPTIONS)
    assert crosscoder.w_dec[...].shape == (16, 5)
    view = TokenView.of_split(store, OPTIONS.split, held_out=False)
    acts = view.read_positions(np.arange(view.num_tokens)).astype(np.float32)
    expected = (acts[:, 5:] - acts[:, :5]).astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(crosscoder.mean[...], expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def bad_batch(monkeypatch):
    """Make one step's batch hold a NaN, which a store cannot."""

    def inject(bad_step):
        iterate = Batches.iterate

        def poisoned(self, start_step, stop_step, rows=None):
            for step, batch in enumerate(iterate(self, start_step, stop_step, rows), start_step + 1):
                if step == bad_step:
                    batch = batch.copy()
                    batch[3, 2] = np.nan
                yield batch

        monkeypatch.setattr(Batches, "iterate", poisoned)

    return inject


@pytest.mark.parametrize("step", [13, 15])
def test_nan_stops_the_run_with_step_tensor_and_checkpoint(
    store, whole, tmp_path, bad_batch, monkeypatch, step
):
    """Step 15 would be saved: it is not, the newest checkpoint stays that of step 10."""
    bad_batch(step)
    with pytest.raises(FloatingPointError, match=rf"^step {step}: NaN or infinity in batch.*step 10 is good"):
        small_run(store, tmp_path)
    assert checkpoint_steps(tmp_path) == [5, 10]
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1, 4, 8, 12]
    assert not (tmp_path / "crosscoder" / "crosscoder.safetensors").exists()
    monkeypatch.undo()
    assert_equal(small_run(store, tmp_path), whole[0])
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == LOGGED


def test_nan_before_any_checkpoint_says_so(store, tmp_path, bad_batch):
    bad_batch(2)
    with pytest.raises(FloatingPointError, match=r"step 2: .*no checkpoint was saved yet: verify the store"):
        small_run(store, tmp_path)
    assert checkpoint_steps(tmp_path) == []


def test_a_rate_that_is_far_too_high_is_said_to_be(store, tmp_path):
    config = recipe(num_steps=23, warmup_steps=0, learning_rate=3e38)
    with pytest.raises(FloatingPointError, match=r"step \d+: NaN or infinity in .*: lower the learning rate"):
        small_run(store, tmp_path, config=config, options=dataclasses.replace(OPTIONS, checkpoint_every=1))
    # Whatever was saved is finite.
    for path in (tmp_path / "checkpoints").iterdir():
        assert path.name == "1"


def test_a_donation_that_fails_is_an_error(store, tmp_path, monkeypatch):
    def wasteful(state, acts, *, config):
        warnings.warn("Some donated buffers were not usable: float32[16]", stacklevel=1)
        return train_step(state, acts, config=config)

    monkeypatch.setattr(loop, "train_step", wasteful)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserWarning, match="donated buffers"):
            small_run(store, tmp_path)


@contextlib.contextmanager
def largest_file(size):
    """Writing beyond ``size`` bytes of any file fails, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_last_checkpoint_and_is_survived(store, whole, tmp_path):
    with pytest.raises(StoppedError):
        small_run(store, tmp_path, progress=stop_at(12))
    before = files(tmp_path / "checkpoints")
    with (
        largest_file(2000),
        pytest.raises(OSError, match=r"checkpoints: step 15 could not be saved") as caught,
    ):
        small_run(store, tmp_path)
    assert "make room, and the run goes on from step 10" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(tmp_path / "checkpoints") == before
    assert_equal(small_run(store, tmp_path), whole[0])
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == LOGGED


def test_a_second_process_on_the_same_folder_is_refused_and_harms_nothing(store, whole, tmp_path):
    refused = []

    def try_as_well(done, total, unit):
        if done in (3, 12):  # before and after the first checkpoints
            with pytest.raises(ValueError, match="another process is training this run: wait until it ends"):
                small_run(store, tmp_path)
            refused.append(done)

    ours = small_run(store, tmp_path, progress=try_as_well)
    assert refused == [3, 12]
    assert_equal(ours, whole[0])
    # The lock is gone with the run, also with one that failed.
    with pytest.raises(StoppedError):
        small_run(store, tmp_path / "stopped", progress=stop_at(2))
    assert_equal(small_run(store, tmp_path / "stopped"), whole[0])


def test_a_damaged_newest_checkpoint_is_named(store, whole, tmp_path):
    import shutil

    with pytest.raises(StoppedError):
        small_run(store, tmp_path, progress=stop_at(12))
    numbers = max((tmp_path / "checkpoints/10/state/d").iterdir(), key=lambda p: p.stat().st_size)
    numbers.write_bytes(numbers.read_bytes()[:100])
    with pytest.raises(
        ValueError, match=r"step 10 cannot be read .*: if it is damaged, move the folder 10 away"
    ):
        small_run(store, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "10")
    assert_equal(small_run(store, tmp_path), whole[0])


def test_processes_without_a_mesh_would_each_train_alone(store, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"mesh=None in a run of 2 processes.* make_mesh"):
        small_run(store, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_lanes_are_part_of_a_run_and_one_where_nothing_was_recorded(store, tmp_path):
    """A run of a release without lanes, whose config says nothing of them, is one of a single lane."""
    small_run(store, tmp_path)
    config = tmp_path / "config.json"
    recorded = json.loads(config.read_text())
    assert recorded.pop("lanes") == 1
    config.write_text(json.dumps(recorded))
    small_run(store, tmp_path)
    with pytest.raises(ValueError, match="holds another run: lanes: 4, was 1"):
        small_run(store, tmp_path, options=dataclasses.replace(OPTIONS, lanes=4))
