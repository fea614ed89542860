"""Base's activations with what latents add in chat, against sums written out."""

import jax.numpy as jnp
import numpy as np
import pytest
from core_cases import arrays, random_crosscoder

import crosscoder_jax as cc
from crosscoder_jax.diffing import decoder_change, patched_acts

BASE, CHAT = cc.Source("base", 6), cc.Source("chat", 6)
STORED = cc.Sources((BASE, CHAT))
SOURCES = {
    "both": STORED,
    "delta basis": cc.Sources((BASE, cc.difference(CHAT, BASE))),
    "difference": cc.Sources((cc.difference(CHAT, BASE),)),
}


def change_by_hand(crosscoder, values):
    """Raw decoders of chat minus those of base, by what each source is."""
    scale = np.repeat(arrays(crosscoder)["scale"], crosscoder.config.sources.widths)
    parts = np.split(values / scale, len(crosscoder.config.sources), axis=-1)
    # A basis of base and chat - base, and a difference alone, have the change as their last source.
    return parts[1] - parts[0] if crosscoder.config.sources == STORED else parts[-1]


@pytest.mark.parametrize("name", SOURCES)
def test_the_patched_stream_is_the_sum_over_the_set(name):
    crosscoder = random_crosscoder(sources=SOURCES[name], num_latents=8)
    acts = np.random.default_rng(0).normal(size=(20, 12)).astype(np.float32)
    known = arrays(crosscoder)
    code = np.asarray(crosscoder.encode(SOURCES[name].derive(jnp.asarray(acts), STORED)))
    w_dec = change_by_hand(crosscoder, known["w_dec"])
    # The normaliser's mean is put back with the bias: raw = normalised / scale + mean.
    mean = np.split(known["mean"], len(SOURCES[name]))
    bias = change_by_hand(crosscoder, known["b_dec"]) + (mean[1] - mean[0] if name == "both" else mean[-1])
    chosen = {1, 4, 5}
    expected = acts[:, :6].astype(np.float64)
    for latent in chosen:
        expected = expected + code[:, [latent]] * w_dec[latent]
    is_chosen = jnp.asarray([latent in chosen for latent in range(8)])
    found = patched_acts(crosscoder, jnp.asarray(acts), {"some": is_chosen}, STORED)
    assert np.abs(code[:, sorted(chosen)]).max() > 0.1, "the set must say something"
    np.testing.assert_allclose(found["some"], expected, atol=1e-5)
    np.testing.assert_array_equal(found["none"], acts[:, :6])
    np.testing.assert_allclose(found["bias"], acts[:, :6] + bias, atol=1e-5)
    np.testing.assert_allclose(found["all"], acts[:, :6] + bias + code @ w_dec, atol=1e-5)


def test_what_says_nothing_of_the_change_is_refused():
    third = cc.Source("third", 6)
    reversed_difference = cc.Sources((cc.difference(BASE, CHAT),))
    with pytest.raises(ValueError, match=r"says nothing of chat - base: take one that reads both"):
        decoder_change(random_crosscoder(sources=reversed_difference, num_latents=8), STORED)
    with pytest.raises(ValueError, match=r"says nothing of chat - base"):
        decoder_change(random_crosscoder(sources=cc.Sources((BASE,)), num_latents=8), STORED)
    with pytest.raises(ValueError, match=r"have no difference: two of one width have"):
        decoder_change(random_crosscoder(num_latents=8), cc.Sources((BASE, CHAT, third)))
    with pytest.raises(ValueError, match=r"have no difference"):
        decoder_change(random_crosscoder(num_latents=8), cc.Sources((BASE, cc.Source("chat", 4))))


def test_names_that_are_always_there_are_refused():
    crosscoder = random_crosscoder(sources=STORED, num_latents=8)
    with pytest.raises(ValueError, match="set 'all' has the name of one that is always there"):
        patched_acts(crosscoder, jnp.zeros((2, 12)), {"all": jnp.ones(8, bool)}, STORED)
