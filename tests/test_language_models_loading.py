"""Which model was loaded is known exactly, and what cannot be loaded is named."""

import json
import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("torch", reason="language models run in torch: install the extra 'lm'")
pytest.importorskip("transformers", reason="language models run in torch: install the extra 'lm'")

import safetensors.torch
import torch
import transformers
from language_models_cases import BLOCKS, WIDTH, byte_level_tokenizer, random_model, save_gguf

from crosscoder_jax.language_models.config import ModelReference
from crosscoder_jax.language_models.loading import (
    ModelFacts,
    load_model,
    load_tokenizer,
    quiet,
    read_facts,
    sha256_of_files,
    usable_device,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    random_model("gemma3").save_pretrained(path)
    byte_level_tokenizer().save_pretrained(path)
    return path


def test_facts_of_a_local_folder(folder):
    facts = read_facts(ModelReference(str(folder)))
    assert (facts.num_blocks, facts.width, facts.max_positions) == (BLOCKS, WIDTH, 64)
    assert facts.revision.startswith("sha256:")
    assert facts.pinned() == ModelReference(str(folder))


def test_a_folder_under_the_home_folder_is_found_by_its_short_name(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    short = ModelReference.parse(f"~/{folder.name}")
    assert short.is_local
    facts = read_facts(short)
    assert facts.revision == read_facts(ModelReference(str(folder))).revision
    assert load_model(facts, dtype="float32", device="cpu").config.get_text_config().hidden_size == WIDTH
    assert load_tokenizer(short)("the ship")["input_ids"]


def test_facts_of_a_multimodal_model_are_those_of_its_text_part(tmp_path):
    random_model("gemma3_multimodal").save_pretrained(tmp_path)
    facts = read_facts(ModelReference(str(tmp_path)))
    assert (facts.num_blocks, facts.width) == (BLOCKS, WIDTH)


def test_the_revision_of_a_folder_follows_its_content(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    revision = read_facts(ModelReference(str(folder))).revision
    assert read_facts(ModelReference(str(copy))).revision == revision
    (copy / "README.md").write_text("what the model is")
    assert read_facts(ModelReference(str(copy))).revision == revision
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert read_facts(ModelReference(str(copy))).revision != revision


def test_the_hash_knows_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("y")
    both = sha256_of_files([tmp_path / "b", tmp_path / "a"])
    assert both == sha256_of_files([tmp_path / "a", tmp_path / "b"])
    (tmp_path / "a").write_text("y")
    (tmp_path / "b").write_text("x")
    assert sha256_of_files([tmp_path / "a", tmp_path / "b"]) != both


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_loaded_as_saved_in_the_precision_asked(folder, dtype):
    model = load_model(read_facts(ModelReference(str(folder))), dtype=dtype, device="cpu")
    expected = random_model("gemma3").to(getattr(torch, dtype))
    assert not model.training
    parameters = dict(model.named_parameters())
    assert parameters.keys() == dict(expected.named_parameters()).keys()
    for name, parameter in expected.named_parameters():
        assert parameters[name].dtype == getattr(torch, dtype)
        assert torch.equal(parameters[name], parameter), name


def test_the_tokenizer_comes_with_its_template(folder):
    tokenizer = load_tokenizer(ModelReference(str(folder)))
    assert tokenizer.bos_token_id == 1
    assert "im_start" in tokenizer.chat_template


def test_loading_is_silent_and_leaves_the_settings_of_the_library(folder, capfd):
    before = transformers.utils.logging.get_verbosity()
    reference = ModelReference(str(folder))
    load_model(read_facts(reference), dtype="float32", device="cpu")
    load_tokenizer(reference)
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.get_verbosity() == before
    assert transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    with quiet():
        pass
    assert not transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.enable_progress_bar()


def test_a_gguf_file_is_read_silently_and_identified_by_its_content(tmp_path, capfd):
    expected = save_gguf(tmp_path / "tiny.gguf")
    facts = read_facts(ModelReference.parse(str(tmp_path / "tiny.gguf")))
    assert (facts.num_blocks, facts.width, facts.max_positions) == (BLOCKS, WIDTH, 64)
    assert facts.revision == sha256_of_files([tmp_path / "tiny.gguf"])
    model = load_model(facts, dtype="float32", device="cpu")
    assert capfd.readouterr() == ("", "")
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


@pytest.mark.parametrize("read", [read_facts, load_tokenizer])
@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (ModelReference("/nowhere/model"), "there is no folder /nowhere/model"),
        (ModelReference("./nowhere"), "there is no folder ./nowhere"),
        (ModelReference("a/b/c"), "there is no folder a/b/c"),
        (ModelReference("a/b/c", None, "w.gguf"), "model a/b/c/w.gguf: there is no folder a/b/c"),
    ],
)
def test_a_model_that_is_not_there_is_named(read, reference, message):
    with pytest.raises(ValueError, match=message):
        read(reference)


def test_a_revision_of_a_folder_and_a_missing_gguf_file_are_refused(folder):
    with pytest.raises(ValueError, match="revision is for models on the hub"):
        read_facts(ModelReference(str(folder), "main"))
    with pytest.raises(ValueError, match=r"there is no file w.gguf in"):
        read_facts(ModelReference(str(folder), None, "w.gguf"))


def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        read_facts(ModelReference(str(tmp_path)))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-family"}))
    with pytest.raises(ValueError, match="no-such-family"):
        read_facts(ModelReference(str(tmp_path)))


def test_missing_and_truncated_weights_are_refused(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"copy cannot be loaded"):
        load_model(read_facts(ModelReference(str(copy))), dtype="float32", device="cpu")
    weights.unlink()
    with pytest.raises(ValueError, match=r"copy cannot be loaded"):
        load_model(read_facts(ModelReference(str(copy))), dtype="float32", device="cpu")


@pytest.mark.parametrize(("family", "head"), [("qwen2", "lm_head"), ("gpt_neox", "embed_out")])
def test_weights_missing_from_the_files_are_refused_but_for_the_head(family, head, tmp_path):
    # The library itself fills them with random numbers and only warns.
    random_model(family).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    facts = read_facts(ModelReference(str(tmp_path)))
    del weights[f"{head}.weight"]
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    load_model(facts, dtype="float32", device="cpu")
    name = next(name for name in weights if ".1." in name)
    del weights[name]
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"1 of its weights are not in its files, such as .*{name}"):
        load_model(facts, dtype="float32", device="cpu")


