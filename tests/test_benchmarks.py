"""The benchmarks run, and what they compare agrees."""

from experiments.benchmarks import selection


def test_the_search_is_measured_beside_what_it_replaces_and_finds_the_same_cut():
    found = selection.measure(16, 64, 4, rounds=1)
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert len(selection.row(found)) == len(selection.COLUMNS)
