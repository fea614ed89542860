"""A harvested store holds the hidden states of both models, whatever happened on the way."""

import json
import shutil
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("torch", reason="language models run in torch: install the extra 'lm'")
pytest.importorskip("datasets", reason="texts are read with datasets: install the extra 'lm'")

import safetensors.torch
import torch
import transformers
from language_models_cases import (
    BLOCKS,
    CORPUS,
    VOCABULARY,
    WIDTH,
    byte_level_tokenizer,
    random_model,
    save_pair,
    write_jsonl,
)

from crosscoder_jax.activations import ActivationStore, StoreError, StoreWriter
from crosscoder_jax.language_models import HarvestConfig, TextSource, harvest
from crosscoder_jax.language_models import pair as pair_module

CONTEXT, BATCH = 16, 3
PROSE = [{"text": sentence * (3 - i % 3)} for i, sentence in enumerate(CORPUS * 4)]
CHATS = [
    {"messages": [{"role": "user", "content": f"the ship {i}?"}, {"role": "assistant", "content": "the sea"}]}
    for i in range(9)
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture
def texts(tmp_path):
    return (
        TextSource("prose", write_jsonl(tmp_path / "prose.jsonl", PROSE)),
        TextSource("chat", write_jsonl(tmp_path / "chat.jsonl", CHATS)),
    )


@pytest.fixture
def config(tmp_path, pair, texts):
    """Make a small harvest, with what is asked changed."""

    def make(**fields):
        settings = {
            "store": str(tmp_path / "store"),
            "base": pair[0],
            "chat": pair[1],
            "texts": texts,
            "layers": (1,),
            "max_tokens": 200,
            "context": CONTEXT,
            "batch_size": BATCH,
            "model_dtype": "float32",
            "dtype": "float32",
            "device": "cpu",
            "checkpoint_tokens": 60,
        }
        return HarvestConfig(**(settings | fields))

    return make


def everything(path):
    """All arrays of a store and its manifest, to be compared."""
    store = ActivationStore.open(path)
    n = store.num_tokens
    columns = [store.tokens(0, n), store.documents(0, n), store.positions(0, n), store.labels(0, n)]
    return [np.asarray(store.read(0, n)).view(np.uint8), *map(np.asarray, columns)], store.manifest.to_json()


def checksums(path):
    return {
        str(f.relative_to(path)): zlib.crc32(f.read_bytes()) for f in Path(path).rglob("*") if f.is_file()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_store_holds_the_hidden_states_of_both_models(config, pair, dtype):
    """Row by row against the library's own hidden states of the same padded batches."""
    made = config(layers=(0, 2), dtype=dtype, model_dtype=dtype, is_split=True)
    harvest(made)
    store = ActivationStore.open(made.store)
    assert store.sources.names == ("base.L0", "base.L2", "chat.L0", "chat.L2")
    assert store.num_tokens == 200
    tokenizer = byte_level_tokenizer()
    documents, positions = store.documents(0, 200), store.positions(0, 200)
    acts = store.read(0, 200)
    assert acts.dtype == (np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)) for path in pair
    ]
    # The first text gives the first document, which is the first window of the first batch.
    ids = tokenizer(PROSE[0]["text"])["input_ids"]
    windows = [
        ids[:CONTEXT],
        [1, *ids[CONTEXT : 2 * CONTEXT - 1]],
        [1, *ids[2 * CONTEXT - 1 :][: CONTEXT - 1]],
    ]
    assert len(windows[2]) == CONTEXT, "the document is to fill the first batch"
    batch = torch.tensor(windows)
    with torch.inference_mode():
        states = [model(input_ids=batch, output_hidden_states=True).hidden_states for model in models]
    expected = torch.cat([s[layer + 1] for s in states for layer in (0, 2)], dim=-1)[:, 1:]
    rows = 3 * (CONTEXT - 1)
    np.testing.assert_array_equal(
        np.asarray(acts[:rows], np.float32), expected.reshape(rows, 4 * WIDTH).float().numpy()
    )
    np.testing.assert_array_equal(store.tokens(0, rows), np.array(windows)[:, 1:].ravel())
    np.testing.assert_array_equal(documents[:rows], 0)
    np.testing.assert_array_equal(positions[:rows], range(1, rows + 1))


