"""Cross-entropy and KL recovered: known crosscoders, and everything again by hand in NumPy."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="language models run in torch: install the extra 'lm'")
pytest.importorskip("datasets", reason="texts are read with datasets: install the extra 'lm'")

import diffing_cases
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from language_models_cases import CORPUS, WIDTH, byte_level_tokenizer, random_model, write_jsonl

import crosscoder_jax as cc
from crosscoder_jax import cli
from crosscoder_jax.activations import ActivationStore, Split
from crosscoder_jax.activations.atomic import write_json_atomically
from crosscoder_jax.language_models import HarvestConfig, SpliceConfig, TextSource, evaluate_spliced, harvest
from crosscoder_jax.language_models import replay as replay_module
from crosscoder_jax.language_models.document_sums import DocumentSums, splice_metrics
from crosscoder_jax.language_models.documents import Window
from crosscoder_jax.training.loop import RunOptions, run_identity

README = (Path(__file__).parent.parent / "README.md").read_text()
CONTEXT, BATCH, LAYER = 16, 3, 1
SPLIT = Split(0.5, seed=1)
PROSE = [{"text": sentence[: 15 + 17 * i]} for i in range(5) for sentence in CORPUS]


def save_models(folder, family):
    """Two models with weights ten times as large as at random: their predictions are sure of something."""
    for seed, name in enumerate(("base", "chat")):
        model = random_model(family, seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(10 if parameter.ndim == 2 else 1)
        model.save_pretrained(folder / name)
        byte_level_tokenizer().save_pretrained(folder / name)
    return str(folder / "base"), str(folder / "chat")


def make_store(folder, family="llama", **changes):
    """A float32 store of all tokens of fifteen documents, some shorter than the context."""
    base, chat = save_models(folder / "models", family)
    text = TextSource("prose", write_jsonl(folder / "prose.jsonl", PROSE))
    settings = {
        "store": str(folder / "store"),
        "base": base,
        "chat": chat,
        "texts": (text,),
        "layers": (LAYER,),
        "max_tokens": 10_000,
        "context": CONTEXT,
        "batch_size": BATCH,
        "model_dtype": "float32",
        "dtype": "float32",
        "device": "cpu",
    }
    config = HarvestConfig(**(settings | changes))
    harvest(config)
    return ActivationStore.open(config.store)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("recovered"))


def identity(sources):
    """A crosscoder with x = relu(x) - relu(-x): exact in any float."""
    eye = np.eye(sources.width)
    return diffing_cases.make_crosscoder(
        sources,
        w_enc=np.concatenate([eye, -eye], axis=1),
        b_enc=np.zeros(2 * sources.width),
        w_dec=np.concatenate([eye, -eye]),
        b_dec=np.zeros(sources.width),
    )


def mean_predictor(store, sources=None):
    """A crosscoder that says the mean of the store's tokens whatever it reads."""
    sources = sources or store.sources
    mean = np.concatenate([store.manifest.statistics[name].mean for name in store.sources.names])
    own_mean = np.asarray(sources.derive(jnp.float32(mean), store.sources))
    silent = np.zeros((sources.width, 2))
    return diffing_cases.make_crosscoder(sources, silent, np.zeros(2), silent.T, own_mean)


def difference_of(store):
    before, after = store.sources.entries
    return cc.Sources((cc.difference(after, before),))


