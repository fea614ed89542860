import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffing_cases import pair, random_crosscoder

from crosscoder_jax.diffing.decoder_norms import (
    Cutoffs,
    LatentClass,
    class_labels,
    classify_latents,
    decoder_cosine,
    decoder_norms,
    delta_norm,
)
from crosscoder_jax.sources import Source, Sources


def test_norms_per_source_by_hand():
    # 3-4-5 and 5-12-13 triangles, sources of different widths.
    sources = Sources((Source("base", 2), Source("chat", 3)))
    w_dec = jnp.array([[3.0, 4.0, 0.0, 5.0, 12.0], [0.0, 0.0, 1.0, 2.0, 2.0]])
    np.testing.assert_allclose(decoder_norms(w_dec, sources), [[5.0, 0.0], [13.0, 3.0]], rtol=1e-6)


def test_norms_in_raw_units_differ_from_normalised_ones_by_the_scale():
    crosscoder = random_crosscoder()
    raw = decoder_norms(crosscoder.raw_decoder()[0], crosscoder.config.sources)
    normalised = crosscoder.decoder_norms()
    # normalised = raw * scale, so raw decoders are divided by 0.7 and 1.9.
    np.testing.assert_allclose(raw[0] * 0.7, normalised[0], rtol=1e-5)
    np.testing.assert_allclose(raw[1] * 1.9, normalised[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("base", "chat", "expected"),
    [
        (1.0, 1.0, 0.5),
        (0.0, 3.0, 1.0),
        (3.0, 0.0, 0.0),
        (1.0, 5.0, 0.9),  # the published cut-off: the base has a fifth of the norm
        (5.0, 1.0, 0.1),
        (1.0, 2.0, 0.75),
    ],
)
def test_delta_norm_by_hand(base, chat, expected):
    assert float(delta_norm(jnp.array([[base], [chat]]))[0]) == pytest.approx(expected, abs=1e-7)


def test_delta_norm_of_two_zero_decoders_is_nan_and_nothing_else_is():
    delta = np.asarray(jax.jit(delta_norm)(jnp.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])))
    assert np.isnan(delta).tolist() == [True, False, False]


def test_delta_norm_swaps_to_its_complement():
    norms = jnp.asarray(np.random.default_rng(0).random((2, 50)), jnp.float32)
    np.testing.assert_allclose(delta_norm(norms) + delta_norm(norms[::-1]), 1.0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 3])
def test_delta_norm_refuses_other_numbers_of_sources(count):
    with pytest.raises(ValueError, match=rf"{count} sources.*exactly two"):
        delta_norm(jnp.ones((count, 4)))


def test_classes_at_their_bounds():
    # Bounds belong to their class, also after rounding to float32.
    delta = jnp.array([0.0, 0.1, 0.11, 0.39, 0.4, 0.5, 0.6, 0.61, 0.89, 0.9, 1.0, jnp.nan])
    assert class_labels(classify_latents(delta)) == [
        *("base-only", "base-only", "other", "other"),
        *("shared", "shared", "shared"),
        *("other", "other", "chat-only", "chat-only", "dead"),
    ]


def test_dead_latents_are_dead_whatever_their_norms():
    classes = classify_latents(jnp.array([0.95, 0.5]), is_dead=jnp.array([True, False]))
    assert classes.tolist() == [LatentClass.DEAD, LatentClass.SHARED]


def test_cutoffs_move_the_classes_and_jit_agrees():
    delta = jnp.linspace(0, 1, 101)
    wide = Cutoffs(base_only_max=0.3, shared_min=0.31, shared_max=0.69, chat_only_min=0.7)
    classes = jax.jit(classify_latents, static_argnums=1)(delta, wide)
    assert classes.tolist() == classify_latents(delta, wide).tolist()
    # 0.00 .. 0.30 and 0.70 .. 1.00 in steps of 0.01
    assert int((classes == LatentClass.BASE_ONLY).sum()) == 31
    assert int((classes == LatentClass.CHAT_ONLY).sum()) == 31


@pytest.mark.parametrize(
    "bad",
    [
        {"base_only_max": 0.45},
        {"chat_only_min": 1.5},
        {"base_only_max": -0.1},
        {"shared_min": 0.7},
        {"shared_max": 0.9},
        {"shared_max": float("nan")},
    ],
)
def test_overlapping_cutoffs_are_refused(bad):
    with pytest.raises(ValueError, match=r"must ascend.*0\.1, 0\.4, 0\.6, 0\.9"):
        Cutoffs(**bad)


def test_exclusive_classes():
    assert [c.is_exclusive for c in LatentClass] == [True, False, True, False, False]


def test_cosine_by_hand():
    # parallel with another length, opposite, orthogonal, 45 degrees, one zero decoder
    base = [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    chat = [[3.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    cosine = decoder_cosine(jnp.concatenate([jnp.array(base), jnp.array(chat)], axis=1), pair(2))
    np.testing.assert_allclose(cosine, [1.0, -1.0, 0.0, np.sqrt(0.5), np.nan], atol=1e-6)


def test_cosine_ignores_the_units_of_a_source():
    w_dec = jnp.asarray(np.random.default_rng(1).standard_normal((20, 10)), jnp.float32)
    scaled = w_dec * jnp.repeat(jnp.array([7.0, 0.02]), 5)
    np.testing.assert_allclose(decoder_cosine(w_dec, pair(5)), decoder_cosine(scaled, pair(5)), atol=1e-6)


@pytest.mark.parametrize("widths", [(2, 3), (4,), (2, 2, 2)])
def test_cosine_refuses_sources_without_common_axes(widths):
    sources = Sources(tuple(Source(f"s{i}", width) for i, width in enumerate(widths)))
    with pytest.raises(ValueError, match=r"decoder_cosine.*two sources"):
        decoder_cosine(jnp.ones((3, sum(widths))), sources)
