"""The command that harvests: what it keeps of itself, what it says, and what it refuses in one line."""

import json

import pytest

pytest.importorskip("torch", reason="language models run in torch: install the extra 'lm'")
pytest.importorskip("datasets", reason="texts are read with datasets: install the extra 'lm'")

from language_models_cases import CORPUS, save_pair, write_jsonl

from crosscoder_jax import cli
from crosscoder_jax.activations import ActivationStore


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The options that name two models."""
    base, chat = save_pair(tmp_path_factory.mktemp("models"))
    return ["--base", base, "--chat", chat]


@pytest.fixture
def texts(tmp_path):
    """A short text and a long one: at least 10 tokens a row, a third of the rows three times as long."""
    rows = [{"text": sentence} for sentence in CORPUS * 6]
    short, long = (write_jsonl(tmp_path / f"{n}.jsonl", rows[:n]) for n in (2, 18))
    return f"short={short}", f"long={long}"


@pytest.fixture
def harvest(tmp_path, models, texts):
    """Run the command with what is asked added; return the file that its config is saved in."""

    def run(*options, store=tmp_path / "store"):
        fixed = ["--texts", *texts, "--context", "16", "--max-tokens", "60", "--device", "cpu"]
        cli.main(["harvest", "--store", str(store), *models, *fixed, *map(str, options)])
        return store.with_name(f"{store.name}.command.json")

    return run


def refused(capsys, harvest, *options, **places):
    """Run a command that must fail; return the one line it printed."""
    with pytest.raises(SystemExit) as exit_:
        harvest(*options, **places)
    assert exit_.value.code == 1
    line = capsys.readouterr().err.strip()
    assert line.count("error:") == 1
    return line.partition("error: ")[2]


def test_the_config_beside_the_store_reads_back_and_makes_it(harvest, tmp_path):
    saved = harvest()
    config = cli.parse("harvest", ["--config", str(saved)])
    assert (config.context, config.max_tokens, config.store) == (16, 60, str(tmp_path / "store"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "12"], "written under other settings"),
        (["--layers", "9"], "layer 9 does not exist"),
        (["--texts", "none=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_a_harvest_that_is_refused_leaves_the_config_of_the_store_as_it_is(options, message, harvest, capsys):
    saved = harvest()
    before = saved.read_bytes()
    assert message in refused(capsys, harvest, *options)
    assert saved.read_bytes() == before


def test_a_harvest_that_is_refused_leaves_nothing_where_there_was_no_store(harvest, capsys, tmp_path):
    before = set(tmp_path.iterdir())
    for options in (["--layers", "9"], ["--device", "cuda:99"], ["--chat", "/nowhere/model"]):
        refused(capsys, harvest, *options)
    assert set(tmp_path.iterdir()) == before


def test_the_config_is_kept_of_a_harvest_that_was_stopped(harvest, capsys, monkeypatch):
    from crosscoder_jax.activations import StoreWriter

    def stop(*_, **__):
        raise OSError(28, "No space left on device", "store")

    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "append", stop)
        assert refused(capsys, harvest) == "store: no space left on device: check the path"
    saved = harvest()
    assert json.loads(saved.read_text())["context"] == 16


def test_a_text_that_ends_early_is_said_with_the_tokens_kept_and_asked_for(harvest, capsys, tmp_path):
    harvest("--max-tokens", 120)
    store = ActivationStore.open(tmp_path / "store")
    kept = int((store.labels(0, store.num_tokens) == 0).sum())
    assert 0 < kept < 60
    warned = capsys.readouterr().err
    # Two texts of one share: half of the 120 tokens from each.
    assert f"warning: text 'short' ended early: {kept} tokens kept of 60 asked for" in warned
    assert "'long'" not in warned


def test_texts_that_last_are_not_spoken_of(harvest, capsys):
    harvest("--max-tokens", 20)
    assert "ended" not in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_there_is_not_is_one_line_with_the_flag(device, harvest, capsys):
    assert refused(capsys, harvest, "--device", device).startswith(f"--device='{device}' cannot be used (")


def test_a_store_below_a_file_is_one_line(harvest, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(capsys, harvest, store=tmp_path / "file" / "store")
    assert line.endswith("file is a file: choose another path")


def test_a_value_that_the_config_refuses_names_the_flag_and_no_class(harvest, capsys):
    assert refused(capsys, harvest, "--batch-size", 0) == "--batch-size=0 must be at least 1"


def test_a_text_that_is_not_understood_is_one_line_without_the_usage(harvest, capsys):
    line = refused(capsys, harvest, "--texts", "novel")
    assert line == "text 'novel' must be label=location, such as novel=moby.jsonl"
