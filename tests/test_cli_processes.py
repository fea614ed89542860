"""The command in several processes: told to end, killed, refused; and what it leaves behind."""

import contextlib
import json
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from processes import Together, free_port
from training_cases import write_store

from crosscoder_jax import cli, sharding
from crosscoder_jax.commands import Calibrate, Diff, Doctor, Evaluate, Train
from crosscoder_jax.training.tracking import read_metrics

MAIN = ["-c", "import sys; from crosscoder_jax.cli import main; main()"]

GLOO = re.compile(
    r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : |\d+"
)
"""What XLA says of its connections, in pieces: its threads interrupt each other."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("cli_processes")
    write_store(place / "store")
    return place


def commands(place, count, **options):
    """The same command for each process, for ever unless told otherwise."""
    settings = {
        **{"store": place / "store", "output": place / "run", "num_latents": 16, "k": 3, "batch_size": 32},
        **{"num_steps": 10**6, "warmup_steps": 3, "checkpoint_every": 5, "window_tokens": 256, "lanes": 2},
        **{"data_shards": 2, "latent_shards": 2, "log_every": 1, "coordinator": f"127.0.0.1:{free_port()}"},
        **{"num_processes": count},
    } | options
    words = [w for name, value in settings.items() for w in (f"--{name.replace('_', '-')}", value)]
    return [[*MAIN, "train", *words, "--process-id", index] for index in range(count)]


def wait_for_step(place, run, step):
    """Return once the run has logged that step; the processes are killed should it never."""
    deadline = time.monotonic() + 200
    while True:
        rows = read_metrics(place / "run" / "metrics.jsonl")
        if rows and rows[-1]["step"] >= step:
            return
        alive = [process.poll() is None for process in run.processes]
        assert all(alive), run.output()
        assert time.monotonic() < deadline, run.output()
        time.sleep(0.2)


def saved_steps(place):
    return sorted(int(path.name) for path in (place / "run" / "checkpoints").iterdir() if path.name.isdigit())


def test_told_to_end_then_going_on_then_a_host_dies(place):
    """SIGTERM to one of two: both save the same step and end with 75. SIGKILL to one: the other ends, too."""
    with Together(commands(place, 2), place / "told", devices=2) as run:
        wait_for_step(place, run, 6)
        run.processes[1].send_signal(signal.SIGTERM)
        assert run.wait(60) == [75, 75], run.output()
        output = run.output()
    step = saved_steps(place)[-1]
    assert output.count(f"told to end (SIGTERM): step {step} is saved") == 2
    kept = json.loads((place / "run" / "train.command.json").read_text())
    assert {name: kept[name] for name in ("distributed", "coordinator", "num_processes", "process_id")} == {
        **{"distributed": False, "coordinator": None, "num_processes": None, "process_id": None}
    }
    for dies in (1, 0):
        with Together(commands(place, 2), place / f"dies-{dies}", devices=2) as run:
            wait_for_step(place, run, step + 5 * (2 - dies))
            run.processes[dies].kill()
            left = run.processes[1 - dies]
            # In under 30 s, which kills, and not as if all were well.
            assert left.wait(30) not in (0, 75), run.output()
    steps = [row["step"] for row in read_metrics(place / "run" / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)), "each once, over three starts"


def test_two_processes_calibrate_evaluate_and_diff_as_one(tmp_path):
    run = tmp_path / "run"
    write_store(tmp_path / "store", widths=(5, 5))  # equal, for Latent Scaling
    recipe = "--num-steps 20 --num-latents 16 --k 3 --batch-size 32 --warmup-steps 3"
    cli.main(["train", "--store", str(tmp_path / "store"), "--output", str(run), *recipe.split()])
    alone = tmp_path / "alone"
    shutil.copytree(run, alone)
    mesh = ["--data-shards", "2", "--latent-shards", "2", "--num-processes", "2"]
    for name in ("calibrate", "evaluate", "diff"):
        cli.main([name, "--run", str(alone)])
        together = [*mesh, "--coordinator", f"127.0.0.1:{free_port()}", "--process-id"]
        words = [[*MAIN, name, "--run", run, *together, index] for index in range(2)]
        with Together(words, tmp_path / name, devices=2) as both:
            assert both.wait(200) == [0, 0], both.output()
        heard = (tmp_path / name / "process-1.log").read_text()
        assert not GLOO.sub("", heard).split(), "but for XLA the first alone is heard"
        kept = json.loads((run / f"{name}.command.json").read_text())
        assert (kept["data_shards"], kept["num_processes"]) == (2, None)
    ours, theirs = (json.loads((at / "evaluation.json").read_text()) for at in (run, alone))
    for metric in ("fve", "l0_inference_rule", "threshold", "num_tokens"):
        assert ours[metric] == pytest.approx(theirs[metric], rel=1e-5), metric
    ours, theirs = (pq.read_table(at / "diff" / "latents.parquet") for at in (run, alone))
    assert ours.column_names == theirs.column_names
    for column in ("delta_norm", "frequency", "nu_error"):
        np.testing.assert_allclose(ours[column], theirs[column], rtol=1e-3, atol=1e-6, err_msg=column)


def test_a_host_that_no_longer_answers_ends_the_other(place, tmp_path):
    """As when its network is gone: its connections stay open, unlike those of a killed one, and only the
    heartbeat tells. It is the first process that stops, which is also the one that listens for heartbeats.
    """
    stopped = 0
    with Together(commands(place, 2, output=tmp_path / "run"), tmp_path / "logs", devices=2) as run:
        wait_for_step(tmp_path, run, 2)
        run.processes[stopped].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        assert run.processes[1 - stopped].wait(60) not in (0, 75), run.output()
        assert time.monotonic() - began < sharding.HEARTBEAT_SECONDS + 15


SLOW = """
import sys, time
from crosscoder_jax.training import evaluate
mark, placed = sys.argv.pop(), evaluate._placed

