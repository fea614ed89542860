"""The search for the cut, against a sort."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_cases import MESHES, assert_only_scalars_are_reduced

import crosscoder_jax as cc
from crosscoder_jax.sharding import Shardings, make_mesh
from crosscoder_jax.sparsity import apply_threshold, selection, top_scores_cut, top_scores_per_row

TINY = np.float32(selection.SMALLEST_SCORE)
MOST_PASSES = 32
"""The first, and a halving in every other of the 31 bits between the smallest and the largest float."""
SHAPES = [(1,), (7,), (1, 1), (3, 5), (16, 16), (64, 33), (2, 3, 4), (8, 512)]


def sorted_cut(scores, count):
    """The count-th largest positive score, by sorting; the smallest positive one if there are fewer."""
    positive = np.sort(scores[scores >= TINY].ravel())[::-1]
    kept = min(count, positive.size)
    return positive[kept - 1] if kept > 0 else np.float32(np.inf)


cut_of = jax.jit(top_scores_cut)


@jax.jit
def search(scores, count, guess):
    found = selection._search(scores, count, guess, lambda scores: scores)
    return top_scores_cut(scores, count, guess=guess), found.passes


def check(scores, count, guess=0.0):
    """Compare one case with the sort; return the passes it took."""
    scores = np.asarray(scores, np.float32)
    cut, passes = search(scores, jnp.int32(count), jnp.float32(guess))
    expected = sorted_cut(scores, count)
    assert cut.dtype == jnp.float32
    assert cut == expected, f"{count=} {guess=} {scores=}"
    assert passes <= MOST_PASSES
    return int(passes)


def bfloat16(values):
    return np.asarray(jnp.asarray(values, jnp.bfloat16), np.float32)


FAMILIES = {
    "half normal": lambda rng, shape: np.maximum(rng.normal(size=shape), 0),
    "log normal": lambda rng, shape: np.exp(rng.normal(size=shape) * 3),
    "cauchy": lambda rng, shape: np.abs(rng.standard_cauchy(size=shape)),
    "many ties": lambda rng, shape: rng.integers(0, 4, size=shape),
    "all equal": lambda rng, shape: np.full(shape, rng.exponential()),
    "rare": lambda rng, shape: np.where(rng.random(shape) < 0.1, rng.exponential(size=shape), 0),
    "one outlier": lambda rng, shape: np.where(np.arange(np.prod(shape)).reshape(shape) == 0, 1e30, 1),
    "all magnitudes": lambda rng, shape: 10.0 ** rng.uniform(-30, 30, size=shape),
    "two clusters": lambda rng, shape: (
        np.where(rng.random(shape) < 0.5, 1e-30, 1e30) * rng.uniform(1, 2, size=shape)
    ),
    "bfloat16": lambda rng, shape: bfloat16(rng.exponential(size=shape)),
    "signed zeros": lambda rng, shape: np.where(rng.random(shape) < 0.5, -0.0, rng.integers(0, 2, shape)),
    "subnormal": lambda rng, shape: np.where(rng.random(shape) < 0.5, 1e-40, rng.uniform(0, 1e-37, shape)),
    "neighbours": lambda rng, shape: np.float32(1) + rng.integers(0, 5, shape) * np.finfo(np.float32).eps,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_equals_the_sorted_one_for_random_scores_counts_and_guesses(family):
    # 13 families x 8 shapes x 20 cases = 2,080 cases.
    rng = np.random.default_rng(list(FAMILIES).index(family))
    for shape in SHAPES:
        for _ in range(20):
            scores = FAMILIES[family](rng, shape).astype(np.float32)
            count = int(rng.integers(0, scores.size + 2))
            guess = rng.choice([0.0, scores.flat[0], scores.max() * 2, rng.exponential(), 1e-45, 3e38])
            check(scores, count, guess)


def test_cut_of_a_hand_made_batch():
    scores = jnp.array([[0.0, 5.0, 2.0], [3.0, 0.5, 0.0]])
    assert [float(cut_of(scores, jnp.int32(n))) for n in (1, 2, 3, 4)] == [5.0, 3.0, 2.0, 0.5]


def test_all_scores_tied_at_the_cut_are_kept():
    # The second largest is one of three 2s: two of them cannot be told from the third.
    scores = np.float32([[2.0, 3.0], [2.0, 2.0], [1.0, 0.0]])
    cut = cut_of(jnp.asarray(scores), jnp.int32(2))
    assert cut == 2.0
    assert (scores >= cut).sum() == 4


@pytest.mark.parametrize("zero", [0.0, -0.0, 1e-40])
def test_nothing_is_kept_when_no_score_is_positive(zero):
    assert cut_of(jnp.full((4, 4), zero, jnp.float32), jnp.int32(3)) == np.inf


def test_nothing_is_kept_for_a_count_of_zero():
    assert cut_of(jnp.ones((4, 4)), jnp.int32(0)) == np.inf


def test_fewer_positive_scores_than_the_count_are_all_kept():
    scores = np.float32([0.0, 0.25, 7.0, -0.0, 1e-40])
    assert cut_of(jnp.asarray(scores), jnp.int32(4)) == 0.25


def test_a_count_beyond_the_size_keeps_every_positive_score():
    assert cut_of(jnp.array([1.0, 2.0]), jnp.int32(2**31 - 1)) == 1.0


def test_the_smallest_and_the_largest_float_can_be_cuts():
    scores = jnp.array([TINY, np.finfo(np.float32).max])
    assert cut_of(scores, jnp.int32(1)) == np.finfo(np.float32).max
    assert cut_of(scores, jnp.int32(2)) == TINY


@pytest.mark.parametrize("guess", [np.nan, np.inf, -np.inf, -1.0, 0.0, 1e-45, 3e38])
def test_an_absurd_guess_changes_nothing(guess):
    scores = np.random.default_rng(0).exponential(size=(32, 64)).astype(np.float32)
    for count in (1, 100, 2000):
        check(scores, count, guess)


def test_every_count_of_a_distinct_set_is_met_exactly():
    scores = np.random.default_rng(1).permutation(np.arange(1, 65)).astype(np.float32)
    for count in range(1, 65):
        cut, _ = search(scores, jnp.int32(count), jnp.float32(0))
        assert (scores >= cut).sum() == count


def typical_scores(batch=64, latent=4096):
    """Scores as a trained encoder gives them: a shifted normal, a few per cent of it positive."""
    pre = np.random.default_rng(2).normal(-1.5, 1, size=(batch, latent))
    return np.maximum(pre, 0).astype(np.float32)


def test_typical_scores_take_few_passes_and_a_good_guess_saves_some():
    scores = typical_scores()
    count = 64 * 32
    unaided = check(scores, count)
    guided = check(scores, count, sorted_cut(scores, count) * 1.001)
    assert unaided <= 6
    assert guided < unaided
    assert check(scores, count, sorted_cut(scores, count)) == 1


# 508 scores are larger than the steps of the staircase, and 516 reach its lowest one.
@pytest.mark.parametrize("count", [1, 2, 500, 509, 510, 512, 515, 516, 517, 1023, 1024])
def test_passes_stay_bounded_for_scores_made_to_defeat_interpolation(count):
    # Every power of two in the range of float32 four times over, and a staircase of neighbours.
    powers = np.float32(2.0) ** np.arange(-126, 128, dtype=np.float32)
    neighbours = [np.float32(1)]
    for _ in range(8):
        neighbours.append(np.nextafter(neighbours[-1], np.float32(2)))
    scores = np.concatenate([np.repeat(powers, 4), neighbours[1:]])
    # The steps are as small as float32 has them: eight scores, one unit in the last place apart.
    assert len(scores) == 1024
    np.testing.assert_array_equal(np.diff(scores[-8:].view(np.int32)), 1)
    check(scores, count)
    check(scores, count, 3e38)


def test_more_scores_than_an_int32_counts_are_accepted():
    scores = jax.ShapeDtypeStruct((2**17, 2**17), jnp.float32)
    cut = jax.eval_shape(top_scores_cut, scores, jax.ShapeDtypeStruct((), jnp.int32))
    assert cut.shape == ()


@pytest.mark.parametrize("count", [1, 17, 99])
def test_counting_row_by_row_and_stopping_early_finds_the_same_cut(count, monkeypatch):
    # 400 of the 600 scores are positive, so counts saturate at 100 for low cuts, and the search must
    # still find every cut that keeps fewer.
    monkeypatch.setattr(selection, "INT32_SCORES", 10)
    monkeypatch.setattr(selection, "MOST_KEPT", 100)
    scores = np.random.default_rng(count).permutation(np.arange(600.0, dtype=np.float32) - 199).clip(0)
    cut = top_scores_cut(jnp.asarray(scores.reshape(20, 30)), jnp.int32(count))
    assert cut == np.sort(scores)[-count]


@pytest.mark.parametrize("shape", MESHES)
def test_sharded_search_finds_the_same_cut_and_moves_only_scalars(shape):
    mesh = make_mesh(*shape)
    scores = typical_scores(16, 64)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(scores, Shardings.for_mesh(mesh).code_bl)
        compiled = jax.jit(top_scores_cut).lower(sharded, jnp.int32(40)).compile()
        cut = compiled(sharded, jnp.int32(40))
    assert cut == sorted_cut(scores, 40)
    assert_only_scalars_are_reduced(compiled.as_text())


def test_search_sorts_nothing():
    hlo = jax.jit(top_scores_cut).lower(jnp.ones((16, 64)), jnp.int32(3)).compile().as_text()
    assert " while(" in hlo
    assert " sort(" not in hlo
    assert "TopK" not in hlo


def test_the_cut_of_what_makes_the_scores_is_that_of_the_scores():
    rng = np.random.default_rng(4)
    pre_acts = jnp.asarray(rng.normal(size=(16, 64)), jnp.bfloat16)
    weights = jnp.asarray(rng.uniform(0.5, 2, size=64), jnp.float32)

    def score(pre_acts):
        return jax.nn.relu(pre_acts).astype(jnp.float32) * weights

    for count in (1, 40, 400, 2000):
        found = jax.jit(lambda values, c: top_scores_cut(values, c, score=score))(pre_acts, jnp.int32(count))
        assert found == sorted_cut(np.asarray(score(pre_acts)), count)


def test_the_search_reads_what_makes_the_scores_and_keeps_no_scores():
    """They are made anew in every pass; XLA would make them once, before the loop, in twice the memory."""
    shapes = jax.ShapeDtypeStruct((256, 4096), jnp.bfloat16), jax.ShapeDtypeStruct((4096,), jnp.float32)

    def select(pre_acts, weights):
        return cc.BatchTopK(8)(pre_acts, weights).smallest_score

    loops = re.findall(r"= \((.*?)\) while\(", jax.jit(select).lower(*shapes).compile().as_text())
    assert any("bf16[256,4096]" in carried for carried in loops)
    assert not any(" f32[256,4096]" in carried for carried in loops)


def test_the_search_works_under_vmap():
    rng = np.random.default_rng(3)
    scores = rng.exponential(size=(5, 4, 8)).astype(np.float32)
    counts = np.arange(5, dtype=np.int32) * 3
    cuts = jax.jit(jax.vmap(lambda s, c: top_scores_cut(s, c)))(scores, counts)
    np.testing.assert_array_equal(cuts, [sorted_cut(s, c) for s, c in zip(scores, counts, strict=True)])


def sorted_rows(scores, count):
    cuts = np.array([sorted_cut(row, count) for row in scores])
    return scores >= cuts[:, None]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_keep_their_largest_scores(family):
    rng = np.random.default_rng(100 + list(FAMILIES).index(family))
    select = jax.jit(top_scores_per_row)
    for shape in [(1, 1), (5, 7), (16, 64)]:
        for _ in range(10):
            scores = FAMILIES[family](rng, shape).astype(np.float32)
            count = int(rng.integers(0, shape[1] + 2))
            np.testing.assert_array_equal(select(scores, jnp.int32(count)), sorted_rows(scores, count))


def test_rows_tell_the_largest_neighbouring_floats_apart():
    bits = np.float32(np.finfo(np.float32).max).view(np.int32) - np.arange(16, dtype=np.int32)
    scores = np.random.default_rng(0).permutation(bits).view(np.float32)[None]
    for count in range(1, 17):
        assert int(top_scores_per_row(jnp.asarray(scores), jnp.int32(count)).sum()) == count


def test_each_row_is_cut_on_its_own():
    scores = jnp.array([[9.0, 8.0, 7.0], [0.0, 0.5, 0.0], [0.0, -0.0, 0.0], [1.0, 1.0, 0.5]])
    expected = [[True, False, False], [False, True, False], [False] * 3, [True, True, False]]
    np.testing.assert_array_equal(top_scores_per_row(scores, jnp.int32(1)), expected)


@pytest.mark.parametrize("shape", MESHES)
def test_sharded_rows_equal_single_device_rows_without_moving_latents(shape):
    mesh = make_mesh(*shape)
    scores = typical_scores(16, 64)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(scores, Shardings.for_mesh(mesh).code_bl)
        compiled = jax.jit(top_scores_per_row).lower(sharded, jnp.int32(3)).compile()
        mask = compiled(sharded, jnp.int32(3))
    np.testing.assert_array_equal(mask, sorted_rows(scores, 3))
    assert "all-gather" not in compiled.as_text()
    assert "all-to-all" not in compiled.as_text()
    assert "64]" not in "".join(line for line in compiled.as_text().splitlines() if "all-reduce(" in line)


def test_the_threshold_is_strict_and_on_weighted_scores():
    # Scores are 2, 3, 4; the cut at 3 keeps the last alone, with its unweighted activation.
    pre = jnp.array([[1.0, 3.0, 2.0]])
    weights = jnp.array([2.0, 1.0, 2.0])
    np.testing.assert_array_equal(apply_threshold(pre, weights, jnp.float32(3.0)), [[0.0, 0.0, 2.0]])


def test_negative_pre_activations_never_pass_even_a_negative_threshold():
    pre = jnp.array([[-1.0, 0.5]])
    np.testing.assert_array_equal(apply_threshold(pre, jnp.ones(2), jnp.float32(-1.0)), [[0.0, 0.5]])


def test_the_threshold_is_compared_in_float32_for_bfloat16_codes():
    # 1.0 * 1.001 exceeds 1.0005 in float32; in bfloat16 all three would be 1.
    pre = jnp.ones((1, 1), jnp.bfloat16)
    code = apply_threshold(pre, jnp.array([1.001], jnp.float32), jnp.float32(1.0005))
    assert code.dtype == jnp.bfloat16
    assert code[0, 0] == 1.0


def test_the_code_of_a_token_does_not_depend_on_its_batch():
    pre = jnp.asarray(np.random.default_rng(4).normal(size=(6, 8)), jnp.float32)
    apply = functools.partial(apply_threshold, score_weights=jnp.ones(8), threshold=jnp.float32(0.5))
    np.testing.assert_array_equal(apply(pre)[2:3], apply(pre[2:3]))
