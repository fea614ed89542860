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


@pytest.mark.parametrize("name", SOURCES)
def test_whatever_else_is_stored_plays_no_part(name):
    crosscoder = random_crosscoder(sources=SOURCES[name], num_latents=8)
    acts = np.random.default_rng(0).normal(size=(20, 18)).astype(np.float32)
    _, base, chat = np.split(acts, 3, axis=1)
    more = cc.Sources((cc.Source("mid", 6), BASE, CHAT))
    expected = patched_acts(crosscoder, jnp.asarray(np.concatenate([base, chat], axis=1)), {}, STORED)
    found = patched_acts(crosscoder, jnp.asarray(acts), {}, more)
    np.testing.assert_array_equal(found["none"], base)
    for kind, value in expected.items():
        np.testing.assert_array_equal(found[kind], value)


def test_the_change_goes_the_way_that_the_crosscoder_says():
    """A crosscoder that puts chat before base tells what base adds to chat."""
    crosscoder = random_crosscoder(sources=cc.Sources((CHAT, BASE)), num_latents=8)
    of_chat, of_base = np.split(np.asarray(crosscoder.raw_decoder()[0]), 2, axis=1)
    np.testing.assert_array_equal(decoder_change(crosscoder, STORED)[0], of_base - of_chat)
    acts = np.random.default_rng(0).normal(size=(20, 12)).astype(np.float32)
    np.testing.assert_array_equal(
        patched_acts(crosscoder, jnp.asarray(acts), {}, STORED)["none"], acts[:, 6:]
    )


def test_what_says_nothing_of_a_change_is_refused():
    mid = cc.Source("mid", 6)
    mean = cc.Source("mean", 6, (("base", 0.5), ("chat", 0.5)))

    def refused(message, *sources, stored=(BASE, mid, CHAT)):
        crosscoder = random_crosscoder(sources=cc.Sources(sources), num_latents=8)
        with pytest.raises(ValueError, match=message):
            decoder_change(crosscoder, cc.Sources(stored))

    refused(r"of \('mean',\) says nothing of chat - base: take one that reads both", mean)
    refused(r"of the sources \{'base': 6\} tells of no change: take one of two of one width", BASE)
    refused(r"of the sources \{'base': 6, 'mid': 6, 'chat': 6\} tells of no change", BASE, mid, CHAT)
    narrow = cc.Source("chat", 4)
    refused(r"of the sources \{'base': 6, 'chat': 4\} tells of", BASE, narrow, stored=(BASE, narrow))


def test_names_that_are_always_there_are_refused():
    crosscoder = random_crosscoder(sources=STORED, num_latents=8)
    with pytest.raises(ValueError, match="set 'all' has the name of one that is always there"):
        patched_acts(crosscoder, jnp.zeros((2, 12)), {"all": jnp.ones(8, bool)}, STORED)
