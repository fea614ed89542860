"""The parts of an experiment's README that its command writes."""

from collections.abc import Sequence
from pathlib import Path

from crosscoder_jax.activations.atomic import write_bytes_atomically


def replace_section(readme: Path, section: str, text: str) -> None:
    """Replace what stands between a section's two marks.

    Raises:
        ValueError: if the README has no such section.
    """
    begin, end = f"<!-- begin {section} -->\n", f"<!-- end {section} -->"
    before, found_begin, rest = readme.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{readme}: has no section {section!r}: add the lines {begin.strip()} and {end}")
    write_bytes_atomically(readme, f"{before}{begin}{text}{end}{after}".encode())


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as markdown, a line a row."""
    lines = [" | ".join(row) for row in (columns, ["---"] * len(columns), *rows)]
    return "".join(f"| {line} |\n" for line in lines)
