"""The parts of a README that a command writes."""

import pytest

from experiments.readme import markdown_table, replace_section


def test_a_section_is_replaced_and_nothing_else(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- begin table -->\nold\n<!-- end table -->\nafter\n")
    for text in ("first\n", "second\n"):
        replace_section(path, "table", text)
    assert path.read_text() == "before\n<!-- begin table -->\nsecond\n<!-- end table -->\nafter\n"


@pytest.mark.parametrize("text", ["no marks", "<!-- begin table -->\n", "<!-- end table -->\n"])
def test_a_readme_without_the_section_is_refused_and_kept(text, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="has no section 'table': add the lines <!-- begin table -->"):
        replace_section(path, "table", "new\n")
    assert path.read_text() == text


def test_a_table_has_a_line_a_row():
    assert markdown_table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