def test_no_first_position_no_padding_and_the_texts_share_equally(config):
    manifest = harvest(config(max_tokens=300))
    store = ActivationStore.open(config().store)
    n = store.num_tokens
    tokens, positions, labels = store.tokens(0, n), store.positions(0, n), store.labels(0, n)
    assert n == 300
    assert not np.isin(tokens, [0, 1]).any(), "neither padding nor BOS"
    assert positions.min() == 1
    assert manifest.labels == ("prose", "chat")
    assert abs(int((labels == 0).sum()) - int((labels == 1).sum())) <= 2 * CONTEXT
    # Conversations are in the template: their markers are tokens of their own.
    marker = byte_level_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert marker in tokens[labels == 1]
    assert marker not in tokens[labels == 0]


def test_the_text_can_be_shown_without_a_tokenizer(config):
    harvest(config(is_split=True))
    store = ActivationStore.open(config().store)
    vocabulary = store.vocabulary()
    assert vocabulary is not None
    first = store.documents(0, store.num_tokens) == 0
    shown = b"".join(vocabulary[int(token)] for token in store.tokens(0, store.num_tokens)[first])
    assert shown.decode() == PROSE[0]["text"]


def test_the_same_model_twice_gives_bitwise_equal_sources(config, pair, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pair[0], copy)
    for chat, dtype in ((pair[0], "float32"), (str(copy), "bfloat16")):
        made = config(chat=chat, store=str(tmp_path / dtype), model_dtype=dtype)
        harvest(made)
        acts = ActivationStore.open(made.store).read(0, 200)
        np.testing.assert_array_equal(acts[:, :WIDTH], acts[:, WIDTH:])
        assert np.abs(acts).max() > 0


class Interrupted(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("outlier_multiple", [None, 1.2])
@pytest.mark.parametrize("is_split", [False, True])
def test_an_interrupted_harvest_ends_as_an_uninterrupted_one(config, tmp_path, is_split, outlier_multiple):
    settings = {"is_split": is_split, "outlier_multiple": outlier_multiple}
    whole = config(store=str(tmp_path / "whole"), **settings)
    harvest(whole)
    broken = config(store=str(tmp_path / "broken"), **settings)
    starts = []
    for stop_at in (1, 70, 71, 130, 199):

        def interrupt(done, total, unit, stop_at=stop_at):
            if unit == "tokens":
                starts.append(done)
                if done >= stop_at:
                    raise Interrupted

        with pytest.raises(Interrupted):
            harvest(broken, interrupt)
    harvest(broken)
    assert max(starts) > 130, "it went on from checkpoints, not from the beginning"
    (arrays, manifest), (expected, expected_manifest) = everything(broken.store), everything(whole.store)
    for array, other in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(array, other)
    assert manifest == expected_manifest


def test_a_finished_store_is_returned_without_loading_a_model(config, monkeypatch):
    first = harvest(config())
    before = checksums(config().store)
    monkeypatch.setattr(pair_module, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(pair_module, "load_tokenizer", lambda *_: pytest.fail("a tokenizer was loaded"))
    again = harvest(config(device=None, checkpoint_tokens=7), lambda *_: pytest.fail("progress of nothing"))
    assert json.dumps(again.to_json()) == json.dumps(first.to_json())
    assert checksums(config().store) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layers": (2,)}, "layers"),
        ({"context": 17}, "context"),
        ({"outlier_multiple": 9.0}, "outlier_multiple"),
    ],
)
def test_a_store_of_another_config_is_refused(config, change, named):
    harvest(config())
    before = checksums(config().store)
    with pytest.raises(ValueError, match=named):
        harvest(config(**change))
    assert checksums(config().store) == before


def test_a_changed_text_or_model_is_another_config(config, texts, pair, tmp_path):
    models = tmp_path / "models"
    shutil.copytree(Path(pair[1]).parent, models)
    made = config(base=str(models / "base"), chat=str(models / "chat"))
    harvest(made)
    write_jsonl(Path(texts[0].location), PROSE[1:])
    with pytest.raises(ValueError, match="content"):
        harvest(made)
    write_jsonl(Path(texts[0].location), PROSE)
    harvest(made)
    random_model(seed=7).save_pretrained(models / "chat")
    with pytest.raises(ValueError, match="revision"):
        harvest(made)


