"""What a harvest is told, refused where it makes no sense; none of it needs torch."""

import subprocess
import sys

import pytest

from crosscoder_jax.language_models import HarvestConfig, ModelReference, TextSource

TEXT = TextSource("novel", "moby.jsonl")


def config(**fields):
    return HarvestConfig(**({"store": "store", "base": "a", "chat": "b", "texts": (TEXT,)} | fields))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/model", ModelReference("org/model", "v2", None)),
        ("models/tiny", ModelReference("models/tiny", "v2", None)),
        ("models/tiny/w.Q4_1.gguf", ModelReference("models/tiny", "v2", "w.Q4_1.gguf")),
        ("w.gguf", ModelReference(".", "v2", "w.gguf")),
    ],
)
def test_a_model_is_an_id_a_folder_or_a_gguf_file_in_one(text, expected):
    assert ModelReference.parse(text, "v2") == expected


def test_a_model_reference_reads_as_it_was_given():
    assert str(ModelReference.parse("a/b/w.gguf")) == "a/b/w.gguf"
    assert str(ModelReference.parse("org/model", "main")) == "org/model@main"


def test_an_empty_model_name_is_refused():
    with pytest.raises(ValueError, match="a hub id or a folder"):
        ModelReference.parse(" ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("novel=moby.jsonl", TEXT),
        ("c4=allenai/c4?subset=en&split=validation", TextSource("c4", "allenai/c4", "en", "validation")),
        (
            "n=a=b.txt?unit=line&share=0.5&column=body",
            TextSource("n", "a=b.txt", None, "train", "body", 0.5, "line"),
        ),
    ],
)
def test_a_text_is_a_label_a_location_and_fields(text, expected):
    assert TextSource.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("moby.jsonl", "must be label=location"),
        ("=moby.jsonl", "must be label=location"),
        ("novel=", "must be label=location"),
        ("novel=x?colum=text", "unknown field 'colum': the fields are subset, split, column"),
        ("novel=x?share=much", "novel=x.share=much.: share=much must be a number"),
        ("novel=x?share", "has no value of 'share': write share=VALUE"),
        ("novel=x?share=0", "share=0.0 of text 'novel' must be a positive number"),
        ("novel=x?share=inf", "must be a positive number"),
        ("novel=x?unit=page", "unit='page' of text 'novel' must be line, paragraph or file"),
    ],
)
def test_a_malformed_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        TextSource.parse(text)


def test_a_text_without_a_location_is_refused():
    with pytest.raises(ValueError, match="needs a label and a location"):
        TextSource("novel", "")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"skip_positions": 0}, "skip_positions=0 must be at least 1"),
        ({"batch_size": -1}, "batch_size=-1 must be at least 1"),
        ({"context": 4, "skip_positions": 4}, "context=4 must be larger than skip_positions=4"),
        ({"dtype": "float16"}, "dtype='float16' must be one of bfloat16, float32"),
        ({"model_dtype": "half"}, "model_dtype='half' must be one of"),
        ({"outlier_multiple": 1.0}, "outlier_multiple=1.0 must be above 1"),
        ({"outlier_multiple": float("nan")}, "outlier_multiple=nan must be above 1"),
        ({"texts": ()}, "texts is empty"),
        ({"texts": (TEXT, TextSource("novel", "other.txt"))}, "the label 'novel' twice"),
        ({"layers": ()}, r"layers=\(\) must be one or more different block numbers"),
        ({"layers": (1, 1)}, r"layers=\(1, 1\) must be one or more different"),
        ({"layers": (-1,)}, r"layers=\(-1,\) must be one or more"),
        ({"layers": (1, 2), "chat_layers": (1,)}, "must be equally many"),
        ({"chat_layers": (1,)}, "needs layers"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_a_config_knows_its_models():
    made = config(base="x/y.gguf", chat="org/m", chat_revision="main")
    assert made.references["base"] == ModelReference("x", None, "y.gguf")
    assert made.references["chat"] == ModelReference("org/m", "main")


@pytest.mark.parametrize(
    "text",
    [
        TextSource("novel", "moby.jsonl"),
        TextSource("web", "some/data", subset="a&b=c", split="train[:5%]", column="the body", share=0.5),
        TextSource("prose", "notes.txt", unit="file"),
    ],
)
def test_a_text_is_written_as_it_is_read(text):
    assert TextSource.parse(str(text)) == text


def test_configs_are_imported_without_torch():
    heavy = "{'torch', 'transformers', 'datasets'}"
    code = f"import sys, crosscoder_jax.language_models; raise SystemExit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_missing_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in [name for name in sys.modules if name.startswith("crosscoder_jax.language_models.")]:
        if not name.endswith(".config"):
            monkeypatch.delitem(sys.modules, name)
    import crosscoder_jax.language_models as room

    with pytest.raises(ModuleNotFoundError, match=r"capture_residuals.*torch.*crosscoder-jax\[lm\]"):
        _ = room.capture_residuals
    with pytest.raises(AttributeError, match="no attribute 'capture_everything'"):
        _ = room.capture_everything


def test_models_between_are_named_in_their_order_with_their_revisions():
    made = config(between=("step60=checkpoints/60", "step90=org/m@step90"))
    assert list(made.references) == ["base", "step60", "step90", "chat"]
    assert made.references["step60"] == ModelReference("checkpoints/60")
    assert made.references["step90"] == ModelReference("org/m", "step90")


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (("step60",), "between='step60' must be name=model"),
        (("=m",), "between='=m' must be name=model"),
        (("a.b=m",), "the name without a dot"),
        (("a=m", "a=n"), "between has 'a' twice"),
        (("chat=m",), "between has 'chat' twice, or as another model"),
    ],
)
def test_models_between_that_cannot_be_told_apart_are_refused(between, message):
    with pytest.raises(ValueError, match=message):
        config(between=between)
