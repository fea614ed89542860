import jax.numpy as jnp
import numpy as np
import pytest
from diffing_cases import make_crosscoder, pair, random_crosscoder

from crosscoder_jax.diffing import decoder_norms, delta_norm
from crosscoder_jax.diffing.comparison import comparison
from crosscoder_jax.sources import Source, Sources, difference

WIDTH, NUM_LATENTS = 4, 6


def crosscoder_on(sources, seed=0, **normaliser):
    rng = np.random.default_rng(seed)
    return make_crosscoder(
        sources,
        w_enc=rng.standard_normal((sources.width, NUM_LATENTS)),
        b_enc=np.zeros(NUM_LATENTS),
        w_dec=rng.standard_normal((NUM_LATENTS, sources.width)),
        b_dec=rng.standard_normal(sources.width),
        **normaliser,
    )


def test_stored_sources_are_compared_as_they_are_in_raw_units():
    crosscoder = random_crosscoder(width=WIDTH, num_latents=NUM_LATENTS)
    space = comparison(crosscoder, pair(WIDTH))
    w_dec, b_dec = crosscoder.raw_decoder()
    np.testing.assert_array_equal(space.w_dec, w_dec)
    np.testing.assert_array_equal(space.b_dec, b_dec)
    assert (space.is_pair, space.why_no_scaling) == (True, "")


def test_a_basis_is_carried_back_bias_and_normaliser_included():
    base, chat = pair(WIDTH)
    sources = Sources((base, difference(chat, base)))
    crosscoder = crosscoder_on(sources, mean=np.arange(8.0), scale=np.array([0.5, 4.0]))
    space = comparison(crosscoder, pair(WIDTH))
    assert space.sources == pair(WIDTH)
    # The reconstruction of the basis, added up to before and after, is that of the stored space.
    code = jnp.asarray(np.random.default_rng(1).random((5, NUM_LATENTS)), jnp.float32)
    before, delta = np.split(np.asarray(crosscoder.decode(code)), 2, axis=1)
    in_stored_space = np.asarray(code @ space.w_dec + space.b_dec)
    np.testing.assert_allclose(in_stored_space, np.concatenate([before, before + delta], axis=1), atol=1e-5)


def test_a_difference_alone_stays_a_single_source():
    base, chat = pair(WIDTH)
    space = comparison(crosscoder_on(Sources((difference(chat, base),))), pair(WIDTH))
    assert not space.is_pair
    assert space.sources.names == ("difference",)
    assert "there are 1" in space.why_no_scaling


MID = Source("mid", WIDTH)


def test_two_combinations_that_determine_no_models_are_refused():
    base, chat = pair(WIDTH)
    three = Sources((base, MID, chat))
    # Two multiples of one difference leave before and after open.
    twice = Source("twice", WIDTH, (("chat", 2.0), ("base", -2.0)))
    message = r"sources \('difference', 'twice'\) do not determine \('base', 'chat'\), of which they are made"
    with pytest.raises(ValueError, match=message):
        comparison(crosscoder_on(Sources((difference(chat, base), twice))), pair(WIDTH))
    message = r"\('mid', 'difference'\) do not determine \('base', 'mid', 'chat'\), .*: train on a basis"
    with pytest.raises(ValueError, match=message):
        comparison(crosscoder_on(Sources((MID, difference(chat, base)))), three)


@pytest.mark.parametrize("is_reversed", [False, True])
def test_a_basis_is_carried_back_whatever_else_is_stored(is_reversed):
    base, chat = pair(WIDTH)
    stored = Sources((chat, MID, base) if is_reversed else (base, MID, chat))
    crosscoder = make_crosscoder(
        Sources((base, difference(chat, base))),
        w_enc=np.zeros((8, 1)),
        b_enc=np.zeros(1),
        w_dec=np.array([[3.0, 0, 0, 0, 1.0, 0, 0, 0]]),
        b_dec=np.arange(8.0),
    )
    space = comparison(crosscoder, stored)
    assert space.sources == pair(WIDTH)
    # chat = base + difference: 4 against 3, so that delta_norm is (1 + (4 - 3) / 4) / 2.
    np.testing.assert_array_equal(space.w_dec, [[3.0, 0, 0, 0, 4.0, 0, 0, 0]])
    np.testing.assert_array_equal(space.b_dec, [0, 1, 2, 3, 4, 6, 8, 10])
    np.testing.assert_allclose(delta_norm(decoder_norms(space.w_dec, space.sources)), [0.625])


def test_a_difference_alone_stays_a_single_source_whatever_else_is_stored():
    base, chat = pair(WIDTH)
    space = comparison(crosscoder_on(Sources((difference(chat, base),))), Sources((base, MID, chat)))
    assert (space.sources.names, space.is_pair) == (("difference",), False)


def test_a_crosscoder_may_read_the_store_in_another_order():
    # The crosscoder's order says which is the base, not the store's.
    base, chat = pair(WIDTH)
    space = comparison(crosscoder_on(Sources((chat, base))), pair(WIDTH))
    assert space.sources.names == ("chat", "base")


@pytest.mark.parametrize(("widths", "reason"), [((2, 5), "different widths"), ((3, 3, 3), "there are 3")])
def test_reasons_against_latent_scaling(widths, reason):
    sources = Sources(tuple(Source(f"s{i}", width) for i, width in enumerate(widths)))
    assert reason in comparison(crosscoder_on(sources), sources).why_no_scaling
