from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crosscoder_jax.diffing.compensated import CompensatedSum, two_sum
from crosscoder_jax.diffing.evidence import (
    finalize_activity,
    init_activity,
    init_top,
    update_activity,
    update_top,
)
from crosscoder_jax.sharding import Shardings, make_mesh

activity_step = jax.jit(update_activity, static_argnames="shardings")
top_step = jax.jit(update_top, static_argnames=("one_per_document", "shardings"))


def sparse_code(seed, count, num_latents, density=0.2):
    rng = np.random.default_rng(seed)
    # Few distinct values, so that ties are common.
    values = rng.integers(1, 6, (count, num_latents)).astype(np.float32)
    return values * (rng.random((count, num_latents)) < density)


def in_batches(size, *arrays):
    """Batches of one size, the last padded with rubbish that is not valid."""
    count = len(arrays[0])
    for start in range(0, count, size):
        parts = [a[start : start + size] for a in arrays]
        missing = size - len(parts[0])
        fill = [
            np.full((missing, *p.shape[1:]), np.nan if p.dtype.kind == "f" else 1, p.dtype) for p in parts
        ]
        padded = [jnp.asarray(np.concatenate([p, f])) for p, f in zip(parts, fill, strict=True)]
        yield *padded, jnp.arange(size) < size - missing


# ---- compensated sums ------------------------------------------------------------------------------


def test_two_sum_is_exact_under_jit():
    rng = np.random.default_rng(0)
    a = (rng.standard_normal(1000) * 10.0 ** rng.integers(-10, 10, 1000)).astype(np.float32)
    b = (rng.standard_normal(1000) * 10.0 ** rng.integers(-10, 10, 1000)).astype(np.float32)
    total, error = (np.asarray(x) for x in jax.jit(two_sum)(a, b))
    np.testing.assert_array_equal(total, a + b)
    # What one addition drops is itself a float32 number; checked in exact integer arithmetic.
    for x, y, s, e in zip(a, b, total, error, strict=True):
        assert Fraction(float(x)) + Fraction(float(y)) == Fraction(float(s)) + Fraction(float(e))


def test_counts_stay_exact_beyond_two_to_the_24():
    # A plain float32 count stops at 2^24 = 16,777,216.
    add = jax.jit(lambda s, x: s.add(x))
    total = add(CompensatedSum.zeros((1,)), jnp.array([2.0**24]))
    for _ in range(5):
        total = add(total, jnp.ones(1))
    assert total.to_float64()[0] == 2**24 + 5


# ---- activity --------------------------------------------------------------------------------------


def run_activity(code, labels, size, num_labels=3):
    sums = init_activity(code.shape[1], num_labels)
    for batch_code, batch_labels, is_valid in in_batches(size, code, labels):
        sums = activity_step(sums, batch_code, batch_labels, is_valid)
    return sums


def test_activity_by_hand():
    # Two latents, four tokens, labels 0 0 1 1; the second latent never fires.
    code = np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 0.0], [4.0, 0.0]], np.float32)
    found = finalize_activity(run_activity(code, np.array([0, 0, 1, 1], np.int32), 3, num_labels=2))
    assert found.num_tokens == 4
    assert found.tokens_by_label.tolist() == [2, 2]
    assert found.active_tokens.tolist() == [3, 0]
    np.testing.assert_allclose(found.frequency, [0.75, 0.0])
    np.testing.assert_allclose(found.mean_activation, [8 / 3, np.nan])
    np.testing.assert_allclose(found.max_activation, [4.0, 0.0])
    np.testing.assert_allclose(found.mean_square, [26 / 4, 0.0])  # (1 + 9 + 16) / 4
    np.testing.assert_allclose(found.label_shares, [[0.5, np.nan], [0.5, np.nan]])


