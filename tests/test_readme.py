"""The README keeps its promises: its commands exist and its example finds what it planted."""

import re
import shlex
from pathlib import Path

import pytest

from crosscoder_jax import cli

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands():
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    lines = [shlex.split(line) for line in text.splitlines()]
    return [words[1:] for words in lines if words and words[0] == "crosscoder-jax"]


@pytest.mark.parametrize("words", commands(), ids=lambda words: words[0])
def test_every_command_of_the_readme_parses(words):
    assert cli.parse(words[0], words[1:]) is not None


def test_what_is_installed_is_the_clone_and_not_a_package_that_is_not_published():
    installed = [line for block in blocks("bash") for line in block.splitlines() if "pip install" in line]
    assert len(installed) == 4
    for line in installed:
        packages = re.findall(r"pip install (?:-\S+ )*(\S+)", line)
        assert all(package.startswith(("'.[", "torch==")) for package in packages), line


def test_the_two_setup_commands_are_one_line_each():
    lines = [line for block in blocks("bash") for line in block.strip().splitlines() if "venv" in line]
    assert len(lines) == 2
    assert lines[0].endswith("-m experiments.quickstart")
    assert "pytest" in lines[1]


def test_the_example_finds_exactly_the_planted_chat_only_features(capsys):
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 35
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    explained, claimed = re.fullmatch(r"variance explained (\S+) chat-only latents (\d+)\n", printed).groups()
    assert float(explained) > 0.99
    assert int(claimed) == 16
