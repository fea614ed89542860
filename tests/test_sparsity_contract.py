"""What every sparsity promises, in one table."""

import dataclasses
import functools
import inspect
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_cases import MESHES, assert_only_scalars_are_reduced

from crosscoder_jax.sharding import Shardings, make_mesh
from crosscoder_jax.sparsity import BatchTopK, Gate, Gated, JumpReLU, ReLU, Sparsity, SparsityContract, TopK

BATCH, LATENT = 16, 24


def kept_by_batch_top_k(count):
    def oracle(pre, weights):
        scores = np.float32(np.maximum(pre, 0) * weights)
        cut = np.sort(scores.ravel())[::-1][count - 1]
        return scores >= np.maximum(cut, np.finfo(np.float32).tiny), cut

    return oracle


def kept_by_top_k(k):
    def oracle(pre, weights):
        scores = np.float32(np.maximum(pre, 0) * weights)
        return (scores >= np.sort(scores, axis=1)[:, -k, None]) & (scores > 0)

    return oracle


@dataclasses.dataclass(frozen=True)
class Case:
    sparsity: Sparsity
    kept: int | None
    """How many of BATCH x LATENT entries stay; ``None`` if their number depends on the data."""
    step: int | None = None

    def oracle(self, pre, weights):
        """The kept mask and the smallest kept score, 0 where no threshold is estimated."""
        if isinstance(self.sparsity, ReLU | Gated):
            return pre > 0, 0.0
        if isinstance(self.sparsity, JumpReLU):
            return np.float32(np.maximum(pre, 0) * weights) > np.float32(self.sparsity.initial_threshold), 0.0
        if isinstance(self.sparsity, TopK):
            return kept_by_top_k(self.sparsity.k)(pre, weights), 0.0
        return kept_by_batch_top_k(self.kept)(pre, weights)

    def __call__(self, pre, weights, **more):
        return self.sparsity(pre, weights, step=self.step, **more)


CASES = {
    "batch top-k": Case(BatchTopK(k=3), 48),
    "fractional k": Case(BatchTopK(k=2.6), 42),  # 2.6 * 16 = 41.6
    "k below one": Case(BatchTopK(k=0.125), 2),
    "annealing half way": Case(BatchTopK(k=2, initial_k=6, anneal_steps=8), 64, step=4),
    # 6 - 4 * 3 / 8 = 4.5, and Python's round() takes the even neighbour.
    "annealing in whole k": Case(BatchTopK(k=2, initial_k=6, anneal_steps=8, is_k_whole=True), 64, step=3),
    "after training": Case(BatchTopK(k=2, initial_k=6, anneal_steps=8), 32),
    "top-k": Case(TopK(k=3), 48),
    "jump relu": Case(JumpReLU(initial_threshold=0.8), None),
    "gated": Case(Gated(), None),
    "relu": Case(ReLU(), None),
}


@pytest.mark.parametrize("sparsity", typing.get_args(Sparsity), ids=lambda sparsity: sparsity.__name__)
def test_every_sparsity_takes_what_the_contract_names(sparsity):
    for method in ("__call__", "at_inference"):
        ours, promised = (inspect.signature(getattr(c, method)) for c in (sparsity, SparsityContract))
        assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
            (p.name, p.kind, p.default) for p in promised.parameters.values()
        ]


@functools.partial(jax.jit, static_argnums=0)
def run(case, pre, weights, threshold=None):
    return case(pre, weights, threshold=threshold)


over_the_table = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def inputs(seed=0, dtype=jnp.float32):
    """Pre-activations, 40 % negative, and weights of different size."""
    rng = np.random.default_rng(seed)
    pre = jnp.asarray(rng.normal(0.3, 1, size=(BATCH, LATENT)), dtype)
    return pre, jnp.asarray(rng.uniform(0.2, 3, size=LATENT), jnp.float32)


@over_the_table
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_code_has_the_shape_and_dtype_of_the_pre_activations(case, dtype):
    code, smallest = run(case, *inputs(dtype=dtype))
    assert code.shape == (BATCH, LATENT)
    assert code.dtype == dtype
    assert smallest.shape == ()
    assert smallest.dtype == jnp.float32


@over_the_table
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kept_values_are_the_unweighted_activations_that_the_oracle_keeps(case, dtype):
    pre, weights = inputs(dtype=dtype)
    code, smallest = run(case, pre, weights)
    values = np.asarray(pre, np.float32)
    kept, cut = case.oracle(values, np.asarray(weights))
    np.testing.assert_array_equal(np.asarray(code, np.float32), np.where(kept, values, 0))
    assert smallest == np.float32(cut)


