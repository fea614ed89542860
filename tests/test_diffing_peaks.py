import numpy as np
import pytest
from diffing_cases import LABELS, NOVEL_ONLY, planted, planted_crosscoder, write_store

from crosscoder_jax.activations import ActivationStore, Split, TokenView
from crosscoder_jax.diffing import DiffConfig
from crosscoder_jax.diffing.peaks import find_snippets

CONFIG = DiffConfig(batch_size=128, num_snippet_latents=3, snippets_per_latent=4, snippet_context=4)
DOCUMENT = 15
"""Tokens of each planted document."""


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """The planted crosscoder, held-out tokens, and their planted code."""
    acts, code, w_dec, directions, documents, labels = planted(num_tokens=900)
    store = write_store(tmp_path_factory.mktemp("store"), acts, documents, labels)
    view = TokenView.of_split(store, Split(fraction=0.5, seed=3), held_out=True)
    return planted_crosscoder(w_dec, directions), view, code


def strongest_documents(code, rows, latent):
    """Each held-out document's largest activation of a latent, the largest four first, by plain NumPy."""
    by_document = {}
    for row in rows:
        document = row // DOCUMENT
        by_document[document] = max(by_document.get(document, 0.0), code[row, latent])
    return sorted(by_document.items(), key=lambda item: -item[1])[:4]


def test_snippets_lie_around_the_strongest_token_of_the_strongest_documents(case):
    crosscoder, view, code = case
    rows = view.token_index(np.arange(view.num_tokens))
    found = find_snippets(crosscoder, view, np.array([4, NOVEL_ONLY, 0]), CONFIG, None)
    assert list(found) == [4, NOVEL_ONLY, 0]
    for latent, snippets in found.items():
        expected = strongest_documents(code, rows, latent)
        assert [snippet.document for snippet in snippets] == [document for document, _ in expected]
        # Activations are read off float32 activations of size 2: an error of some 1e-7.
        values = [snippet.value for snippet in snippets]
        np.testing.assert_allclose(values, [value for _, value in expected], rtol=1e-5)
        for snippet in snippets:
            start, stop = max(0, snippet.position - 4), min(DOCUMENT, snippet.position + 5)
            span = code[snippet.document * DOCUMENT + np.arange(start, stop), latent]
            np.testing.assert_allclose(snippet.activations, span, atol=1e-4)  # rounded to four places
            assert snippet.label == LABELS[snippet.document % 2]


def test_several_snippets_of_a_document_where_that_is_wished(case):
    crosscoder, view, code = case
    rows = view.token_index(np.arange(view.num_tokens))
    config = DiffConfig(batch_size=128, snippets_per_latent=6, is_one_snippet_per_document=False)
    (snippets,) = find_snippets(crosscoder, view, np.array([1]), config, None).values()
    values = [snippet.value for snippet in snippets]
    np.testing.assert_allclose(values, np.sort(code[rows, 1])[::-1][:6], rtol=1e-5)


def test_of_no_latents_nothing_is_read(case):
    crosscoder, view, _ = case
    reports = []
    none = np.array([], np.int64)
    assert find_snippets(crosscoder, view, none, CONFIG, lambda *report: reports.append(report)) == {}
    assert reports == []


def test_snippets_of_more_tokens_than_an_int32_counts_are_refused(case, monkeypatch):
    crosscoder, view, _ = case
    monkeypatch.setattr(ActivationStore, "num_tokens", property(lambda _: 2**31))
    with pytest.raises(ValueError, match="2147483648 tokens are more than snippets can point to, 2147483647"):
        find_snippets(crosscoder, view, np.array([0]), CONFIG, None)
    assert find_snippets(crosscoder, view, np.array([], np.int64), CONFIG, None) == {}