def test_the_caller_is_told_when_a_harvest_is_accepted_and_not_when_it_is_refused_or_done(config, tmp_path):
    told = []

    def accept():
        told.append((Path(config().store) / "partial.json").is_file())

    with pytest.raises(ValueError, match="layer 9 does not exist"):
        harvest(config(layers=(9,)), on_accepted=accept)
    with pytest.raises(ValueError, match="cannot be read"):
        harvest(config(texts=(TextSource("none", str(tmp_path / "none.jsonl")),)), on_accepted=accept)
    assert told == []
    harvest(config(), on_accepted=accept)
    assert told == [True]
    harvest(config(), on_accepted=accept)
    with pytest.raises(ValueError, match="context"):
        harvest(config(context=17), on_accepted=accept)
    assert told == [True]


def test_outliers_leave_both_sources_and_are_counted(config, tmp_path):
    everything_kept = config(store=str(tmp_path / "all"), max_tokens=10_000)
    harvest(everything_kept)
    store = ActivationStore.open(everything_kept.store)
    n = store.num_tokens
    acts = store.read(0, n).reshape(n, 2, WIDTH)
    norms = np.linalg.norm(acts, axis=2)
    # The whole corpus is below the calibration length, so the medians are those of all tokens.
    limits = 1.2 * np.median(norms, axis=0)
    kept = (norms <= limits).all(axis=1)
    assert 0 < kept.sum() < n
    filtered = config(store=str(tmp_path / "filtered"), max_tokens=10_000, outlier_multiple=1.2)
    manifest = harvest(filtered)
    store = ActivationStore.open(filtered.store)
    assert store.num_tokens == kept.sum()
    np.testing.assert_array_equal(store.read(0, store.num_tokens), acts[kept].reshape(-1, 2 * WIDTH))
    outliers = manifest.provenance["outliers"]
    assert outliers["dropped"] == n - kept.sum()
    np.testing.assert_allclose(list(outliers["norm_limits"].values()), limits, rtol=1e-6)


def test_the_texts_may_end_before_enough_is_kept(config):
    reports = []
    manifest = harvest(config(max_tokens=10_000), lambda *report: reports.append(report))
    assert manifest.num_tokens < 10_000
    assert manifest.provenance["texts"]["ended"] == ["prose", "chat"]
    assert manifest.provenance["texts"]["rows"] == {"prose": len(PROSE), "chat": len(CHATS)}
    assert manifest.num_documents == len(PROSE) + len(CHATS)
    assert reports[:3] == [(0, 2, "models"), (1, 2, "models"), (2, 2, "models")]
    done = [report[0] for report in reports[3:]]
    assert done == sorted(done)
    assert reports[-1] == (manifest.num_tokens, manifest.num_tokens, "tokens")


def test_the_manifest_tells_where_the_activations_come_from(config, pair):
    manifest = harvest(config(layers=None))
    base, chat = manifest.sources
    assert (base.name, chat.name) == ("base", "chat")
    assert (base.model, chat.model) == pair
    assert base.hook_point == chat.hook_point == f"blocks.{BLOCKS // 2}.resid_post"
    assert base.revision != chat.revision
    assert (base.revision or "").startswith("sha256:")
    provenance = manifest.provenance
    assert provenance["versions"]["transformers"] == transformers.__version__
    assert provenance["model_dtype"] == "float32"
    assert provenance["chat_template"].startswith("sha256:")
    assert provenance["config"]["context"] == CONTEXT
    assert provenance["outliers"] == {"multiple": None, "norm_limits": None, "dropped": 0}
    json.dumps(provenance)


def test_nothing_is_printed(config, capfd, recwarn):
    harvest(config())
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_each_model_may_be_read_at_its_own_layer(config):
    manifest = harvest(config(layers=(1,), chat_layers=(3,)))
    assert [s.hook_point for s in manifest.sources] == ["blocks.1.resid_post", "blocks.3.resid_post"]
    assert [s.name for s in manifest.sources] == ["base", "chat"]


