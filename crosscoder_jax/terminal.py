"""How long-running work shows itself in a terminal: bars with rate and remaining time, and tables."""

import contextlib
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from crosscoder_jax import typing

_LINE_EVERY_SECONDS = 15.0


class _RateColumn(ProgressColumn):
    """Units per second, from the whole run of the bar."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", "")
        return Text("" if speed is None else f"{speed:,.4g} {unit}/s", style="cyan")


@contextlib.contextmanager
def progress_bar(description: str, console: Console | None = None) -> Iterator[typing.Progress]:
    """Show one stage: a live bar in a terminal, a line now and then where output is a file.

    Args:
        description: what the stage does.
        console: where to; standard error by default.

    Yields:
        The callback to give to a long-running function.
    """
    console = console or Console(stderr=True)
    started = time.monotonic()
    shown = _live_bar(description, console) if console.is_terminal else _plain_lines(description, console)
    with shown as report:
        yield report
    console.print(f"[green]done[/green] {description} [dim]({time.monotonic() - started:.0f} s)[/dim]")


@contextlib.contextmanager
def _live_bar(description: str, console: Console) -> Iterator[typing.Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
        _RateColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(description, total=1, unit="", visible=False)

        def report(done: int, total: int, unit: str) -> None:
            bars.update(task, completed=done, total=total, unit=unit, visible=True)

        yield report


@contextlib.contextmanager
def _plain_lines(description: str, console: Console) -> Iterator[typing.Progress]:
    started = time.monotonic()
    shown = started

    def report(done: int, total: int, unit: str) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < _LINE_EVERY_SECONDS:
            return
        shown = now
        rate = done / (now - started)
        left = (total - done) / rate if rate else float("inf")
        console.print(f"{description}: {done:,}/{total:,} {unit}, {rate:,.4g} {unit}/s, {left:.0f} s left")

    yield report


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to standard output, its title above it in one line however narrow it is."""
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(title, style="italic", markup=False, highlight=False, soft_wrap=True)
    Console().print(table)
