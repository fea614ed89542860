import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
from diffing_cases import (
    LABELS,
    NOVEL_ONLY,
    NUM_LATENTS,
    WIDTH,
    make_crosscoder,
    oracle_betas,
    pair,
    planted,
    planted_crosscoder,
    write_store,
)

from crosscoder_jax.activations import ActivationStore, Split, StoredSource, StoreWriter, TokenView
from crosscoder_jax.crosscoder import Crosscoder, CrosscoderConfig
from crosscoder_jax.diffing import DiffConfig, diff_run, jackknife_groups, write_diff
from crosscoder_jax.sharding import Shardings, make_mesh
from crosscoder_jax.sources import Source, Sources, difference
from crosscoder_jax.sparsity import Decoupled


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    acts, code, w_dec, directions, documents, labels = planted()
    store = write_store(tmp_path_factory.mktemp("store"), acts, documents, labels)
    view = TokenView.of_split(store, Split(fraction=0.5, seed=3), held_out=True)
    crosscoder = planted_crosscoder(w_dec, directions)
    config = DiffConfig(batch_size=256, num_snippet_latents=6, snippets_per_latent=3, snippet_context=4)
    reports = []
    result = diff_run(crosscoder, view, config, lambda *report: reports.append(report))
    rows = view.token_index(np.arange(view.num_tokens))
    return {
        "acts": acts[rows],
        "code": code[rows],
        "labels": labels[rows],
        "documents": documents[rows],
        "w_dec": w_dec,
        "directions": directions,
        "view": view,
        "config": config,
        "crosscoder": crosscoder,
        "result": result,
        "reports": reports,
    }


def test_classes_and_verdicts_of_the_planted_latents(case):
    columns = case["result"].columns
    assert columns["latent_class"].tolist() == [
        *("shared", "shared", "chat-only", "chat-only", "base-only", "chat-only", "base-only", "dead"),
    ]
    assert columns["verdict"].tolist() == [
        *("", "", "confirmed", "complete shrinkage", "confirmed"),
        *("latent decoupling", "latent decoupling", ""),
    ]
    np.testing.assert_allclose(columns["delta_norm"], [0.5, 0.5, 1, 1, 0, 1, 0, 0.5], atol=1e-6)
    np.testing.assert_allclose(columns["nu_error"][[0, 2, 3, 4, 5]], [1, 0, 0.6, 0, 0], atol=1e-5)
    np.testing.assert_allclose(columns["nu_recon"][[0, 2, 3, 4, 5, 6]], [1, 0, 0, 0, 1, 1], atol=1e-5)
    # Exact ratios of 0, 0.6 and 1 are clear of 0.2 and 0.5; the shared and the dead have no verdict.
    assert columns["is_beyond_interval"].tolist() == [False] * 2 + [True] * 5 + [False]
    assert columns["evidence"].tolist() == ["enough"] * 7 + ["too little"]
    assert columns["reference"].tolist() == ["chat", "chat", "chat", "chat", "base", "chat", "base", "chat"]
    np.testing.assert_allclose(columns["cosine"][:2], 1.0, atol=1e-6)
    assert np.isnan(columns["cosine"][2:7]).all()  # one decoder is zero


def test_the_reasons_against_a_confirmation_stand_in_the_table(case):
    columns = case["result"].columns
    told = dict(zip(columns["latent"].tolist(), columns["why_not"].tolist(), strict=True))
    assert {latent for latent, words in told.items() if words} == {3, 5, 6}  # shrunk, and two decoupled
    assert told[3] == f"nu_error {columns['nu_error'][3]:.2f} is not below 0.2"
    assert all("nu_recon" in told[latent] for latent in (5, 6))


