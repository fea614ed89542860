"""The causal test on small models: exact crosscoders close the gap, empty sets close none of it."""

import pytest

pytest.importorskip("torch", reason="language models run in torch: install the extra 'lm'")
pytest.importorskip("datasets", reason="texts are read with datasets: install the extra 'lm'")

import numpy as np
from test_language_models_recovered import LAYER, SPLIT, identity, make_store, mean_predictor

import crosscoder_jax as cc
from crosscoder_jax.language_models import SpliceConfig, evaluate_patched, evaluate_spliced
from crosscoder_jax.language_models import replay as replay_module


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("patched"))


def difference_of(store):
    before, after = store.sources.entries
    return cc.Sources((cc.difference(after, before),))


def both_of(store):
    return store.sources


@pytest.mark.parametrize("sources_of", [both_of, difference_of])
def test_an_exact_crosscoder_closes_the_gap_and_no_latents_none_of_it(sources_of, store):
    crosscoder = identity(sources_of(store))
    num_latents = crosscoder.config.num_latents
    sets = {"nothing": np.zeros(num_latents, bool), "everything": np.ones(num_latents, bool)}
    found = evaluate_patched(crosscoder, store, SPLIT, sets)
    assert found["kl/none"] > 0.1, "the models must differ"
    assert found["kl/nothing"] == found["kl/none"]
    assert found["kl_closed/nothing"] == 0
    # h_base + (h_chat - h_base) in float32: chat's own activations but for rounding.
    for name in ("everything", "all"):
        assert found[f"kl/{name}"] == pytest.approx(0, abs=1e-6)
        assert found[f"kl_closed/{name}"] == pytest.approx(1, abs=1e-5)
        assert found[f"se_kl_closed/{name}"] == pytest.approx(0, abs=1e-5)
    # The identity has no bias, so it alone leaves the gap.
    assert found["kl_closed/bias"] == pytest.approx(0, abs=1e-6)


def test_layers_that_are_stored_besides_play_no_part(tmp_path):
    store = make_store(tmp_path, layers=(0, LAYER))
    base, chat = (cc.Source(f"{model}.L{LAYER}", store.sources.widths[0]) for model in ("base", "chat"))
    sources = cc.Sources((base, cc.difference(chat, base)))
    found = evaluate_patched(identity(sources), store, SPLIT, {})
    assert found["kl/none"] > 0.1, "the models must differ"
    assert found["kl_closed/all"] == pytest.approx(1, abs=1e-5)
    # What says the mean of base and of the change says the mean of chat, not base plus the mean change.
    spliced = evaluate_spliced(mean_predictor(store, sources), store, SPLIT)
    assert {name.split("/")[1] for name in spliced if name.startswith("ce/")} == {base.name, chat.name}
    for name in (base.name, chat.name):
        expected = spliced[f"kl/{name}/mean_ablated"]
        assert spliced[f"kl/{name}/spliced"] == pytest.approx(expected, rel=1e-4)


def test_chat_runs_on_from_the_patched_stream_and_only_wanted_predictions_count(store, monkeypatch):
    crosscoder = identity(store.sources)
    calls, real = [], replay_module.run_spliced

    def watch(model, ids, mask, layer, residual, is_spliced):
        calls.append((model, layer, residual.clone(), is_spliced.clone()))
        return real(model, ids, mask, layer, residual, is_spliced)

    monkeypatch.setattr(replay_module, "run_spliced", watch)
    windows = []

    def second_and_fourth(window):
        windows.append(window)
        return np.isin(np.arange(len(window.input_ids)), (1, 3))

    found = evaluate_patched(crosscoder, store, SPLIT, {}, is_predicted=second_and_fourth)
    # Each is predicted at the position before: the second at the first one, which no harvest keeps.
    assert found["patched_tokens"] == sum(len(window.input_ids) > 3 for window in windows) > 0
    # A batch is patched with "all", "bias" and "none", in this order: the third is base's own residual.
    _, layer, residual, is_spliced = calls[2]
    assert layer == LAYER
    assert len({id(call[0]) for call in calls}) == 1
    (first, *_) = np.flatnonzero(store.documents(0, store.num_tokens) == windows[0].document)
    own = residual[0][is_spliced[0]]
    stored = store.read(int(first), int(first) + len(own))[:, : store.sources.widths[0]]
    np.testing.assert_allclose(own, stored, rtol=0, atol=1e-4)


def test_the_gap_is_that_of_chat_with_itself_spliced(store):
    """With chat's own activations in place the KL is that of a perfect reconstruction: zero."""
    spliced = evaluate_spliced(identity(store.sources), store, SPLIT)
    patched = evaluate_patched(identity(store.sources), store, SPLIT, {})
    assert spliced["kl/chat/spliced"] == 0
    assert patched["patched_tokens"] == spliced["spliced_tokens"]
    assert patched["kl/all"] < 1e-6 * patched["kl/none"]


def test_without_two_documents_to_measure_nothing_is_said(store):
    with pytest.raises(ValueError, match="there are 0 held-out documents to measure on"):
        evaluate_patched(
            identity(store.sources),
            store,
            SPLIT,
            {},
            SpliceConfig(max_tokens=10),
            is_predicted=lambda window: np.zeros(len(window.input_ids), bool),
        )