def middling():
    """Random weights: a bad reconstruction, and codes that are neither empty nor full."""
    return diffing_cases.random_crosscoder(width=WIDTH, num_latents=48, threshold=2.0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_a_perfect_reconstruction_recovers_everything(family, tmp_path):
    store = make_store(tmp_path, family)
    found = evaluate_spliced(identity(store.sources), store, SPLIT)
    for source in ("base", "chat"):
        assert found[f"ce/{source}/spliced"] == found[f"ce/{source}/clean"]
        # KL of a distribution with itself: terms p (log p - log p) = 0.
        assert found[f"kl/{source}/spliced"] == 0
        for ablation in ("mean", "zero"):
            assert found[f"ce_recovered/{source}/{ablation}"] == 1
            assert found[f"kl_recovered/{source}/{ablation}"] == 1
            assert found[f"se_ce_recovered/{source}/{ablation}"] == 0
        assert found[f"kl/{source}/mean_ablated"] > 1e-3, "the ablation must cost something"
        assert found[f"ce/{source}/mean_ablated"] != found[f"ce/{source}/clean"]


def test_predicting_the_mean_recovers_nothing(store):
    found = evaluate_spliced(mean_predictor(store), store, SPLIT)
    for source in ("base", "chat"):
        assert found[f"ce_recovered/{source}/mean"] == 0
        assert found[f"kl_recovered/{source}/mean"] == 0
        assert found[f"ce_recovered/{source}/zero"] != 0
        assert found[f"kl/{source}/spliced"] == found[f"kl/{source}/mean_ablated"]


class Oracle:
    """Everything by hand, sequence by sequence without padding: torch runs the blocks, NumPy the rest."""

    def __init__(self, store, crosscoder, replace):
        self.tokenizer = byte_level_tokenizer()
        config = store.manifest.provenance["config"]
        self.models = [
            transformers.AutoModelForCausalLM.from_pretrained(config[name], dtype=torch.float32)
            for name in ("base", "chat")
        ]
        self.crosscoder, self.replace = crosscoder, replace
        means = [store.manifest.statistics[name].mean for name in ("base", "chat")]
        self.means = np.float32(means)

    def upper(self, model, residual):
        """Log-probabilities in float64 from the residual stream after the layer."""
        hidden = torch.from_numpy(residual)[None]
        whole = model.model.layers
        model.model.layers = whole[LAYER + 1 :]
        with torch.inference_mode():
            logits = model(inputs_embeds=hidden, use_cache=False).logits[0].double().numpy()
        model.model.layers = whole
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def document(self, text):
        """Sums over one document: tokens, and ce and kl of base and chat by replacement."""
        ids = self.tokenizer(text)["input_ids"][:CONTEXT]
        with torch.inference_mode():
            batch = torch.tensor([ids])
            acts = np.stack(
                [m(batch, output_hidden_states=True).hidden_states[LAYER + 1][0].numpy() for m in self.models]
            )
        replaced = {
            "clean": acts,
            "spliced": self.replace(self.crosscoder, acts),
            "mean_ablated": np.broadcast_to(self.means[:, None], acts.shape),
            "zero_ablated": np.zeros_like(acts),
        }
        counted = range(1, len(ids) - 1)  # not BOS, not the last token, whose next one is cut off
        sums = {"tokens": float(len(counted))}
        for m, name in enumerate(("base", "chat")):
            logs = {}
            for kind, values in replaced.items():
                residual = np.concatenate([acts[m, :1], values[m, 1:]])
                logs[kind] = self.upper(self.models[m], np.ascontiguousarray(residual))
                sums[f"ce/{name}/{kind}"] = -sum(logs[kind][t, ids[t + 1]] for t in counted)
            for kind in ("spliced", "mean_ablated", "zero_ablated"):
                p = np.exp(logs["clean"])
                sums[f"kl/{name}/{kind}"] = sum(
                    np.sum(p[t] * (logs["clean"][t] - logs[kind][t])) for t in counted
                )
        return sums


def reconstruct(crosscoder, acts):
    rows = np.concatenate(list(acts), axis=1)
    return np.stack(np.split(np.asarray(crosscoder(jnp.asarray(rows))), 2, axis=1))


def held_out_texts():
    is_held_out = SPLIT.is_held_out(np.arange(len(PROSE)))
    assert 3 < is_held_out.sum() < 12
    return [row["text"] for row, chosen in zip(PROSE, is_held_out, strict=True) if chosen]


def test_every_number_against_one_sequence_after_the_other(store):
    crosscoder = middling()
    oracle = Oracle(store, crosscoder, reconstruct)
    documents = [oracle.document(text) for text in held_out_texts()]
    sums = {name: np.array([d[name] for d in documents]) for name in documents[0]}
    found = evaluate_spliced(crosscoder, store, SPLIT)
    assert found["spliced_tokens"] == sums["tokens"].sum()
    assert found["spliced_documents"] == len(documents)
    for name in sums.keys() - {"tokens"}:
        # Float32 logits of other shapes than the oracle's: sums in another order, 1e-6 of a few nats.
        expected = sums[name].sum() / sums["tokens"].sum()
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=2e-6, err_msg=name)
    for name in ("base", "chat"):
        clean, spliced = sums[f"ce/{name}/clean"], sums[f"ce/{name}/spliced"]
        for ablation in ("mean", "zero"):
            ablated = sums[f"ce/{name}/{ablation}_ablated"]
            fraction = (ablated.sum() - spliced.sum()) / (ablated.sum() - clean.sum())
            np.testing.assert_allclose(found[f"ce_recovered/{name}/{ablation}"], fraction, rtol=2e-2)
            kl, kl_ablated = sums[f"kl/{name}/spliced"], sums[f"kl/{name}/{ablation}_ablated"]
            fraction = 1 - kl.sum() / kl_ablated.sum()
            np.testing.assert_allclose(found[f"kl_recovered/{name}/{ablation}"], fraction, rtol=1e-3)


