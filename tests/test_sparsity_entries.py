"""Codes as lists of entries: the plain functions and, where they were compiled, the fast ones."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crosscoder_jax.kernels import native
from crosscoder_jax.sparsity import BatchTopK, entries

COMPILED = pytest.param(
    native,
    marks=pytest.mark.skipif(native.missing() is not None, reason=f"not compiled: {native.missing()}"),
    id="compiled",
)
both = pytest.mark.parametrize("functions", [pytest.param(entries, id="plain"), COMPILED])

BATCH, LATENTS, WIDTH = 21, 150, 37
"""No multiples of what the compiled functions take at once."""


def test_they_are_compiled_where_there_is_a_compiler():
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler: nothing to compile them with")
    assert native.missing() is None


@functools.cache
def compiled(function, *static):
    return jax.jit(function, static_argnums=static)


def batch(seed, kind="normal"):
    """Pre-activations and weights of scores of a kind."""
    rng = np.random.default_rng(seed)
    pre_acts = rng.normal(size=(BATCH, LATENTS)).astype(np.float32)
    if kind == "equal":
        pre_acts[:] = 1.5
    if kind == "few values":
        pre_acts = np.round(pre_acts)
    if kind == "zero":
        pre_acts = np.where(rng.random(pre_acts.shape) < 0.5, 0.0, -0.0).astype(np.float32)
    if kind == "subnormal":
        pre_acts *= np.float32(1e-40)
    if kind == "one latent":
        pre_acts[:, 1:] = -1
    weights = np.ones(LATENTS) if kind in ("equal", "few values") else rng.uniform(0.2, 3, LATENTS)
    return jnp.asarray(pre_acts), jnp.asarray(weights, jnp.float32)


@pytest.mark.parametrize("kind", ["normal", "equal", "few values", "zero", "subnormal", "one latent"])
@both
def test_the_entries_are_those_of_the_code(functions, kind):
    """Bit for bit what BatchTopK keeps, in the order of rows and latents, ties included."""
    for seed in range(5):
        pre_acts, weights = batch(seed, kind)
        code, cut = BatchTopK(k=3)(pre_acts, weights)
        found = compiled(functions.compress, 3)(pre_acts, weights, cut, pre_acts.size)
        rows, latents = np.nonzero(np.asarray(code))
        number = len(rows)
        assert found.starts[-1] == number
        np.testing.assert_array_equal(np.repeat(np.arange(BATCH), np.diff(found.starts)), rows)
        np.testing.assert_array_equal(found.latents[:number], latents)
        np.testing.assert_array_equal(found.values[:number], np.asarray(code)[rows, latents])
        np.testing.assert_array_equal(found.values[number:], 0)


@both
def test_the_order_by_latent_is_that_of_a_stable_sort(functions):
    pre_acts, weights = batch(0)
    found = compiled(entries.compress, 3)(pre_acts, weights, jnp.float32(2.0), 900)
    order = compiled(functions.by_latent, 1)(found, LATENTS)
    number = int(found.starts[-1])
    assert 0 < number < 900
    expected = np.argsort(found.latents[:number], kind="stable")
    np.testing.assert_array_equal(order.order[:number], expected)
    rows = np.repeat(np.arange(BATCH), np.diff(found.starts))
    np.testing.assert_array_equal(order.rows[:number], rows[expected])
    np.testing.assert_array_equal(
        np.diff(order.starts), np.bincount(found.latents[:number], minlength=LATENTS)
    )


@both
def test_the_products_are_those_of_the_dense_code(functions):
    """Against float64: sums of at most 150 terms, of which each float32 rounding is off by 6e-8."""
    for seed in range(5):
        pre_acts, weights = batch(seed)
        rng = np.random.default_rng(seed)
        w_dec, grad, acts = (
            jnp.asarray(rng.normal(size=shape), jnp.float32)
            for shape in ((LATENTS, WIDTH), (BATCH, WIDTH), (BATCH, WIDTH))
        )
        found = compiled(entries.compress, 3)(pre_acts, weights, jnp.float32(2.0), 900)
        order = compiled(entries.by_latent, 1)(found, LATENTS)
        number, rows = int(found.starts[-1]), np.repeat(np.arange(BATCH), np.diff(found.starts))
        places = rows, np.asarray(found.latents)[:number]
        code, of_code = np.zeros((2, BATCH, LATENTS))
        code[places] = found.values[:number]
        dense = np.asarray(grad, np.float64) @ np.asarray(w_dec, np.float64).T

        of_values = compiled(functions.value_gradient)(found, grad, w_dec)
        of_code[places] = dense[places]
        of_w_enc, of_b_enc = compiled(functions.encoder_gradient)(of_values, order, acts)
        for ours, theirs in [
            (compiled(functions.decode)(found, w_dec), code @ np.asarray(w_dec)),
            (of_values[:number], dense[places]),
            (of_values[number:], np.zeros(900 - number)),
            (compiled(functions.decoder_gradient)(found.values, order, grad), code.T @ np.asarray(grad)),
            (of_w_enc, np.asarray(acts).T @ of_code),
            (of_b_enc, of_code.sum(axis=0)),
        ]:
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


@both
def test_nothing_kept_is_nothing_decoded(functions):
    pre_acts, weights = batch(0)
    found = functions.compress(pre_acts, weights, jnp.float32(jnp.inf), 10)
    order = functions.by_latent(found, LATENTS)
    ones = jnp.ones((LATENTS, WIDTH))
    np.testing.assert_array_equal(functions.decode(found, ones), np.zeros((BATCH, WIDTH)))
    np.testing.assert_array_equal(
        functions.decoder_gradient(found.values, order, ones[:BATCH]), np.zeros((LATENTS, WIDTH))
    )


@pytest.mark.skipif(native.missing() is not None, reason=f"not compiled: {native.missing()}")
def test_more_entries_than_there_is_room_for_are_an_error():
    pre_acts, weights = batch(0, "equal")
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"more than 50 scores .* tied at the cut"):
        native.compress(pre_acts, weights, jnp.float32(1.0), 50)


@pytest.mark.skipif(native.missing() is not None, reason=f"not compiled: {native.missing()}")
def test_they_can_be_mapped_over():
    """Seeds that are trained side by side."""
    pre_acts, weights = batch(0)
    cuts = jnp.asarray([1.0, 2.0, 3.0], jnp.float32)
    each = jax.vmap(lambda cut: native.compress(pre_acts, weights, cut, 3000))(cuts)
    for index, cut in enumerate(cuts):
        for ours, theirs in zip(each, entries.compress(pre_acts, weights, cut, 3000), strict=True):
            np.testing.assert_array_equal(ours[index], theirs)