def test_numbers_equal_numpy(case):
    columns, code, w_dec = case["result"].columns, case["code"], case["w_dec"]
    reference = np.array([1, 1, 1, 1, 0, 1, 0, 1])
    beta = oracle_betas(case["acts"], code, w_dec, np.zeros((2, WIDTH)), reference)
    for t, target in enumerate(("activation", "activation_no_bias", "reconstruction", "error")):
        for s, name in enumerate(("base", "chat")):
            np.testing.assert_allclose(columns[f"beta_{target}_{name}"], beta[t, s], rtol=1e-5, atol=1e-5)
            assert np.isfinite(columns[f"se_beta_{target}_{name}"][:7]).all()
    active = (code > 0).sum(0)
    np.testing.assert_array_equal(columns["active_tokens"], active)
    np.testing.assert_allclose(columns["frequency"], active / len(code))
    documents = [len(set(case["documents"][column > 0].tolist())) for column in code.T]
    assert columns["active_documents"].tolist() == documents
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(columns["mean_activation"], code.sum(0) / active, rtol=1e-5)
        share = code[case["labels"] == 1].sum(0) / code.sum(0)
    np.testing.assert_allclose(columns["max_activation"], code.max(0), rtol=1e-5)
    np.testing.assert_allclose(columns["share_novel"], share, rtol=1e-5)
    np.testing.assert_allclose(columns["share_prose"], 1 - share, rtol=1e-5, atol=1e-6)
    energy = (code**2).mean(0) * (w_dec**2).sum((1, 2))
    np.testing.assert_allclose(columns["energy"], energy, rtol=1e-5)
    np.testing.assert_allclose(columns["norm_base"], np.linalg.norm(w_dec[:, 0], axis=1), atol=1e-6)


def test_summary_counts(case):
    summary = case["result"].summary
    assert summary["sources"] == ["base", "chat"]
    assert summary["models"]["chat"]["model"] == "org/chat"
    assert summary["counts"] == {"base-only": 2, "shared": 2, "chat-only": 3, "other": 0, "dead": 1}
    assert (summary["claimed"], summary["confirmed"]) == (5, 2)
    assert summary["confirmed_by_class"] == {"base-only": 1, "chat-only": 1}
    assert summary["verdicts"] == {
        "confirmed": 2,
        "complete shrinkage": 1,
        "latent decoupling": 2,
        "shrinkage and decoupling": 0,
        "undetermined": 0,
    }
    assert summary["num_tokens"] == case["view"].num_tokens == sum(summary["tokens_by_label"].values())
    assert summary["num_documents"] == len(set(case["documents"].tolist()))
    histogram = summary["delta_norm_histogram"]
    assert (len(histogram["edges"]), sum(histogram["counts"])) == (51, 7)  # the dead latent is left out
    assert (histogram["counts"][0], histogram["counts"][25], histogram["counts"][-1]) == (2, 2, 3)
    assert summary["cutoffs"]["chat_only_min"] == 0.9
    assert summary["cutoffs"]["max_nu_error"] == 0.2


@pytest.mark.parametrize("num_documents", [1, 8])
def test_only_groups_that_hold_a_token_are_counted(case, num_documents):
    view = TokenView(case["view"].store, np.array([[0, 15 * num_documents]]))
    settings = DiffConfig(batch_size=256, num_snippet_latents=0)
    scaling = diff_run(case["crosscoder"], view, settings).summary["latent_scaling"]
    groups = np.unique(jackknife_groups(jnp.arange(num_documents)))
    assert (scaling["num_groups"], scaling["groups_with_tokens"]) == (20, len(groups))


def test_snippets_show_the_strongest_token_in_its_document(case):
    result, view = case["result"], case["view"]
    # Confirmed exclusive latents first, then the other claims, then shared ones; never the dead one.
    assert set(list(result.snippets)[:2]) == {2, 4}
    assert set(list(result.snippets)[2:5]) == {3, 5, 6}
    assert list(result.snippets)[5] in (0, 1)
    first = result.snippets[2][0]
    assert first.value == pytest.approx(result.columns["max_activation"][2], rel=1e-6)
    assert len({snippet.document for snippet in result.snippets[2]}) == 3
    code = case["code"]
    rows = view.token_index(np.arange(view.num_tokens))
    store_tokens = view.store.tokens(0, view.store.num_tokens)
    for latent, snippets in result.snippets.items():
        values = [snippet.value for snippet in snippets]
        assert values == sorted(values, reverse=True)
        for snippet in snippets:
            token = snippet.document * 15 + snippet.position
            start, stop = max(0, snippet.position - 4), min(15, snippet.position + 5)
            assert len(snippet.tokens) == stop - start
            assert snippet.peak == snippet.position - start
            assert snippet.tokens[snippet.peak] == f" w{store_tokens[token]}"
            span = np.searchsorted(rows, np.arange(start, stop) + snippet.document * 15)
            np.testing.assert_allclose(snippet.activations, code[span, latent], atol=1e-4)
            assert snippet.label == LABELS[snippet.document % 2]
    assert {snippet.label for snippet in result.snippets[NOVEL_ONLY]} == {"novel"}