def test_standard_errors_are_those_of_leaving_one_document_out():
    sums = {
        "tokens": np.array([3.0, 0.0, 5.0, 4.0]),
        "ce/chat/clean": np.array([6.0, 0.0, 11.0, 7.0]),
        "ce/chat/spliced": np.array([7.0, 0.0, 12.0, 10.0]),
        "ce/chat/mean_ablated": np.array([14.0, 0.0, 30.0, 17.0]),
        "ce/chat/zero_ablated": np.array([24.0, 0.0, 30.0, 37.0]),
        "kl/chat/spliced": np.array([1.0, 0.0, 2.0, 2.5]),
        "kl/chat/mean_ablated": np.array([9.0, 0.0, 15.0, 12.0]),
        "kl/chat/zero_ablated": np.array([9.0, 0.0, 20.0, 12.0]),
    }
    found = splice_metrics(sums)
    assert (found["spliced_tokens"], found["spliced_documents"]) == (12, 3)
    # (61 - 29) / (61 - 24), 5.5 nats of KL over 12 tokens, 1 - 5.5 / 36.
    assert found["ce_recovered/chat/mean"] == pytest.approx(32 / 37, rel=1e-14)
    assert found["kl/chat/spliced"] == pytest.approx(5.5 / 12, rel=1e-14)
    assert found["kl_recovered/chat/mean"] == pytest.approx(1 - 5.5 / 36, rel=1e-14)
    clean, spliced, mean = (sums[f"ce/chat/{n}"] for n in ("clean", "spliced", "mean_ablated"))
    left_out = []
    for document in (0, 2, 3):  # the second has no token: leaving it out changes nothing
        keep = np.arange(4) != document
        left_out.append(1 - (spliced - clean)[keep].sum() / (mean - clean)[keep].sum())
    expected = np.sqrt(2 / 3 * np.sum((left_out - np.mean(left_out)) ** 2))
    assert found["se_ce_recovered/chat/mean"] == pytest.approx(expected, rel=1e-12)


def test_a_ratio_that_does_not_exist_is_none():
    sums = {"tokens": np.array([3.0, 5.0])}
    names = (
        "ce/chat/clean",
        *(
            f"{loss}/chat/{kind}"
            for loss in ("ce", "kl")
            for kind in ("spliced", "mean_ablated", "zero_ablated")
        ),
    )
    found = splice_metrics(sums | {name: np.array([6.0, 11.0]) for name in names})
    assert found["ce_recovered/chat/mean"] is None
    assert found["ce/chat/spliced"] == 17 / 8


def test_one_document_has_no_standard_error_and_is_refused():
    with pytest.raises(ValueError, match="there are 1 held-out documents to measure on"):
        splice_metrics({"tokens": np.array([5.0, 0.0])})


def test_sums_of_a_document_add_up_however_it_is_cut():
    """Integers: exact. Document 7 comes twice in one batch and again in the next."""
    sums = DocumentSums()
    sums.add(np.array([7, 3, 7]), {"ce": np.array([1.0, 2.0, 4.0])})
    sums.add(np.array([7, 9]), {"ce": np.array([8.0, 16.0])})
    assert sums.num_tokens == 5
    found = {name: values.tolist() for name, values in sums.by_document().items()}
    assert found == {"tokens": [1, 3, 1], "ce": [2, 13, 16]}


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_batch_size_does_not_matter(store, batch_size):
    """A larger batch ends in more padding, a smaller one cuts other documents together."""
    crosscoder = middling()
    expected = evaluate_spliced(crosscoder, store, SPLIT)
    found = evaluate_spliced(crosscoder, store, SPLIT, SpliceConfig(batch_size=batch_size))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Float32 sums in another order; ratios of small differences lose two digits more.
        assert found[name] == pytest.approx(value, rel=1e-3, abs=2e-5), name
    assert found["spliced_tokens"] == expected["spliced_tokens"]


