"""Held-out documents: whole, stable, in the share asked for."""

import numpy as np
import pytest
from activations_cases import DOCUMENT_LENGTHS, corpus, write_store

from crosscoder_jax.activations import Split
from crosscoder_jax.activations import split as split_module


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("written") / "store", corpus())


def expected_ranges(wanted):
    """Join the runs of wanted documents by walking over them one by one."""
    ranges, start = [], 0
    for document, length in enumerate(DOCUMENT_LENGTHS):
        if wanted[document]:
            if ranges and ranges[-1][1] == start:
                ranges[-1][1] = start + length
            else:
                ranges.append([start, start + length])
        start += length
    return ranges


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("scan", [1, 7, 16, 1 << 20])
def test_both_sides_are_whole_documents_and_make_up_the_store(store, seed, scan, monkeypatch):
    monkeypatch.setattr(split_module, "_SCAN_TOKENS", scan)
    split = Split(fraction=0.4, seed=seed)
    is_held_out = split.is_held_out(np.arange(len(DOCUMENT_LENGTHS)))
    held_out = split.token_ranges(store, held_out=True)
    training = split.token_ranges(store, held_out=False)
    assert held_out.tolist() == expected_ranges(is_held_out)
    assert training.tolist() == expected_ranges(~is_held_out)


def test_nothing_held_out(store):
    split = Split(fraction=0.0)
    assert split.token_ranges(store, held_out=True).shape == (0, 2)
    assert split.token_ranges(store, held_out=False).tolist() == [[0, sum(DOCUMENT_LENGTHS)]]


def test_share_and_independence_of_seeds():
    documents = np.arange(20_000)
    sides = [Split(fraction=0.1, seed=seed).is_held_out(documents) for seed in range(3)]
    for side in sides:
        # 5 sigma of a share of 0.1 among 20,000.
        assert abs(side.mean() - 0.1) < 5 * np.sqrt(0.09 / 20_000)
    assert abs((sides[0] & sides[1]).mean() - 0.01) < 5 * np.sqrt(0.01 * 0.99 / 20_000)


def test_a_larger_fraction_only_adds_documents():
    documents = np.arange(5000)
    few, many = (Split(fraction=fraction, seed=4).is_held_out(documents) for fraction in (0.1, 0.3))
    assert not np.any(few & ~many)


def test_side_depends_on_the_document_index_alone():
    split = Split(fraction=0.3, seed=9)
    shuffled = np.array([40, 3, 99, 7])
    assert split.is_held_out(shuffled).tolist() == split.is_held_out(np.arange(100))[shuffled].tolist()
    assert split.is_held_out(shuffled.astype(np.int32)).tolist() == split.is_held_out(shuffled).tolist()


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_impossible_fractions_are_refused(fraction):
    with pytest.raises(ValueError, match="fraction="):
        Split(fraction=fraction)