@pytest.mark.parametrize("size", [7, 64, 500])
def test_activity_equals_numpy_for_any_batch_size(size):
    code = sparse_code(1, 500, 20)
    labels = np.random.default_rng(2).integers(0, 3, 500).astype(np.int32)
    found = finalize_activity(run_activity(code, labels, size))
    exact = code.astype(np.float64)
    shares = np.stack([exact[labels == k].sum(0) for k in range(3)]) / exact.sum(0)
    # Sums of small integers are exact in float32.
    np.testing.assert_allclose(found.label_shares, shares, rtol=1e-12)
    np.testing.assert_array_equal(found.tokens_by_label, np.bincount(labels))
    np.testing.assert_array_equal(found.active_tokens, (code > 0).sum(0))
    np.testing.assert_allclose(found.mean_square, (exact**2).mean(0), rtol=1e-12)
    np.testing.assert_array_equal(found.max_activation, code.max(0))


def test_labels_add_up_however_often_they_repeat():
    # Assignment by an index with repeats keeps only the last of them: 1 instead of 100.
    found = finalize_activity(run_activity(np.ones((100, 1), np.float32), np.zeros(100, np.int32), 100, 2))
    np.testing.assert_allclose(found.label_shares[:, 0], [1.0, 0.0])
    assert found.mean_activation[0] == 1.0
    assert found.active_tokens[0] == 100


def test_activity_merges():
    code, labels = sparse_code(3, 200, 8), np.arange(200, dtype=np.int32) % 3
    whole = finalize_activity(run_activity(code, labels, 50))
    merged = finalize_activity(
        run_activity(code[:90], labels[:90], 50).merge(run_activity(code[90:], labels[90:], 50))
    )
    for name, value in vars(whole).items():
        np.testing.assert_allclose(vars(merged)[name], value, rtol=1e-12, err_msg=name)


def test_activity_needs_a_label():
    with pytest.raises(ValueError, match="num_labels=0"):
        init_activity(4, 0)


# ---- strongest activations -------------------------------------------------------------------------


def run_top(code, selected, documents, size, places=4, order=None, **kwargs):
    tokens = np.arange(len(code), dtype=np.int32) + 1000
    order = np.arange(len(code)) if order is None else order
    top = init_top(len(selected), places)
    columns = (code[order], tokens[order], documents[order])
    for batch_code, batch_tokens, batch_documents, is_valid in in_batches(size, *columns):
        top = top_step(
            top, batch_code, jnp.asarray(selected), batch_tokens, batch_documents, is_valid, **kwargs
        )
    return top


def oracle_top(code, selected, documents, places, one_per_document):
    """Sort all tokens of a latent by (strongest, earliest) and walk down the list."""
    values, tokens = np.zeros((len(selected), places)), np.full((len(selected), places), -1)
    for row, latent in enumerate(selected):
        place, seen = 0, set()
        for n in sorted(range(len(code)), key=lambda n: (-code[n, latent], n)):
            if place == places or code[n, latent] <= 0:
                break
            if one_per_document and documents[n] in seen:
                continue
            seen.add(documents[n])
            values[row, place], tokens[row, place] = code[n, latent], n + 1000
            place += 1
    return values, tokens