def spliced_positions(store, monkeypatch, **changes):
    """The masks that reach the models, by batch, and the token ids."""
    seen = []
    real = replay_module.run_spliced

    def watch(model, ids, mask, layer, residual, is_spliced):
        seen.append((ids.clone(), mask.clone(), is_spliced.clone()))
        return real(model, ids, mask, layer, residual, is_spliced)

    monkeypatch.setattr(replay_module, "run_spliced", watch)
    found = evaluate_spliced(middling(), store, SPLIT, **changes)
    return seen[::6], found  # 3 replacements of 2 sources see the same batch


def test_neither_bos_nor_padding_is_replaced_or_predicted(store, monkeypatch):
    batches, found = spliced_positions(store, monkeypatch)
    assert any((mask[:, 1:] == 0).any() for _, mask, _ in batches), "some sequences are padded"
    counted = 0
    for ids, mask, is_spliced in batches:
        assert not is_spliced[mask == 0].any()
        assert not is_spliced[:, 0].any()
        assert (ids[:, 1:] != 1).all(), "BOS is the first token and no other"
        is_real = mask.sum(dim=1) > 1  # rows of padding attend to one token
        assert torch.equal(is_spliced[is_real].sum(dim=1), mask[is_real].sum(dim=1) - 1)
        counted += int((mask[is_real].sum(dim=1) - 2).sum())
    assert found["spliced_tokens"] == counted


def test_norm_outliers_of_either_source_keep_their_own_activations(tmp_path, monkeypatch):
    store = make_store(tmp_path, outlier_multiple=1.2)
    limits = store.manifest.provenance["outliers"]["norm_limits"]
    assert store.manifest.provenance["outliers"]["dropped"] > 0
    batches, found = spliced_positions(store, monkeypatch)
    models = Oracle(store, None, None).models
    expected_counted = 0
    for ids, mask, is_spliced in batches:
        with torch.inference_mode():
            states = [
                m(ids, attention_mask=mask, output_hidden_states=True).hidden_states[LAYER + 1]
                for m in models
            ]
        is_outlier = (states[0].norm(dim=-1) > limits["base"]) | (states[1].norm(dim=-1) > limits["chat"])
        place = torch.arange(CONTEXT).expand(mask.shape)
        expected = (mask == 1) & (place > 0) & ~is_outlier
        assert torch.equal(is_spliced, expected)
        is_last = place == mask.sum(dim=1, keepdim=True) - 1
        expected_counted += int((expected & ~is_last).sum())
    assert found["spliced_tokens"] == expected_counted


def test_only_held_out_documents_are_read(store, monkeypatch):
    tokenizer = byte_level_tokenizer()
    batches, _ = spliced_positions(store, monkeypatch)
    read = [row[m == 1].tolist() for ids, mask, _ in batches for row, m in zip(ids, mask, strict=True)]
    expected = [tokenizer(text)["input_ids"][:CONTEXT] for text in held_out_texts()]
    assert [row for row in read if len(row) > 1] == expected


def test_documents_end_where_enough_is_counted(store):
    held_out = [len(byte_level_tokenizer()(text)["input_ids"][:CONTEXT]) - 2 for text in held_out_texts()]
    progress = []
    config = SpliceConfig(max_tokens=sum(held_out[:2]) + 1)
    found = evaluate_spliced(middling(), store, SPLIT, config, lambda *told: progress.append(told))
    assert (found["spliced_documents"], found["spliced_tokens"]) == (3, sum(held_out[:3]))
    assert progress[:3] == [(0, 2, "models"), (1, 2, "models"), (2, 2, "models")]
    assert progress[-1] == (sum(held_out[:3]), sum(held_out[:3]), "tokens")


def test_other_texts_are_read_whole(store, tmp_path):
    rows = [{"text": "the sea and the ship"}, {"text": "the captain of the whale"}, {"text": "a little sea"}]
    other = TextSource("other", write_jsonl(tmp_path / "other.jsonl", rows))
    found = evaluate_spliced(middling(), store, SPLIT, SpliceConfig(texts=(other,)))
    lengths = [len(byte_level_tokenizer()(row["text"])["input_ids"][:CONTEXT]) - 2 for row in rows]
    assert (found["spliced_documents"], found["spliced_tokens"]) == (3, sum(lengths))