def test_progress_counts_both_passes(case):
    total = 2 * case["view"].num_tokens
    done = [report[0] for report in case["reports"]]
    assert done == sorted(done)
    assert case["reports"][-1] == (total, total, "tokens")


def test_files_read_back(case, tmp_path):
    result = case["result"]
    write_diff(result, tmp_path / "run" / "diff")
    folder = tmp_path / "run" / "diff"
    assert sorted(path.name for path in folder.iterdir()) == [
        "latents.csv",
        "latents.parquet",
        "snippets.json",
        "summary.json",
    ]
    table = pyarrow.parquet.read_table(folder / "latents.parquet")
    assert table.column_names == list(result.columns)
    assert table.num_rows == NUM_LATENTS
    assert table["nu_error"].null_count == 1  # the dead latent: null, not a NaN that sorts and sums
    assert table["latent_class"].to_pylist() == result.columns["latent_class"].tolist()
    np.testing.assert_array_equal(table["nu_error"].to_numpy()[:7], result.columns["nu_error"][:7])
    csv = pyarrow.csv.read_csv(folder / "latents.csv")
    assert csv.column_names == table.column_names
    np.testing.assert_allclose(csv["energy"].to_numpy(), table["energy"].to_numpy(), rtol=1e-12)
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(result.summary))
    snippets = json.loads((folder / "snippets.json").read_text())
    assert list(snippets) == [str(latent) for latent in result.snippets]
    assert set(snippets["2"][0]) == {
        *("tokens", "activations", "peak", "value", "document", "position", "label"),
    }
    write_diff(result, folder)  # again, over the old files
    assert len(list(folder.iterdir())) == 4


def test_a_diff_stopped_on_the_way_leaves_no_summary_of_another_table(case, tmp_path, monkeypatch):
    write_diff(case["result"], tmp_path)
    replace = Path.replace

    def stop(self, target):
        if target.name == "snippets.json":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_diff(case["result"], tmp_path)
    assert not (tmp_path / "summary.json").exists()


def test_batch_size_does_not_matter(case):
    config = DiffConfig(batch_size=1000, num_snippet_latents=6, snippets_per_latent=3, snippet_context=4)
    other = diff_run(case["crosscoder"], case["view"], config)
    assert_equal_results(other, case["result"])


def test_eight_devices_equal_one(case):
    with jax.set_mesh(make_mesh(2, 4)):
        crosscoder = planted_crosscoder(case["w_dec"], case["directions"], Shardings.data_latent())
        spread = diff_run(crosscoder, case["view"], case["config"])
    assert_equal_results(spread, case["result"])