@pytest.mark.parametrize("one_per_document", [True, False])
@pytest.mark.parametrize("size", [16, 90, 300])
def test_top_equals_sorting_everything(one_per_document, size):
    code, selected = sparse_code(4, 300, 12), np.array([7, 0, 11])
    documents = (np.arange(300) // 23).astype(np.int32)  # documents span batches
    top = run_top(code, selected, documents, size, one_per_document=one_per_document)
    values, tokens = oracle_top(code, selected, documents, 4, one_per_document)
    np.testing.assert_array_equal(top.values, values)
    np.testing.assert_array_equal(top.tokens, tokens)
    np.testing.assert_array_equal(top.documents, np.where(tokens >= 0, (tokens - 1000) // 23, -1))


@pytest.mark.parametrize("one_per_document", [True, False])
def test_top_does_not_depend_on_the_order_of_tokens(one_per_document):
    # Dense, so that nearly every document has its largest value several times.
    code, selected = sparse_code(5, 200, 6, density=0.9), np.array([1, 4])
    documents = (np.arange(200) // 9).astype(np.int32)
    order = np.random.default_rng(6).permutation(200)
    shuffled = run_top(code, selected, documents, 32, order=order, one_per_document=one_per_document)
    ordered = run_top(code, selected, documents, 64, one_per_document=one_per_document)
    for a, b in zip(jax.tree.leaves(shuffled), jax.tree.leaves(ordered), strict=True):
        np.testing.assert_array_equal(a, b)


def test_top_merges():
    code, selected = sparse_code(7, 200, 6), np.array([1, 4])
    documents = (np.arange(200) // 9).astype(np.int32)
    whole = run_top(code, selected, documents, 50)
    silent = code.copy()
    silent[:100] = 0
    late = run_top(silent, selected, documents, 50)
    silent = code.copy()
    silent[100:] = 0
    early = run_top(silent, selected, documents, 50)
    for a, b in zip(jax.tree.leaves(early.merge(late)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def test_places_that_nothing_fills_say_so():
    code = np.zeros((10, 2), np.float32)
    code[3, 1] = 2.5
    top = run_top(code, np.array([0, 1]), np.zeros(10, np.int32), 5, places=3)
    assert top.values.tolist() == [[0, 0, 0], [2.5, 0, 0]]
    assert top.tokens.tolist() == [[-1, -1, -1], [1003, -1, -1]]
    assert top.documents.tolist() == [[-1, -1, -1], [0, -1, -1]]


def test_padding_is_never_among_the_strongest():
    code = jnp.full((4, 1), 1.0).at[2:].set(1e9)
    rows, is_valid = jnp.arange(4), jnp.array([True, True, False, False])
    top = top_step(init_top(1, 3), code, jnp.array([0]), rows, rows, is_valid)
    assert top.values.tolist() == [[1, 1, 0]]
    assert top.tokens.tolist() == [[0, 1, -1]]


def test_eight_devices_find_the_same():
    code, labels = sparse_code(8, 64, 16), (np.arange(64) % 3).astype(np.int32)
    documents = (np.arange(64) // 5).astype(np.int32)
    selected = np.array([3, 9, 15])
    alone = (run_activity(code, labels, 32), run_top(code, selected, documents, 32))
    layout = Shardings.data_latent()
    with jax.set_mesh(make_mesh(2, 4)):
        sums, top = init_activity(16, 3, shardings=layout), init_top(3, 4)
        tokens = np.arange(64, dtype=np.int32) + 1000
        for part, where, token, document, is_valid in in_batches(32, code, labels, tokens, documents):
            part = jax.device_put(part, layout.code_bl)
            columns = (jax.device_put(x, layout.per_batch_b) for x in (where, token, document, is_valid))
            where, token, document, is_valid = columns
            sums = activity_step(sums, part, where, is_valid, shardings=layout)
            top = top_step(top, part, jnp.asarray(selected), token, document, is_valid, shardings=layout)
        assert jax.typeof(sums.sums.high).sharding.spec == jax.P(None, None, "latent")
        for a, b in zip(jax.tree.leaves((sums, top)), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6)


def test_choosing_latents_on_a_mesh_does_not_gather_the_code():
    layout = Shardings.data_latent()
    with jax.set_mesh(make_mesh(2, 4)):
        code = jax.device_put(np.zeros((32, 208), np.float32), layout.code_bl)
        column = jax.device_put(np.zeros(32, np.int32), layout.per_batch_b)
        is_valid = jax.device_put(np.ones(32, bool), layout.per_batch_b)

        def step(code, column, is_valid):
            return jax.tree.leaves(
                update_top(init_top(3, 4), code, jnp.arange(3), column, column, is_valid, shardings=layout)
            )

        text = jax.jit(step).lower(code, column, is_valid).compile().as_text()
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    assert not [line for line in gathers if "208" in line or ",52]" in line], gathers