def test_a_difference_is_added_to_what_the_model_before_has(store):
    """Against the oracle: after = before + reconstruction of (after - before); before is not measured."""
    sources = difference_of(store)
    rng = np.random.default_rng(3)
    crosscoder = diffing_cases.make_crosscoder(
        sources,
        w_enc=rng.normal(size=(WIDTH, 24)) / np.sqrt(WIDTH),
        b_enc=np.zeros(24),
        w_dec=rng.normal(size=(24, WIDTH)) / np.sqrt(WIDTH),
        b_dec=rng.normal(size=WIDTH),
    )

    def add_to_before(crosscoder, acts):
        before, after = acts
        return np.stack([before, before + np.asarray(crosscoder(jnp.asarray(after - before)))])

    oracle = Oracle(store, crosscoder, add_to_before)
    documents = [oracle.document(text) for text in held_out_texts()]
    found = evaluate_spliced(crosscoder, store, SPLIT)
    tokens = sum(d["tokens"] for d in documents)
    for name in ("ce/chat/clean", "ce/chat/spliced", "kl/chat/spliced"):
        np.testing.assert_allclose(found[name], sum(d[name] for d in documents) / tokens, rtol=1e-4)
    assert not any("/base/" in name for name in found)
    # Its ablations are those of the difference: zero leaves what the model before has.
    assert found["ce/chat/zero_ablated"] != pytest.approx(
        sum(d["ce/chat/zero_ablated"] for d in documents) / tokens, rel=1e-3
    )


def test_known_difference_crosscoders_recover_everything_and_nothing(store):
    sources = difference_of(store)
    assert evaluate_spliced(mean_predictor(store, sources), store, SPLIT)["ce_recovered/chat/mean"] == 0
    found = evaluate_spliced(identity(sources), store, SPLIT)
    # before + (after - before) is after but for roundings.
    assert found["ce_recovered/chat/mean"] == pytest.approx(1, abs=1e-3)
    assert found["kl/chat/spliced"] == pytest.approx(0, abs=1e-5)


def test_a_basis_of_the_two_models_is_spliced_into_both(store):
    before, after = store.sources.entries
    found = evaluate_spliced(identity(cc.Sources((before, cc.difference(after, before)))), store, SPLIT)
    for source in ("base", "chat"):
        assert found[f"ce_recovered/{source}/mean"] == pytest.approx(1, abs=1e-3)
    # Its ablations are those of the two models, as a crosscoder of both has them.
    plain = evaluate_spliced(identity(store.sources), store, SPLIT)
    for kind in ("mean_ablated", "zero_ablated"):
        assert found[f"ce/chat/{kind}"] == pytest.approx(plain[f"ce/chat/{kind}"], rel=1e-5)


def test_several_layers_are_spliced_one_at_a_time(tmp_path):
    store = make_store(tmp_path, layers=(0, 2))
    found = evaluate_spliced(identity(store.sources), store, SPLIT)
    cleans = {found[f"ce/chat.L{layer}/clean"] for layer in (0, 2)}
    assert len(cleans) == 1
    for layer in (0, 2):
        assert found[f"ce_recovered/base.L{layer}/mean"] == 1
    assert found["ce/chat.L0/zero_ablated"] != found["ce/chat.L2/zero_ablated"]


# Refusals


def edited(store, tmp_path, **provenance):
    """The store with another provenance."""
    manifest = dataclasses.replace(store.manifest, provenance={**store.manifest.provenance, **provenance})
    other = ActivationStore.open(store.path)
    other.manifest = manifest
    return other


def test_a_store_of_another_writer_is_refused(store, tmp_path):
    with pytest.raises(ValueError, match="only a crosscoder trained on a store that 'harvest' wrote"):
        evaluate_spliced(middling(), edited(store, tmp_path, writer="someone else"), SPLIT)


def test_a_text_of_the_harvest_is_no_other_text(store):
    harvested = store.manifest.provenance["config"]["texts"][0]["location"]
    with pytest.raises(ValueError, match=r"text 'mine' .* was trained on: leave texts out"):
        evaluate_spliced(middling(), store, SPLIT, SpliceConfig(texts=(TextSource("mine", harvested),)))