def test_models_of_different_width_and_depth_share_a_store(config, pair, tmp_path):
    wide = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(wide).save_pretrained(tmp_path / "wide")
    byte_level_tokenizer().save_pretrained(tmp_path / "wide")
    manifest = harvest(config(chat=str(tmp_path / "wide"), layers=None))
    assert [(s.width, s.hook_point) for s in manifest.sources] == [
        (WIDTH, "blocks.2.resid_post"),
        (48, "blocks.3.resid_post"),
    ]


@pytest.mark.parametrize(("layers", "named"), [((BLOCKS,), f"layer {BLOCKS}"), ((0, 9), "layer 9")])
def test_a_layer_out_of_range_names_model_and_layers(config, pair, layers, named):
    with pytest.raises(
        ValueError, match=rf"{named} does not exist in base \({pair[0]}\): its 4 blocks are 0 to 3"
    ):
        harvest(config(layers=layers))
    assert not Path(config().store).exists()


def test_disagreeing_tokenizers_are_refused(config, pair, tmp_path):
    shutil.copytree(pair[1], tmp_path / "other")
    byte_level_tokenizer(use_bos=False).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="the tokenizers of base and chat disagree: the text"):
        harvest(config(chat=str(tmp_path / "other")))


def test_a_context_longer_than_the_position_embeddings_is_refused(config):
    with pytest.raises(ValueError, match="context=65 is longer than base can read: take 64 or less"):
        harvest(config(context=65))


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(config, tmp_path):
    # Both tokenizers have 400 tokens, the models 384 embeddings: an index error on a CPU, a crash on a GPU.
    added = [f"<tool {i}>" for i in range(VOCABULARY)]
    for name in ("base", "chat"):
        random_model().save_pretrained(tmp_path / name)
        tokenizer = byte_level_tokenizer()
        tokenizer.add_tokens(added)
        tokenizer.save_pretrained(tmp_path / name)
    text = TextSource("tools", write_jsonl(tmp_path / "t.jsonl", [{"text": "the ship <tool 300>"}]))
    pair = {"base": str(tmp_path / "base"), "chat": str(tmp_path / "chat")}
    with pytest.raises(ValueError, match=r"token \d+ .'<tool 300>'. has no embedding in base .* has 384"):
        harvest(config(texts=(text,), **pair))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": ""}, {"text": ""}],
            "texts a hold no token to keep: 2 rows read, 2 of them with no more than",
        ),
        (
            [{"messages": [{"role": "system", "content": "x"}]}],
            "1 refused by the chat template; .*only user and assistant",
        ),
        (
            [{"prompt": "x"}],
            r"text 'a' .* has no column messages, conversations, conversation or text; it has prompt",
        ),
    ],
)
@pytest.mark.parametrize("outlier_multiple", [None, 3.0])
def test_texts_without_anything_to_keep_are_refused(config, tmp_path, rows, message, outlier_multiple):
    text = TextSource("a", write_jsonl(tmp_path / "a.jsonl", rows))
    with pytest.raises(ValueError, match=message):
        harvest(config(texts=(text,), outlier_multiple=outlier_multiple))
    assert not Path(config().store).exists(), "the next try may have other settings"


def test_one_empty_text_beside_others_is_no_fault(config, texts, tmp_path):
    empty = TextSource("empty", write_jsonl(tmp_path / "empty.jsonl", [{"text": ""}]))
    manifest = harvest(config(texts=(empty, *texts)))
    assert manifest.provenance["texts"]["empty"] == {"empty": 1, "prose": 0, "chat": 0}
    assert manifest.num_tokens == 200


@pytest.mark.parametrize("outlier_multiple", [None, 100.0])
def test_a_model_that_gives_nan_is_named_with_document_and_position(config, pair, tmp_path, outlier_multiple):
    broken = tmp_path / "broken"
    shutil.copytree(pair[1], broken)
    weights = safetensors.torch.load_file(broken / "model.safetensors")
    token = byte_level_tokenizer()("the ship")["input_ids"][-1]
    weights["model.embed_tokens.weight"][token] = float("nan")
    safetensors.torch.save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"source 'chat'.*document \d+, position \d+"):
        harvest(config(chat=str(broken), outlier_multiple=outlier_multiple))