@over_the_table
def test_exactly_as_many_are_kept_as_promised(case):
    pre, weights = inputs(seed=1)
    kept, _ = case.oracle(np.asarray(pre), np.asarray(weights))
    expected = int(kept.sum()) if case.kept is None else case.kept
    assert int((run(case, pre, weights).code > 0).sum()) == expected


@over_the_table
def test_jit_equals_eager(case):
    eager = case(*inputs())
    jitted = run(case, *inputs())
    jax.tree.map(np.testing.assert_array_equal, jitted, eager)


@over_the_table
def test_vmap_selects_in_every_batch_on_its_own(case):
    pre = jnp.stack([inputs(seed)[0] * 10.0**seed for seed in range(3)])
    weights = inputs()[1]
    together = jax.jit(jax.vmap(case, in_axes=(0, None)))(pre, weights)
    for i in range(3):
        alone = run(case, pre[i], weights)
        np.testing.assert_array_equal(together.code[i], alone.code)
        np.testing.assert_array_equal(together.smallest_score[i], alone.smallest_score)


@over_the_table
def test_gradient_is_one_on_the_kept_values_and_reaches_neither_the_weights_nor_the_cut(case):
    pre, weights = inputs()
    direction = jnp.asarray(np.random.default_rng(5).normal(size=pre.shape), jnp.float32)

    def objective(pre, weights):
        code, smallest = case(pre, weights)
        return jnp.sum(direction * code) + smallest

    of_pre, of_weights = jax.jit(jax.grad(objective, argnums=(0, 1)))(pre, weights)
    kept, _ = case.oracle(np.asarray(pre), np.asarray(weights))
    np.testing.assert_array_equal(of_pre, np.where(kept, direction, 0))
    np.testing.assert_array_equal(of_weights, np.zeros(LATENT))


@over_the_table
@pytest.mark.parametrize("shape", MESHES)
def test_sharded_selection_is_bitwise_that_of_one_device(case, shape):
    pre, weights = inputs(seed=2)
    single = run(case, pre, weights)
    mesh = make_mesh(*shape)
    layout = Shardings.for_mesh(mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(pre, layout.code_bl), jax.device_put(weights, layout.per_latent_l)
        compiled = jax.jit(case).lower(*placed).compile()
        sharded = compiled(*placed)
    jax.tree.map(np.testing.assert_array_equal, sharded, single)
    assert sharded.code.sharding.shard_shape((BATCH, LATENT)) == (BATCH // shape[0], LATENT // shape[1])
    if isinstance(case.sparsity, BatchTopK):
        assert_only_scalars_are_reduced(compiled.as_text())
    else:
        # TopK counts per token; the others have nothing to say to each other.
        assert "all-gather" not in compiled.as_text()
        assert isinstance(case.sparsity, TopK) or "all-reduce" not in compiled.as_text()


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("jump relu", "gated")])
def test_a_running_threshold_changes_nothing(name):
    case = CASES[name]
    pre, weights = inputs(seed=3)
    for guess in (1e-30, 0.7, 1e30):
        guided = run(case, pre, weights, jnp.float32(guess))
        jax.tree.map(np.testing.assert_array_equal, guided, run(case, pre, weights))


@over_the_table
def test_a_batch_without_positive_pre_activations_has_an_empty_code(case):
    code, smallest = run(case, -jnp.ones((BATCH, LATENT)), jnp.ones(LATENT))
    assert not code.any()
    assert smallest == (np.inf if isinstance(case.sparsity, BatchTopK) else 0.0)


@over_the_table
def test_inference_keeps_for_a_token_alone_what_it_keeps_in_a_batch(case):
    pre, weights = inputs(seed=4)
    threshold = jnp.full(LATENT, 0.9) if isinstance(case.sparsity, JumpReLU) else jnp.float32(0.9)
    if isinstance(case.sparsity, Gated):  # open where the score exceeds 0, and as strong as it is
        threshold = Gate(jnp.zeros(LATENT), jnp.zeros(LATENT))
    together = case.sparsity.at_inference(pre, weights, threshold)
    alone = [case.sparsity.at_inference(row[None], weights, threshold) for row in pre]
    np.testing.assert_array_equal(together, np.concatenate(alone))
    values, scores = np.asarray(pre), np.float32(np.maximum(pre, 0) * weights)
    kept = scores > (0 if isinstance(case.sparsity, Gated) else 0.9)
    if isinstance(case.sparsity, TopK):
        kept = kept_by_top_k(3)(values, np.asarray(weights))
    np.testing.assert_array_equal(together, np.where(kept, values, 0))


