"""Progress and tables as they reach a terminal or a file."""

import io

import pytest
from rich.console import Console

from crosscoder_jax import terminal


def console(*, is_terminal):
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=100)


def written(screen):
    return screen.file.getvalue()


def test_a_stage_ends_with_its_name_and_time():
    screen = console(is_terminal=False)
    with terminal.progress_bar("harvest", screen) as report:
        report(1, 2, "tokens")
    assert written(screen) == "done harvest (0 s)\n"


def test_a_file_gets_a_line_now_and_then_with_rate_and_remaining_time(monkeypatch):
    clock = iter([0.0, 0.0, 5.0, 20.0, 21.0, 40.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    screen = console(is_terminal=False)
    with terminal.progress_bar("train", screen) as report:
        report(50, 1000, "steps")  # after 5 s: too soon
        report(200, 1000, "steps")  # after 20 s: 10 steps/s, 80 s for the other 800
        report(210, 1000, "steps")  # a second later: too soon
    assert written(screen).splitlines() == [
        "train: 200/1,000 steps, 10 steps/s, 80 s left",
        "done train (40 s)",
    ]


def test_a_terminal_gets_a_bar():
    screen = console(is_terminal=True)
    with terminal.progress_bar("train", screen) as report:
        report(500, 1000, "steps")
        report(1000, 1000, "steps")
    assert "1,000/1,000 steps" in written(screen)


def test_a_long_name_is_wrapped_and_not_cut(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    name = "organisation-of-a-long-name/" + "model-" * 8
    terminal.print_table("store", ("source", "model"), [("base", name)])
    rows = [line.split("│")[2].strip() for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert len(rows) > 1
    assert "".join(rows) == name


def test_an_error_is_not_reported_as_done():
    screen = console(is_terminal=False)
    with pytest.raises(ValueError, match="broken"), terminal.progress_bar("train", screen):
        raise ValueError("broken")
    assert "done" not in written(screen)
