"""Options become a config: flags, a saved config file that they override, and typos by the nearest name."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest

from crosscoder_jax.arguments import name_flags, option_types, parse_options
from crosscoder_jax.commands import Train
from crosscoder_jax.configs import config_to_json
from crosscoder_jax.language_models import HarvestConfig, TextSource

REQUIRED = ["--store", "s", "--output", "o"]


@dataclasses.dataclass(frozen=True)
class Inner:
    hidden_size: int = 3
    """Size."""


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    """Nested."""
    is_loud: bool = False
    """A flag."""


@pytest.fixture
def saved(tmp_path):
    """The file of a command, and the command."""
    command = Train(store=Path("s"), output=Path("o"), num_latents=24, k=3.0, tensorboard=True)
    path = tmp_path / "train.command.json"
    path.write_text(json.dumps(config_to_json(command)))
    return path, command


def test_nested_fields_are_options_beside_the_others():
    assert option_types(Outer) == {"hidden-size": int, "is-loud": bool}
    assert parse_options(Outer, ["--hidden-size", "5", "--is-loud"]) == Outer(Inner(5), is_loud=True)


def test_without_options_every_field_has_its_default():
    assert parse_options(Outer, []) == Outer()


@pytest.mark.parametrize(
    ("options", "tensorboard", "is_centred"),
    [
        ("", False, True),
        ("--tensorboard --no-is-centred", True, False),
        ("--no-tensorboard --is_centred", False, True),
    ],
)
def test_what_is_on_or_off_is_a_flag(options, tensorboard, is_centred):
    command = parse_options(Train, [*REQUIRED, *shlex.split(options)])
    assert (command.tensorboard, command.is_centred) == (tensorboard, is_centred)


@pytest.mark.parametrize("options", ["--is-centred False", "--is-centred=False", "--no-is_centred True"])
def test_a_flag_with_a_value_is_refused_with_what_to_write(options):
    with pytest.raises(
        ValueError, match=r"^--is-centred takes no value: write --is-centred or --no-is-centred$"
    ):
        parse_options(Train, [*REQUIRED, *shlex.split(options)])


@pytest.mark.parametrize(
    ("typo", "message"),
    [
        ("--no-is-centered", "no option --no-is-centered: did you mean --no-is-centred?"),
        ("--num-latens", "no option --num-latens: did you mean --num-latents?"),
        ("--num_latens=3", "no option --num-latens: did you mean --num-latents?"),
        ("--qqqq", "no option --qqqq: see --help"),
    ],
)
def test_a_mistyped_option_is_refused_with_the_nearest(typo, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - compared whole below
        parse_options(Train, [*REQUIRED, typo])
    assert str(error.value) == message


def test_a_value_that_looks_like_no_option_is_no_typo():
    assert parse_options(Train, [*REQUIRED, "--learning-rate", "-1e-3"]).learning_rate == -1e-3


def test_the_config_file_gives_what_the_options_leave_out(saved):
    path, command = saved
    assert parse_options(Train, ["--config", str(path)]) == command


@pytest.mark.parametrize("words", [["--config={}", "--k", "5"], ["--k", "5", "--config", "{}"]])
def test_options_override_the_config_file(saved, words):
    path, command = saved
    again = parse_options(Train, [word.format(path) for word in words])
    assert again == dataclasses.replace(command, k=5.0)


def test_a_flag_can_be_turned_off_that_a_config_file_turned_on(saved):
    path, command = saved
    assert command.tensorboard
    assert not parse_options(Train, ["--config", str(path), "--no-tensorboard"]).tensorboard


def test_config_without_a_file_is_refused():
    with pytest.raises(ValueError, match="--config needs the name of a file"):
        parse_options(Train, [*REQUIRED, "--config"])


def test_a_typo_in_a_config_file_names_the_file_and_the_nearest_field(saved):
    path, _ = saved
    fields = json.loads(path.read_text())
    fields["num_latens"] = fields.pop("num_latents")
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="no field 'num_latens': did you mean 'num_latents'") as error:
        parse_options(Train, ["--config", str(path)])
    assert str(path) in str(error.value)


def test_help_says_what_the_command_does_and_that_files_are_read(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_options(Outer, ["--help"], prog="loudly", description="Do it loudly.")
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: loudly" in printed
    assert "Do it loudly." in printed
    assert "--config FILE reads the options of an earlier run." in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("novel", "text 'novel' must be label=location, such as novel=moby.jsonl"),
        (
            "a=b?shar=2",
            "text 'a=b?shar=2' has the unknown field 'shar': the fields are subset, split, column",
        ),
    ],
)
def test_a_text_that_is_not_understood_is_refused_in_its_own_words(text, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - compared below
        parse_options(HarvestConfig, ["--store", "s", "--base", "a", "--chat", "b", "--texts", text])
    assert str(error.value).startswith(message)


def test_what_the_config_refuses_is_no_fault_of_the_syntax():
    options = shlex.split("--store s --base a --chat b --texts novel=moby.jsonl --context 0")
    with pytest.raises(ValueError, match=r"^context=0 must be at least 1$"):
        parse_options(HarvestConfig, options)


def test_help_tells_all_that_can_be_said_of_a_text(capsys):
    with pytest.raises(SystemExit):
        parse_options(HarvestConfig, ["--help"])
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in ("label=location", "subset=NAME", "split=NAME", "column=NAME", "share=NUMBER", "unit=line"):
        assert part in printed


def test_texts_of_a_config_file_keep_all_that_is_said_of_them(tmp_path):
    texts = (TextSource("web", "some/data", subset="small", column="body", share=2.0),)
    config = HarvestConfig("s", "a", "b", texts)
    path = tmp_path / "s.command.json"
    path.write_text(json.dumps(config_to_json(config)))
    again = parse_options(HarvestConfig, ["--config", str(path), "--context", "32"])
    assert again == dataclasses.replace(config, context=32)


def test_a_config_file_that_is_not_there_is_named_with_what_to_name():
    with pytest.raises(ValueError, match=r"^--config nowhere.json: there is no such file: name a \.command"):
        parse_options(Train, [*REQUIRED, "--config", "nowhere.json"])


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("k=3 must be whole with sparsity='top-k'", "--k=3 must be whole with --sparsity='top-k'"),
        ("give (batch_size=2), not bigk=3", "give (--batch-size=2), not bigk=3"),
        (
            "r2 holds another run: train.batch_size: 2, was 3",
            "r2 holds another run: train.batch_size: 2, was 3",
        ),
        ("cache 'k=a' must be x/k=a or ?k=a&k=b", "cache 'k=a' must be x/k=a or ?k=a&k=b"),
    ],
)
def test_fields_of_the_config_are_named_as_flags(message, expected):
    assert name_flags(message, Train) == expected


def test_texts_are_read_as_label_and_location():
    options = shlex.split("--store s --base a --chat b --texts novel=moby.jsonl web=some/data?share=2")
    config = parse_options(HarvestConfig, options)
    assert config.texts == (
        TextSource("novel", "moby.jsonl"),
        TextSource("web", "some/data", share=2.0),
    )
