"""Runs of several processes: the numbers of one, each file read once, and going on in any other number."""

import contextlib
import json

import jax
import numpy as np
import pytest
from processes import Together, free_port
from processes_cases import BATCH, CHUNK, LANES, OPTIONS, STEPS, make_store, train

import crosscoder_jax as cc
from crosscoder_jax.activations import TokenView
from crosscoder_jax.publishing import tensors_of
from crosscoder_jax.training.tracking import read_metrics

SCRIPT = "tests/training_process.py"
TWO, FOUR = [(8, 1), (3, 2), (2, 4)], [(4, 2), (1, 8)]
"""Meshes in two and in four processes; of 3 x 2 the second process has two devices, the first four."""


class StoppedError(Exception):
    pass


@contextlib.contextmanager
def float64():
    """For all threads: those that read checkpoints take no notice of ``jax.enable_x64``."""
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def spawn(place, count, jobs):
    file = place / f"jobs-of-{count}.json"
    file.write_text(json.dumps(jobs))
    port = free_port()
    commands = [[SCRIPT, file, f"127.0.0.1:{port}", count, index] for index in range(count)]
    with Together(commands, place / f"logs-of-{count}", devices=8 // count) as run:
        codes = run.wait(400)
        assert codes == [0] * count, run.output()


def job(place, name, mesh, stop_at=None):
    is_warm = name.startswith("warm")
    return {"folder": str(place / name), "mesh": mesh, "stop_at": stop_at, "is_warm": is_warm}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Everything trained: alone, in two and in four processes, and one run handed from one to the next.

    That one begins in this process on a mesh and is stopped as by a crash; two processes and then four go
    on, each until one of them is sent SIGTERM; one device finishes it.
    """
    place = tmp_path_factory.mktemp("processes")
    make_store(place)

    def stop(done, total, unit):
        if done == 6:
            raise StoppedError

    with float64():
        seen = {}
        train(place / "alone", None, seen)
        np.savez(place / "alone.1.0.npz", **seen)
        with pytest.raises(StoppedError):
            train(place / "handed", (2, 4), {}, stop)
    with float64():
        train(place / "warm", None, {}, is_warm=True)
    jobs = [job(place, "warm two", (2, 4)), job(place, "handed", (4, 2), stop_at=8)]
    spawn(place, 2, [*(job(place, f"two {m}", m) for m in TWO), *jobs])
    spawn(place, 4, [*(job(place, f"four {m}", m) for m in FOUR), job(place, "handed", (8, 1), stop_at=13)])
    with float64():
        train(place / "handed", None, {})
    return place


def seen(place, name, count=1, index=0):
    with np.load(place / f"{name}.{count}.{index}.npz") as file:
        return dict(file)


def assert_is_the_run(place, name, alone="alone"):
    """Metrics of every step and the weights, to the rounding of float64 sums, of thresholds to float32."""
    ours, theirs = (read_metrics(place / run / "metrics.jsonl") for run in (name, alone))
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for row, expected in zip(ours, theirs, strict=True):
        assert (row["l0"], row["dead"]) == (expected["l0"], expected["dead"])
        for key in ("loss", "loss/aux_k", "grad_norm", "fve"):
            np.testing.assert_allclose(row[key], expected[key], rtol=1e-6, atol=1e-9, err_msg=key)
    with float64():
        ours, theirs = (tensors_of(cc.load(place / run / "crosscoder")) for run in (name, alone))
    for key, value in theirs.items():
        tolerance = 1e-6 if key == "threshold" else 1e-10
        np.testing.assert_allclose(ours[key], value, rtol=tolerance, atol=tolerance, err_msg=key)


RUNS = [*(("two", mesh, 2) for mesh in TWO), *(("four", mesh, 4) for mesh in FOUR)]


@pytest.mark.parametrize(("number", "mesh", "count"), RUNS)
def test_several_processes_train_the_run_of_one(place, number, mesh, count):
    name = f"{number} {mesh}"
    assert_is_the_run(place, name)
    for index in range(count):
        np.testing.assert_array_equal(seen(place, name, count, index)["kept"], seen(place, "alone")["kept"])


@pytest.mark.parametrize(("number", "mesh", "count"), RUNS)
def test_several_processes_calibrate_and_measure_as_one(place, number, mesh, count):
    expected = {name: value for name, value in seen(place, "alone").items() if name.startswith("measured ")}
    assert len(expected) > 5
    for index in range(count):
        ours = seen(place, f"{number} {mesh}", count, index)
        for name, value in expected.items():
            # The threshold, which is float32, lies between two scores.
            np.testing.assert_allclose(ours[name], value, rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(("number", "mesh", "count"), RUNS)
def test_several_processes_diff_as_one(place, number, mesh, count):
    alone = seen(place, "alone")
    expected = {name: value for name, value in alone.items() if name.startswith("diffed ")}
    assert {"diffed delta_norm", "diffed nu_error", "diffed verdict"} <= expected.keys()
    for index in range(count):
        ours = seen(place, f"{number} {mesh}", count, index)
        assert str(ours["peaks"]) == str(alone["peaks"])
        for name, value in expected.items():
            if value.dtype.kind == "f":
                np.testing.assert_allclose(ours[name], value, rtol=1e-6, atol=1e-9, err_msg=name)
            else:
                np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_two_processes_begin_with_a_saved_crosscoder_as_one(place):
    assert_is_the_run(place, "warm two", "warm")


def test_a_run_handed_from_one_process_to_two_to_four_to_one_is_the_run_of_one(place):
    assert_is_the_run(place, "handed")


@pytest.mark.parametrize(("count", "stop_at"), [(2, 8), (4, 13)])
def test_a_sigterm_to_one_process_ends_all_after_the_same_step_saved(place, count, stop_at):
    runs = [seen(place, "handed", count, index) for index in range(count)]
    (told,) = {str(run["told"]) for run in runs}
    (last,) = {int(run["last"]) for run in runs}
    assert stop_at <= last < STEPS
    assert told == f"told to end (SIGTERM): step {last} is saved, the same call goes on from there"


@pytest.mark.parametrize(("number", "mesh", "count"), RUNS)
def test_each_process_reads_its_share(place, number, mesh, count):
    """The rows of a process lie in some of the four lanes; it reads their files, and those that are cut."""
    view = TokenView.of_split(cc.ActivationStore.open(place / "store"), OPTIONS.split, held_out=False)
    schedule = view.schedule(BATCH, window_tokens=OPTIONS.window_tokens, seed=0, lanes=LANES)
    steps = np.stack([schedule.positions(step) for step in range(STEPS)])
    files = view.token_index(steps.ravel()).reshape(STEPS, BATCH) // CHUNK
    per_process = 8 // count
    for index in range(count):
        devices = range(index * per_process, min((index + 1) * per_process, mesh[0] * mesh[1]))
        shards = sorted({device // mesh[1] for device in devices})
        rows = np.concatenate([np.arange(BATCH).reshape(mesh[0], -1)[shard] for shard in shards])
        assert seen(place, f"{number} {mesh}", count, index)["files"].tolist() == sorted(
            set(files[:, rows].ravel())
        )
    everything = len(set(files.ravel()))
    read = sum(len(seen(place, f"{number} {mesh}", count, index)["files"]) for index in range(count))
    if mesh[0] == 1:
        assert read == count * everything, "every process has every token"
