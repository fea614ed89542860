"""Moments over a corpus against NumPy on all of it, and where naive sums fail."""

import json

import ml_dtypes
import numpy as np
import pytest

from crosscoder_jax.activations.statistics import MomentAccumulator, SourceStatistics, finite_rows


def blocks(rows, sizes):
    return np.split(rows, np.cumsum(sizes)[:-1])


def accumulate(parts, width):
    moments = MomentAccumulator.empty(width)
    for part in parts:
        moments = moments.update(part)
    return moments


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_equals_numpy_over_the_whole(dtype):
    rows = np.random.default_rng(0).normal(size=(100, 4)).astype(dtype)
    result = accumulate(blocks(rows, (1, 0, 49, 50)), 4).finalize()
    exact = rows.astype(np.float64)
    np.testing.assert_allclose(result.mean, exact.mean(axis=0), rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(result.std, exact.std(axis=0), rtol=1e-13)
    np.testing.assert_allclose(result.mean_norm, np.linalg.norm(exact, axis=1).mean(), rtol=1e-13)


def test_by_hand():
    # Coordinate 0 is 3, 0, 3: mean 2, variance (1 + 4 + 1) / 3 = 2. Norms 5, 0, 5: mean 10 / 3.
    result = accumulate([np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[3.0, -4.0]])], 2).finalize()
    np.testing.assert_allclose(result.mean, [2, 0], atol=1e-15)
    np.testing.assert_allclose(result.std, [np.sqrt(2), np.sqrt(32 / 3)], rtol=1e-15)
    assert result.mean_norm == pytest.approx(10 / 3, rel=1e-15)
    # Squared norms 25, 0, 25: their mean 50 / 3, so 1 - (100 / 9) / (50 / 3) = 1 / 3.
    assert result.root_mean_square_norm == pytest.approx(np.sqrt(50 / 3), rel=1e-15)
    assert result.outlier_share == pytest.approx(1 / 3, rel=1e-14)


@pytest.mark.parametrize(("every", "norm"), [(100, 30.0), (1000, 300.0), (37, 5.0)])
def test_the_outlier_share_is_nearly_what_the_outliers_hold_and_never_more(every, norm):
    rows = np.random.default_rng(0).normal(size=(10_000, 8))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert accumulate([rows], 8).finalize().outlier_share == pytest.approx(0, abs=1e-12)
    rows[::every] *= norm
    squares = np.square(rows).sum(axis=1)
    held = squares[::every].sum() / squares.sum()
    found = accumulate([rows], 8).finalize().outlier_share
    # The mean norm holds the outliers too: what is missed is at most twice their number times their norm.
    assert held - 2 * norm / every / squares.mean() - 1 / every <= found <= held


def test_a_source_of_zeros_has_no_outliers():
    assert accumulate([np.zeros((5, 2))], 2).finalize().outlier_share == 0.0


def test_does_not_cancel_far_from_zero():
    # With a mean of 1e9 and a spread of 1, E[x^2] - E[x]^2 loses everything: 1e18 has a ulp of 128.
    rows = 1e9 + np.random.default_rng(1).normal(size=(1000, 1))
    result = accumulate(blocks(rows, (300, 700)), 1).finalize()
    # rows themselves are rounded to 1e9 * 2^-53 = 1e-7; numpy's own two-pass std is the reference.
    np.testing.assert_allclose(result.std, rows.std(axis=0), rtol=1e-6)
    naive = np.mean(rows**2) - np.mean(rows) ** 2
    assert not np.isclose(naive, rows.var(), rtol=0.5)


def test_merge_is_the_same_as_update_and_empty_is_neutral():
    rows = np.random.default_rng(2).normal(size=(30, 3))
    left, right = MomentAccumulator.empty(3).update(rows[:10]), MomentAccumulator.empty(3).update(rows[10:])
    merged = left.merge(right)
    whole = MomentAccumulator.empty(3).update(rows)
    np.testing.assert_allclose(merged.squares, whole.squares, rtol=1e-13)
    assert merged.count == 30
    assert MomentAccumulator.empty(3).merge(MomentAccumulator.empty(3)).count == 0
    np.testing.assert_array_equal(left.merge(MomentAccumulator.empty(3)).mean, left.mean)
    np.testing.assert_array_equal(MomentAccumulator.empty(3).merge(left).squares, left.squares)


def test_goes_on_bit_for_bit_through_json():
    rows = np.random.default_rng(3).normal(size=(90, 3)) * 1e3
    parts = blocks(rows, (20, 30, 40))
    half = accumulate(parts[:2], 3)
    resumed = MomentAccumulator.from_json(json.loads(json.dumps(half.to_json()))).update(parts[2])
    straight = accumulate(parts, 3)
    assert json.dumps(resumed.to_json()) == json.dumps(straight.to_json())
    statistics = straight.finalize()
    again = SourceStatistics.from_json(json.loads(json.dumps(statistics.to_json())))
    assert again.to_json() == statistics.to_json()


def test_no_tokens_have_no_statistics():
    with pytest.raises(ValueError, match="no tokens"):
        MomentAccumulator.empty(3).finalize()


def test_statistics_of_wrong_shape_are_refused():
    with pytest.raises(ValueError, match="both must be"):
        SourceStatistics.from_json({"mean": [1.0, 2.0], "std": [1.0], "mean_norm": 1.0})


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_finite_rows(dtype):
    top = float(ml_dtypes.finfo(dtype).max)
    rows = np.array([[0, top], [np.nan, 0], [-top, 1], [0, -np.inf], [np.inf, np.nan]]).astype(dtype)
    assert finite_rows(rows).tolist() == [True, False, True, False, False]
    assert finite_rows(rows[:0]).shape == (0,)