def assert_equal_results(found, expected):
    assert list(found.columns) == list(expected.columns)
    for name, value in expected.columns.items():
        if value.dtype == object:
            assert found.columns[name].tolist() == value.tolist(), name
        else:
            # Ratios with a planted value of 0 are float32 noise of 1e-7, and so are their errors.
            np.testing.assert_allclose(found.columns[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert found.summary == expected.summary
    assert found.snippets.keys() == expected.snippets.keys()
    for latent, snippets in expected.snippets.items():
        places = [(s.document, s.position, s.tokens) for s in snippets]
        assert [(s.document, s.position, s.tokens) for s in found.snippets[latent]] == places


def test_no_snippets_saves_the_second_pass(case):
    reports = []
    config = DiffConfig(batch_size=512, num_snippet_latents=0)
    result = diff_run(case["crosscoder"], case["view"], config, lambda *report: reports.append(report))
    assert result.snippets == {}
    assert reports[-1][:2] == (case["view"].num_tokens,) * 2


def test_a_basis_of_the_stored_sources_is_compared_in_their_space(case):
    # before and chat - before: the same crosscoder, decoders and biases carried into that basis.
    base, chat = pair(WIDTH)
    sources = Sources((base, difference(chat, base)))
    w_dec, plain = case["w_dec"], case["crosscoder"]
    w_enc = np.asarray(plain.w_enc[...]).reshape(2, WIDTH, NUM_LATENTS)
    bias = np.random.default_rng(9).standard_normal((2, WIDTH))
    # chat = base + difference, so the encoder reads base with both weights and the difference with
    # chat's; the difference's decoder and bias are chat's minus base's. The weights by which scores
    # are ranked differ between the bases, so the threshold is out of the way: a planted activation is
    # at least 0.5, a decoder norm at least 1, and what is not planted reads 0.
    basis = make_crosscoder(
        sources,
        np.concatenate([w_enc[0] + w_enc[1], w_enc[1]]),
        plain.b_enc[...],
        np.concatenate([w_dec[:, 0], w_dec[:, 1] - w_dec[:, 0]], axis=1),
        np.concatenate([bias[0], bias[1] - bias[0]]),
        threshold=0.1,
    )
    stored = make_crosscoder(
        pair(WIDTH),
        w_enc.reshape(-1, NUM_LATENTS),
        plain.b_enc[...],
        w_dec.reshape(-1, 2 * WIDTH),
        bias.ravel(),
        threshold=0.1,
    )
    found, expected = (diff_run(one, case["view"], case["config"]) for one in (basis, stored))
    assert found.summary["sources"] == ["base", "chat"]
    assert list(found.columns) == list(expected.columns)
    for name, value in expected.columns.items():
        if value.dtype == object:
            assert found.columns[name].tolist() == value.tolist(), name
        else:
            np.testing.assert_allclose(found.columns[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("names", [("base", "mid", "chat"), ("chat", "mid", "base")])
def test_a_basis_is_compared_as_in_a_store_of_two_whatever_else_is_stored(names, case, tmp_path):
    acts, _, w_dec, _, documents, labels = planted()
    mid = np.random.default_rng(5).standard_normal(acts[:, 0].shape).astype(np.float32)
    values = {"base": acts[:, 0], "mid": mid, "chat": acts[:, 1]}
    stacked = np.stack([values[name] for name in names], axis=1)
    store = write_store(tmp_path / "store", stacked, documents, labels, names=names)
    view = TokenView.of_split(store, Split(fraction=0.5, seed=3), held_out=True)
    base, chat = pair(WIDTH)
    plain = case["crosscoder"]
    w_enc = np.asarray(plain.w_enc[...]).reshape(2, WIDTH, NUM_LATENTS)
    crosscoder = make_crosscoder(
        Sources((base, difference(chat, base))),
        np.concatenate([w_enc[0] + w_enc[1], w_enc[1]]),
        plain.b_enc[...],
        np.concatenate([w_dec[:, 0], w_dec[:, 1] - w_dec[:, 0]], axis=1),
        np.zeros(2 * WIDTH),
        threshold=0.1,
    )
    found, expected = (diff_run(crosscoder, one, case["config"]) for one in (view, case["view"]))
    assert found.summary["sources"] == ["base", "chat"]
    # As planted: two shared, three of chat and two of base, one of each genuine; the last never fires.
    assert found.columns["latent_class"].tolist() == case["result"].columns["latent_class"].tolist()
    assert found.columns["verdict"].tolist() == case["result"].columns["verdict"].tolist()
    assert list(found.columns) == list(expected.columns)
    for name, value in expected.columns.items():
        np.testing.assert_array_equal(found.columns[name], value, err_msg=name)


def test_a_difference_alone_has_no_two_model_columns(case):
    base, chat = pair(WIDTH)
    sources = Sources((difference(chat, base),))
    directions = case["directions"]
    w_dec = np.stack([2.0 * directions[2], 0.8 * directions[3], -2.0 * directions[4], directions[7]])
    w_enc = w_dec.T / np.array([4.0, 0.64, 4.0, 1.0])
    crosscoder = make_crosscoder(sources, w_enc, [0, 0, 0, -100], w_dec, np.zeros(WIDTH), threshold=0.2)
    config = DiffConfig(batch_size=256, num_snippet_latents=3, snippets_per_latent=2)
    result = diff_run(crosscoder, case["view"], config)
    for absent in ("delta_norm", "latent_class", "cosine", "nu_error", "verdict", "evidence"):
        assert absent not in result.columns
    assert list(result.columns)[:2] == ["latent", "norm_difference"]
    assert result.summary["num_dead"] == 1
    assert "counts" not in result.summary
    # Latent 0 reads the planted novel-only feature of the chat model.
    np.testing.assert_allclose(result.columns["share_novel"][0], 1.0)
    assert set(result.snippets) == {0, 1, 2}


def test_sources_of_different_widths_are_compared_by_norms_alone(tmp_path):
    rng = np.random.default_rng(4)
    sources = Sources((Source("small", 3), Source("large", 5)))
    stored = [StoredSource(s.name, s.width, s.name, None, "blocks.1.resid_post") for s in sources]
    documents = np.arange(300) // 10
    with StoreWriter.create_or_resume(
        tmp_path / "store", sources=stored, dtype="float32", labels=("text",), config={}, chunk_tokens=64
    ) as writer:
        acts = {s.name: rng.standard_normal((300, s.width)).astype(np.float32) for s in sources}
        column = np.zeros(300, np.int64)
        writer.append(acts, tokens=column, documents=documents, positions=column, labels=column)
        writer.finish({})
    view = TokenView(ActivationStore.open(tmp_path / "store"))
    w_dec = rng.standard_normal((4, 8))
    w_dec[0, :3] = 0
    crosscoder = make_crosscoder(sources, w_dec.T, np.zeros(4), w_dec, np.zeros(8), threshold=0.1)
    result = diff_run(crosscoder, view, DiffConfig(batch_size=128, num_snippet_latents=2))
    assert result.columns["latent_class"][0] == "chat-only"
    assert "nu_error" not in result.columns
    assert "cosine" not in result.columns
    assert "different widths" in result.summary["latent_scaling"]["why_not"]
    assert "confirmed" not in result.summary
    write_diff(result, tmp_path / "diff")
    # Without a vocabulary tokens are shown by number.
    assert next(iter(result.snippets.values()))[0].tokens[0] == "[0]"


def test_the_same_model_twice_has_no_exclusive_latents(tmp_path):
    rng = np.random.default_rng(5)
    one = rng.standard_normal((1200, WIDTH)).astype(np.float32)
    documents = np.arange(1200) // 12
    store = write_store(tmp_path / "store", np.stack([one, one], axis=1), documents, documents % 2)
    half = rng.standard_normal((16, WIDTH))
    w_dec = np.concatenate([half, half], axis=1) * np.linspace(0.3, 2, 16)[:, None]
    crosscoder = make_crosscoder(pair(WIDTH), w_dec.T / 4, np.zeros(16), w_dec, np.ones(16), threshold=0.5)
    result = diff_run(crosscoder, TokenView(store), DiffConfig(batch_size=512, num_snippet_latents=4))
    np.testing.assert_array_equal(result.columns["delta_norm"], 0.5)
    np.testing.assert_allclose(result.columns["cosine"], 1.0, atol=1e-6)
    np.testing.assert_allclose(result.columns["nu_error"], 1.0, atol=1e-5)
    np.testing.assert_allclose(result.columns["nu_recon"], 1.0, atol=1e-5)
    assert (result.summary["claimed"], result.summary["confirmed"]) == (0, 0)


def test_a_crosscoder_with_a_code_for_each_source_is_refused(case):
    config = CrosscoderConfig(pair(WIDTH), NUM_LATENTS, code_norm=Decoupled())
    crosscoder = Crosscoder(config, key=jax.random.key(0))
    with pytest.raises(ValueError, match="diff_run needs one code for all sources"):
        diff_run(crosscoder, case["view"])


def test_a_missing_source_is_refused_by_name(case):
    sources = Sources((Source("base", WIDTH), Source("other", WIDTH)))
    crosscoder = make_crosscoder(
        sources, np.ones((16, 4)), np.zeros(4), np.ones((4, 16)), np.zeros(16), threshold=0.0
    )
    with pytest.raises(ValueError, match="'other'"):
        diff_run(crosscoder, case["view"], case["config"])