def test_changed_texts_and_models_are_refused(tmp_path):
    store = make_store(tmp_path)
    write_jsonl(tmp_path / "prose.jsonl", PROSE[1:])
    with pytest.raises(ValueError, match=r"changed since the harvest \(texts: harvested"):
        evaluate_spliced(middling(), store, SPLIT)
    write_jsonl(tmp_path / "prose.jsonl", PROSE)
    random_model(seed=7).save_pretrained(tmp_path / "models" / "chat")
    with pytest.raises(ValueError, match=r"changed since the harvest \(chat.revision: harvested"):
        evaluate_spliced(middling(), store, SPLIT)


def test_a_model_without_its_head_is_refused(tmp_path):
    """A harvest needs no head; a random one would give cross-entropies of nothing."""
    import safetensors.torch

    save_models(tmp_path / "models", "llama")
    for name in ("base", "chat"):
        path = tmp_path / "models" / name / "model.safetensors"
        weights = safetensors.torch.load_file(path)
        del weights["lm_head.weight"]
        safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    text = TextSource("prose", write_jsonl(tmp_path / "prose.jsonl", PROSE))
    base, chat = (str(tmp_path / "models" / name) for name in ("base", "chat"))
    config = HarvestConfig(
        str(tmp_path / "store"), base, chat, (text,), (LAYER,), context=CONTEXT, device="cpu"
    )
    harvest(config)
    with pytest.raises(ValueError, match=r"weights are not in its files, such as lm_head.weight"):
        evaluate_spliced(middling(), ActivationStore.open(config.store), SPLIT)


@pytest.mark.parametrize("changes", [{"max_tokens": 0}, {"batch_size": 0}, {"texts": ()}])
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        SpliceConfig(**changes)


def test_windows_count_what_they_predict():
    """Of 5 tokens after 2 skipped ones, two have a next token in the sequence."""
    windows = [Window(np.arange(5), np.arange(5), document, 0) for document in range(4)]
    chosen = replay_module._chosen_windows(windows, None, max_tokens=4, skip_positions=2)
    assert [window.document for window in chosen] == [0, 1]


def make_run(folder, store, crosscoder):
    """A finished run, without the training."""
    recipe = cc.TrainConfig(crosscoder.config, num_steps=1, batch_size=1, warmup_steps=0)
    cc.save(crosscoder, folder / "crosscoder")
    identity = run_identity(recipe, store, RunOptions(SPLIT))
    write_json_atomically(folder / "config.json", {**identity, "store_path": str(store.path)})


def is_documented(name):
    """Whether the table has the name, or the end of it after a name that begins alike."""
    documented = set(re.findall(r"`([^`]+)`", README.split("## Metrics")[1]))
    pattern = re.sub(r"/(base|chat)", "/<source>", name).removeprefix("se_")
    begins, ends = pattern.split("/")[0], f".../{pattern.split('/')[-1]}"
    is_continued = ends in documented and any(other.startswith(begins) for other in documented)
    return pattern in documented or is_continued


def test_evaluate_writes_the_spliced_metrics_beside_the_others(store, tmp_path, capsys):
    make_run(tmp_path / "run", store, middling())
    run = str(tmp_path / "run")
    cli.main(["evaluate", "--run", run])
    plain = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    cli.main(["evaluate", "--run", run, "--splice", "--device", "cpu", "--splice-tokens", "40"])
    spliced = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert plain.items() <= spliced.items()
    assert spliced["spliced_on"] == "held-out"
    assert spliced["ce_recovered/chat/mean"] == pytest.approx(
        (spliced["ce/chat/mean_ablated"] - spliced["ce/chat/spliced"])
        / (spliced["ce/chat/mean_ablated"] - spliced["ce/chat/clean"])
    )
    printed = capsys.readouterr().out
    error = spliced["se_ce_recovered/base/zero"]
    assert f"{spliced['ce_recovered/base/zero']:,.4g} ± {error:.2g}" in printed
    assert "se_ce" not in printed
    for name in spliced.keys() - {"split", "spliced_on", "measured_on"}:
        assert is_documented(name), f"{name} is not in the README's table of metrics"
    options = cli.parse("evaluate", ["--config", str(tmp_path / "run" / "evaluate.command.json")])
    assert (options.splice, options.splice_tokens) == (True, 40)
    texts = ["--splice-texts", "a=a.jsonl", "b=b.jsonl"]
    options = cli.parse("evaluate", ["--run", run, *texts])
    assert options.splicing().texts == (TextSource("a", "a.jsonl"), TextSource("b", "b.jsonl"))
