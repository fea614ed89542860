"""Padding to the fixed shape and back to rows, against a loop written out."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="language models run in torch: install the extra 'lm'")
pytest.importorskip("datasets", reason="texts are read with datasets: install the extra 'lm'")

import torch

from crosscoder_jax.language_models.batches import Kept, kept_rows, pad_windows
from crosscoder_jax.language_models.documents import Window


def window(ids, *, document=0, label=0, start=0):
    positions = np.arange(start, start + len(ids), dtype=np.int32)
    return Window(np.array(ids, np.int32), positions, document, label)


WINDOWS = [window([5, 6, 7], document=4), window([8, 9], document=5, label=1, start=6)]


def test_windows_are_padded_on_the_right_and_the_batch_below():
    ids, mask = pad_windows(WINDOWS, 3, 4, pad=2)
    assert ids.tolist() == [[5, 6, 7, 2], [8, 9, 2, 2], [2, 2, 2, 2]]
    # The empty row attends to its own first token: a softmax over nothing would be NaN.
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_rows_are_those_of_the_tokens_after_the_first_positions(dtype):
    acts = {
        "base": torch.arange(3 * 4 * 2, dtype=dtype).reshape(3, 4, 2),
        "chat": -torch.arange(3 * 4 * 3, dtype=dtype).reshape(3, 4, 3),
    }
    kept = kept_rows(acts, WINDOWS, skip_positions=1)
    # Row 0 keeps positions 1 and 2, row 1 position 1, the row of padding none.
    assert kept.tokens.tolist() == [6, 7, 9]
    assert kept.documents.tolist() == [4, 4, 5]
    assert kept.positions.tolist() == [1, 2, 7]
    assert kept.labels.tolist() == [0, 0, 1]
    for name, residual in acts.items():
        expected = np.stack([residual[row, token].float().numpy() for row, token in [(0, 1), (0, 2), (1, 1)]])
        np.testing.assert_array_equal(kept.acts[name], expected)
        assert kept.acts[name].dtype == np.float32


def kept_with(**acts):
    count = len(next(iter(acts.values())))
    column = np.arange(count, dtype=np.int32)
    arrays = {name: np.array(rows, np.float32) for name, rows in acts.items()}
    return Kept(arrays, column, column, column, column.astype(np.int16))


def test_an_outlier_of_one_source_leaves_all_sources():
    # Norms 5, 13, 1 and 2, 2, 10: with the limits 6 and 9 the second and third rows go.
    kept = kept_with(base=[[3, 4], [5, 12], [1, 0]], chat=[[2], [2], [-10]])
    assert kept.norms()["base"].tolist() == [5, 13, 1]
    within = kept.within({"base": 6.0, "chat": 9.0})
    assert within.tokens.tolist() == [0]
    assert within.acts["base"].tolist() == [[3, 4]]
    assert within.acts["chat"].tolist() == [[2]]


def test_a_norm_at_the_limit_is_kept():
    assert kept_with(base=[[3, 4]]).within({"base": 5.0}).num_tokens == 1


def test_a_row_with_nan_is_no_outlier():
    kept = kept_with(base=[[np.nan, 1], [100, 0], [1, 1]]).within({"base": 5.0})
    assert kept.tokens.tolist() == [0, 2]


def test_first_keeps_so_many_rows():
    kept = kept_with(base=[[1], [2], [3]])
    assert kept.first(2).acts["base"].tolist() == [[1], [2]]
    assert kept.first(7) is kept
    assert kept.first(0).num_tokens == 0
