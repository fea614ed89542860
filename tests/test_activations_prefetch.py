"""Reading ahead: in order, one ahead, errors where they belong, nothing kept alive."""

import itertools
import threading
import time
import weakref

import numpy as np
import pytest

from crosscoder_jax.activations.prefetch import load_ahead, rebatch


def test_order_and_completeness():
    assert list(load_ahead(lambda x: x * x, range(10))) == [x * x for x in range(10)]
    assert list(load_ahead(lambda x: x, [])) == []


def test_computes_one_ahead_and_no_more():
    started, second = [], threading.Event()

    def load(item):
        started.append(item)
        if item == 1:
            second.set()
        return item

    results = load_ahead(load, itertools.count())
    assert next(results) == 0
    assert second.wait(10)  # 1 is computed in the background while 0 is in use
    assert started == [0, 1]
    results.close()


def test_error_is_raised_when_its_result_is_asked_for():
    def load(item):
        if item == 2:
            raise ValueError("chunk 2")
        return item

    results = load_ahead(load, range(5))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="chunk 2"):
        next(results)


def test_at_most_two_results_exist():
    references, most = [], []

    def load(item):
        window = np.full((10, 2), item)
        references.append(weakref.ref(window))
        most.append(sum(reference() is not None for reference in references))
        return (window,)

    for _ in rebatch(load_ahead(load, range(8)), 4):
        time.sleep(0.01)  # slower than loading, so that the next window is there before it is needed
    assert len(most) == 8
    assert max(most) == 2


def test_a_dropped_result_is_gone_while_the_next_is_awaited():
    references, is_gone = [], []

    def load(item):
        result = np.zeros(3)
        references.append(weakref.ref(result))
        if item == 1:
            deadline = time.monotonic() + 5
            while references[0]() is not None and time.monotonic() < deadline:
                time.sleep(0.001)
            is_gone.append(references[0]() is None)
        return result

    results = load_ahead(load, range(2))
    next(results)
    next(results)
    assert is_gone == [True]


@pytest.mark.parametrize("batch_size", [2, 3, 7])
def test_a_used_up_piece_is_gone_before_the_next_is_asked_for(batch_size):
    is_gone = []

    def pieces():
        for item in range(5):
            piece = np.full(10, item)
            reference = weakref.ref(piece)
            yield (piece,)
            del piece
            is_gone.append(reference() is None)

    batches = list(rebatch(pieces(), batch_size))
    assert len(batches) == -(-50 // batch_size)
    assert is_gone == [True] * 5


def test_thread_ends_with_the_generator():
    results = load_ahead(lambda x: x, itertools.count())
    next(results)
    results.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("load-ahead")]


@pytest.mark.parametrize("sizes", [(10,), (3, 0, 4, 3), (1,) * 10, (9, 1), (0,)])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 11])
def test_rebatch_cuts_the_concatenation(sizes, batch_size):
    total = sum(sizes)
    left, right = np.arange(total), np.arange(2 * total).reshape(total, 2)
    cuts = np.cumsum(sizes)[:-1]
    pieces = list(zip(np.split(left, cuts), np.split(right, cuts), strict=True))
    batches = list(rebatch(pieces, batch_size))
    expected = [left[low : low + batch_size] for low in range(0, total, batch_size)]
    assert [batch[0].tolist() for batch in batches] == [part.tolist() for part in expected]
    for batch in batches:
        np.testing.assert_array_equal(batch[1], right[batch[0]])
        assert batch[0].base is None  # a copy: holding it keeps no piece alive