def test_ties_at_the_cut_are_all_kept():
    code, smallest = BatchTopK(k=1)(jnp.ones((2, 3)), jnp.array([1.0, 1.0, 0.5]))
    np.testing.assert_array_equal(code, [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    assert smallest == 1.0


def test_ranking_is_by_weighted_score_over_the_whole_batch():
    # Scores [[4, 3], [10, 0.3]]: k * batch = 2 entries, of which row 0 keeps one and row 1 one.
    code, smallest = BatchTopK(k=1)(jnp.array([[4.0, 1.0], [10.0, 0.1]]), jnp.array([1.0, 3.0]))
    np.testing.assert_array_equal(code, [[4.0, 0.0], [10.0, 0.0]])
    assert smallest == 4.0
    # Not k per token: both may come from one row.
    code, _ = BatchTopK(k=1)(jnp.array([[4.0, 3.0], [1.0, 2.0]]), jnp.ones(2))
    np.testing.assert_array_equal(code, [[4.0, 3.0], [0.0, 0.0]])


def test_close_scores_of_bfloat16_codes_are_told_apart_in_float32():
    # In bfloat16 1.001 and 1.002 are both 1.
    code, _ = BatchTopK(k=1)(jnp.ones((1, 2), jnp.bfloat16), jnp.array([1.001, 1.002]))
    np.testing.assert_array_equal(np.asarray(code, np.float32), [[0.0, 1.0]])


def test_latents_with_zero_weight_are_never_kept():
    code, _ = BatchTopK(k=2)(jnp.array([[5.0, 1.0]]), jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(code, [[0.0, 1.0]])


def test_annealing_is_linear_and_ends():
    sparsity = BatchTopK(k=10, initial_k=30, anneal_steps=4)
    assert [float(sparsity.k_at(step)) for step in (0, 1, 2, 3, 4, 5)] == [30, 25, 20, 15, 10, 10]
    assert float(sparsity.k_at(None)) == 10


@pytest.mark.parametrize(("initial_k", "k", "steps"), [(24, 8, 50), (8, 24, 7), (3, 0.4, 5), (100, 30, 1000)])
def test_whole_k_is_that_of_the_published_code_at_every_step(initial_k, k, steps):
    sparsity = BatchTopK(k=k, initial_k=initial_k, anneal_steps=steps, is_k_whole=True)
    law = [max(1, round(initial_k - (initial_k - k) * (step / steps))) for step in range(steps)]
    found = jax.vmap(sparsity.k_at)(jnp.arange(steps + 5))
    np.testing.assert_array_equal(found, np.float32([*law, *[k] * 5]))
    assert int(sparsity._count(1, 64)) == law[1] * 64


@pytest.mark.parametrize(
    ("sparsity", "batch_size", "kept"),
    [
        (BatchTopK(k=0.01), 40, 0),
        (BatchTopK(k=5, initial_k=0.01, anneal_steps=3), 40, 0),
        (BatchTopK(k=2**29), 2, 2**30),
    ],
)
def test_a_k_that_keeps_nothing_or_too_much_to_count_is_refused(sparsity, batch_size, kept):
    with pytest.raises(ValueError, match=f"keeps {kept} scores of a batch of {batch_size}"):
        sparsity(jnp.ones((batch_size, 3)), jnp.ones(3))


def test_large_counts_are_exact():
    # 16,777,217 = 2^24 + 1 is no float32.
    assert int(BatchTopK(k=16_777_217)._count(None, 1)) == 16_777_217
    assert int(BatchTopK(k=0.3)._count(None, 10)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k=0 must be positive"),
        ({"k": math.nan}, "k=nan must be positive"),
        ({"k": math.inf}, "k=inf must be positive and finite"),
        ({"k": 1, "initial_k": 2}, "go together"),
        ({"k": 1, "anneal_steps": 2}, "go together"),
        ({"k": 1, "initial_k": 0, "anneal_steps": 2}, "initial_k=0 must be positive"),
        ({"k": 1, "initial_k": 2, "anneal_steps": -2}, "anneal_steps=-2 must not be negative"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchTopK(**arguments)