def test_a_full_disk_is_said_and_the_harvest_goes_on_later(config, monkeypatch, tmp_path):
    whole = config(store=str(tmp_path / "whole"))
    harvest(whole)
    checkpoint, calls = StoreWriter.checkpoint, []

    def fail_at_the_second(self, cursor):
        calls.append(cursor)
        if len(calls) == 2:
            raise StoreError("chunk 1: No space left on device")
        checkpoint(self, cursor)

    monkeypatch.setattr(StoreWriter, "checkpoint", fail_at_the_second)
    with pytest.raises(ValueError, match="No space left on device"):
        harvest(config())
    harvest(config())
    for array, other in zip(everything(config().store)[0], everything(whole.store)[0], strict=True):
        np.testing.assert_array_equal(array, other)


def test_a_template_file_takes_the_place_of_the_models(config, tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    harvest(config(chat_template=str(tmp_path / "t.jinja")))
    store = ActivationStore.open(config().store)
    n = store.num_tokens
    vocabulary = store.vocabulary()
    assert vocabulary is not None
    chats = store.tokens(0, n)[store.labels(0, n) == 1]
    shown = b"".join(vocabulary[int(token)] for token in chats).decode()
    # The first position, "[", is skipped; the second document begins after it.
    assert shown.startswith("the ship 0?][the sea]")
    with pytest.raises(ValueError, match=r"chat_template=.*none.jinja: there is no such file"):
        harvest(config(chat_template=str(tmp_path / "none.jinja"), store=str(tmp_path / "other")))


def test_the_template_is_that_of_the_chat_model_else_of_the_base_model(config, pair, texts, tmp_path):
    def with_templates(base, chat):
        for name, template in (("base", base), ("chat", chat)):
            byte_level_tokenizer(template=template).save_pretrained(models / name)
        store = tmp_path / f"store-{len(list(tmp_path.iterdir()))}"
        made = config(base=str(models / "base"), chat=str(models / "chat"), store=str(store), max_tokens=50)
        return harvest(made).provenance["chat_template"]

    models = tmp_path / "models"
    shutil.copytree(Path(pair[0]).parent, models)
    for file in models.rglob("chat_template.jinja"):
        file.unlink()
    with pytest.raises(ValueError, match="neither tokenizer has a chat template"):
        with_templates(None, None)
    one = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    from_base = with_templates(one, None)
    assert with_templates(one + "!", one) == from_base
    assert with_templates(one, one + "!") != from_base


def test_models_between_are_sources_in_their_order(config, pair, tmp_path):
    folder = tmp_path / "third"
    random_model(seed=7).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    both = config()
    harvest(both)
    made = config(store=str(tmp_path / "three"), between=(f"middle={folder}", f"again={pair[1]}"))
    manifest = harvest(made)
    store, of_both = ActivationStore.open(made.store), ActivationStore.open(both.store)
    assert store.sources.names == ("base", "middle", "again", "chat")
    assert [source.model for source in manifest.sources] == [pair[0], str(folder), pair[1], pair[1]]
    base, middle, again, chat = store.sources.split(store.read(0, 200))
    np.testing.assert_array_equal(np.concatenate([base, chat], axis=1), of_both.read(0, 200))
    np.testing.assert_array_equal(again, chat)
    assert np.abs(middle - base).max() > 0.1


def test_a_store_of_other_models_between_is_another_store(config, pair):
    harvest(config(between=(f"middle={pair[0]}",)))
    with pytest.raises(ValueError, match="between"):
        harvest(config())


def test_a_tokenizer_between_that_disagrees_is_named(config, pair, tmp_path):
    folder = tmp_path / "third"
    shutil.copytree(pair[0], folder)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|im_end|>", "<|im_over|>"))
    with pytest.raises(ValueError, match="the tokenizers of base and middle disagree"):
        harvest(config(between=(f"middle={folder}",)))