def test_the_commit_on_the_hub_is_recorded_and_pinned(folder, tmp_path):
    """A cache of the hub, laid out by hand, is read offline by another process."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--tiny"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = """if True:
        from crosscoder_jax.language_models import ModelReference, load_model, load_tokenizer, read_facts
        facts = read_facts(ModelReference("org/tiny", "main"))
        assert facts.revision == "%s", facts
        assert facts.pinned().revision == facts.revision
        load_model(facts, dtype="float32", device="cpu")
        load_tokenizer(facts.pinned())
        try:
            read_facts(ModelReference("org/other"))
        except ValueError as error:
            assert "org/other is no folder here, and from the hub it cannot be loaded" in str(error), error
        else:
            raise SystemExit("a model that is not there was found")
    """
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code % commit], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_an_unknown_commit_stays_with_the_branch_asked():
    facts = ModelFacts(ModelReference("org/tiny", "main"), "unknown", 1, 1, None)
    assert facts.pinned().revision == "main"


def test_the_default_device_can_be_used():
    torch.zeros(1, device=usable_device(None))


@pytest.mark.parametrize("device", ["cuda:99", "no-such-device"])
def test_a_device_that_torch_cannot_use_is_refused_in_one_line(device):
    with pytest.raises(ValueError, match=rf"device='{device}' cannot be used \(.+\): take 'cpu'") as caught:
        usable_device(device)
    assert "\n" not in str(caught.value)
    assert usable_device("cpu") == "cpu"