def slowly(*arguments):
    open(mark, "w").close()
    time.sleep(1)
    return placed(*arguments)

evaluate._placed = slowly
from crosscoder_jax.cli import main
main()
"""


def test_sigterm_to_one_of_two_processes_that_measure_ends_both(tmp_path):
    """They have nothing to save; JAX alone would note the order and go on."""
    run = tmp_path / "run"
    write_store(tmp_path / "store")
    recipe = "--num-steps 2 --num-latents 16 --k 3 --batch-size 32 --warmup-steps 1"
    cli.main(["train", "--store", str(tmp_path / "store"), "--output", str(run), *recipe.split()])
    together = ["--data-shards", 2, "--latent-shards", 2, "--num-processes", 2, "--batch-size", 8]
    together += ["--coordinator", f"127.0.0.1:{free_port()}", "--process-id"]
    marks = [tmp_path / f"began-{index}" for index in range(2)]
    words = [["-c", SLOW, "calibrate", "--run", run, *together, i, mark] for i, mark in enumerate(marks)]
    with Together(words, tmp_path / "logs", devices=2) as both:
        deadline = time.monotonic() + 100
        while not all(mark.exists() for mark in marks):
            assert time.monotonic() < deadline, both.output()
            time.sleep(0.1)
        both.processes[1].send_signal(signal.SIGTERM)
        assert both.processes[1].wait(5) == -signal.SIGTERM
        assert both.processes[0].wait(40) not in (0, 75), both.output()


@pytest.mark.parametrize(
    ("config", "is_ended"),
    [
        (Train(Path(), Path(), distributed=True), False),
        (Calibrate(Path(), distributed=True), True),
        (Evaluate(Path(), distributed=True), True),
        (Diff(Path(), distributed=True), True),
        (Doctor(distributed=True), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_training_alone_is_asked_to_end_and_not_ended(config, is_ended, monkeypatch):
    """What starts the processes takes the signal; of all commands training alone lets it."""
    taken = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sharding, "start_processes", lambda *_: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    handlers = []
    try:
        cli._in_processes(lambda _: handlers.append(signal.getsignal(signal.SIGTERM)))(config)
    finally:
        signal.signal(signal.SIGTERM, taken)
    assert handlers == [signal.SIG_DFL if is_ended else signal.SIG_IGN]


@pytest.mark.parametrize(("options", "seconds"), [({"distributed": True}, 1800.0), ({}, None)])
def test_several_processes_that_measure_are_watched(options, seconds, monkeypatch):
    told = []

    @contextlib.contextmanager
    def watchdog(limit):
        told.append(limit)
        yield lambda: told.append("alive")

    monkeypatch.setattr(cli, "watchdog", watchdog)
    with cli._watched_bar("diff", Diff(Path(), **options)) as progress:
        progress(1, 2, "tokens")
        progress(2, 2, "tokens")
    assert told == [seconds, "alive", "alive"]


def test_models_are_not_spliced_in_several_processes(tmp_path):
    words = ["evaluate", "--run", tmp_path, "--splice", "--coordinator", f"127.0.0.1:{free_port()}"]
    alone = [[*MAIN, *words, "--num-processes", "1", "--process-id", "0"]]
    with Together(alone, tmp_path / "logs", devices=1) as run:
        assert run.wait(60) == [1]
        assert "leave the other processes out" in " ".join(run.output().split())


def test_a_mistake_that_only_the_first_process_sees_ends_all(place, tmp_path):
    """Another run has the folder: what the first process is refused the other says, too."""
    from crosscoder_jax.training.folders import locked_folder

    words = commands(place, 2, output=tmp_path / "run")
    with locked_folder(tmp_path / "run", "training"), Together(words, tmp_path / "logs", devices=2) as run:
        assert run.wait(100) == [1, 1], run.output()
        assert "another process is training this run: wait until it ends" in run.output()


def test_processes_that_cannot_meet_are_refused(place, tmp_path, capsys, monkeypatch):
    """With what JAX says where it finds no cluster; it would not be asked in a process that has computed."""

    def find_nothing(*told, **settings):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", find_nothing)
    options = ["--store", place / "store", "--output", tmp_path / "run", "--distributed"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *map(str, options)])
    assert ended.value.code == 1
    assert "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_where_a_run_was_trained_is_not_part_of_its_command(tmp_path):
    config = Train(tmp_path, tmp_path, coordinator="host:1", num_processes=2, process_id=0)
    assert config.is_distributed
    assert config.without_processes() == Train(tmp_path, tmp_path)
    assert not config.without_processes().is_distributed
    assert Train(tmp_path, tmp_path, distributed=True).is_distributed


@pytest.mark.parametrize(
    ("count", "options", "warning"),
    [
        (1, {"data_shards": 8}, None),
        (4, {"data_shards": 8}, "--lanes 1 for 4 processes that share a batch: .* --lanes 4, or a multiple"),
        (4, {"data_shards": 8, "lanes": 8}, None),
        (4, {"data_shards": 2, "lanes": 1}, "--lanes 1 for 2 processes that share a batch: .* --lanes 2, or"),
        (4, {"data_shards": 1, "latent_shards": 8}, None),
    ],
)
def test_reading_more_than_a_share_is_said(tmp_path, capsys, monkeypatch, count, options, warning):
    monkeypatch.setattr(jax, "process_count", lambda: count)
    cli._warn_of_lanes(Train(tmp_path, tmp_path, **options))
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(warning, said) if warning else not said
