"""Metrics on disk: one line a step, whatever is killed in between."""

import json
import math
import sys

import pytest

from crosscoder_jax.training.tracking import JsonLinesTracker, TensorBoardTracker, Tracker, read_metrics


def test_one_json_object_per_step(tmp_path):
    tracker = JsonLinesTracker(tmp_path / "metrics.jsonl")
    tracker.log(1, {"loss": 0.5, "fve/base": -0.25})
    tracker.log(2, {"loss": 0.1 + 0.2})
    tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5, "fve/base": -0.25}, {"step": 2, "loss": 0.1 + 0.2}]
    assert read_metrics(tmp_path / "metrics.jsonl") == lines


def test_lines_are_on_disk_at_once(tmp_path):
    tracker = JsonLinesTracker(tmp_path / "metrics.jsonl")
    tracker.log(1, {"loss": 0.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    tracker.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_has_no_number_for_is_null(tmp_path, value):
    tracker = JsonLinesTracker(tmp_path / "metrics.jsonl")
    tracker.log(1, {"loss": value, "l0": 3.0})
    tracker.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "l0": 3.0}


def test_resuming_drops_later_steps_and_keeps_earlier_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLinesTracker(path)
    for step in (1, 4, 8, 12):
        first.log(step, {"loss": float(step)})
    first.close()
    again = JsonLinesTracker(path, first_step=8)
    again.log(12, {"loss": 0.0})
    again.close()
    assert [(m["step"], m["loss"]) for m in read_metrics(path)] == [(1, 1.0), (4, 4.0), (8, 8.0), (12, 0.0)]


def test_a_run_begun_anew_begins_a_new_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n')
    JsonLinesTracker(path).close()
    assert path.read_text() == ""


@pytest.mark.parametrize("cut", ['{"step": 5, "lo', '{"step": 5, "loss": 1.0}'])
def test_a_line_cut_off_by_a_kill_is_left_out_and_dropped(tmp_path, cut):
    """Without its line feed nobody knows whether a line is whole: ``1.0`` may have been ``1.05``."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n' + cut)
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    tracker = JsonLinesTracker(path, first_step=10)
    tracker.log(11, {"loss": 3.0})
    tracker.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 11]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense}", "line 2 is not JSON"),
        ("[1]", "line 2 is no object with a 'step'"),
        ('{"loss": 1}', "line 2 is no object with a 'step'"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"metrics.jsonl {message}.*: remove the line"):
        read_metrics(path)
    with pytest.raises(ValueError, match=message):
        JsonLinesTracker(path, first_step=5)
    assert path.read_text() == '{"step": 1}\n' + line + "\n"


def test_no_file_reads_as_no_metrics(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_trackers_follow_the_protocol(tmp_path):
    tracker = JsonLinesTracker(tmp_path / "metrics.jsonl")
    assert isinstance(tracker, Tracker)
    tracker.close()


def test_tensorboard_writes_an_event_file(tmp_path):
    pytest.importorskip("tensorboardX", reason="event files need the extra 'tensorboard'")
    tracker = TensorBoardTracker(tmp_path)
    assert isinstance(tracker, Tracker)
    tracker.log(7, {"fve/base": 0.5, "loss": math.nan})
    tracker.close()
    (path,) = tmp_path.glob("events.out.tfevents.*")
    data = path.read_bytes()
    assert b"fve/base" in data
    assert b"loss" in data


def test_tensorboard_that_is_not_there_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"pip install 'crosscoder-jax\[tensorboard\]'"):
        TensorBoardTracker(tmp_path)
