"""Write the report of one or several runs to a file."""

import datetime
from collections.abc import Callable
from pathlib import Path

from crosscoder_jax.report.config import ReportConfig


def write_report(
    config: ReportConfig,
    output: Path,
    *,
    today: datetime.date | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write one self-contained HTML page about the runs and return its path.

    Args:
        config: the runs, the main crosscoder first, and how much of each is shown.
        output: the file to write, or an existing folder to write `report.html` into.
        today: the date printed in the footer; today's by default.
        tell: told, in a sentence each, which numbers of the page were measured on other weights or tokens.

    Raises:
        ValueError: a run lacks a file that the report needs (names it and the command that makes it), a
            file is damaged, or the extra `report` is not installed.

    References:
        Minder et al. 2025, arXiv 2504.02922.
    """
    try:
        from crosscoder_jax.activations.atomic import write_bytes_atomically
        from crosscoder_jax.report.content import build_methods
        from crosscoder_jax.report.files import read_run
        from crosscoder_jax.report.gaps import stale_parts
        from crosscoder_jax.report.page import render_page
    except ModuleNotFoundError as error:
        if error.name not in ("plotly", "jinja2", "pyarrow", "scipy"):
            raise
        raise ValueError(f"a report needs {error.name!r}: pip install 'crosscoder-jax[report]'") from error
    methods = build_methods([read_run(Path(run)) for run in config.runs], config.names)
    for sentence in stale_parts(methods):
        tell(sentence)
    page = render_page(config, methods, today or datetime.date.today())
    path = output / "report.html" if output.is_dir() else output
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(path, page.encode("utf-8"))
    return path
