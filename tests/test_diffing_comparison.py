import jax.numpy as jnp
import numpy as np
import pytest
from diffing_cases import make_crosscoder, pair, random_crosscoder

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
    assert (space.is_pair, space.is_stored_space, space.why_no_scaling) == (True, False, "")


def test_a_basis_is_carried_back_bias_and_normaliser_included():
    base, chat = pair(WIDTH)
    sources = Sources((base, difference(chat, base)))
    crosscoder = crosscoder_on(sources, mean=np.arange(8.0), scale=np.array([0.5, 4.0]))
    space = comparison(crosscoder, pair(WIDTH))
    assert space.is_stored_space
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
    assert not space.is_stored_space
    assert space.sources.names == ("difference",)
    assert "there are 1" in space.why_no_scaling


def test_dependent_combinations_are_compared_as_they_are():
    # Two multiples of one difference do not determine before and after: there is no way back.
    base, chat = pair(WIDTH)
    once = difference(chat, base)
    twice = Source("twice", WIDTH, (("chat", 2.0), ("base", -2.0)))
    space = comparison(crosscoder_on(Sources((once, twice))), pair(WIDTH))
    assert space.sources.names == ("difference", "twice")
    assert not space.is_stored_space


def test_a_crosscoder_may_read_the_store_in_another_order():
    # The crosscoder's order says which is the base, not the store's.
    base, chat = pair(WIDTH)
    space = comparison(crosscoder_on(Sources((chat, base))), pair(WIDTH))
    assert space.sources.names == ("chat", "base")


@pytest.mark.parametrize(("widths", "reason"), [((2, 5), "different widths"), ((3, 3, 3), "there are 3")])
def test_reasons_against_latent_scaling(widths, reason):
    sources = Sources(tuple(Source(f"s{i}", width) for i, width in enumerate(widths)))
    assert reason in comparison(crosscoder_on(sources), sources).why_no_scaling
