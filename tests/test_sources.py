"""Sources: the concatenated axis, derived sources and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crosscoder_jax.sources import Source, Sources, difference, safe_norm

BASE, CHAT, WIDE = Source("base", 2), Source("chat", 2), Source("wide", 3)


def test_views_of_the_concatenated_axis_follow_the_order_of_the_sources():
    sources = Sources((BASE, WIDE, CHAT))
    assert len(sources) == 3
    assert [entry.name for entry in sources] == ["base", "wide", "chat"]
    assert sources.names == ("base", "wide", "chat")
    assert sources.widths == (2, 3, 2)
    assert sources.width == 7
    assert sources.offsets == (0, 2, 5)
    parts = sources.split(np.arange(14).reshape(2, 7))
    np.testing.assert_array_equal(parts[0], [[0, 1], [7, 8]])
    np.testing.assert_array_equal(parts[1], [[2, 3, 4], [9, 10, 11]])
    np.testing.assert_array_equal(parts[2], [[5, 6], [12, 13]])


def test_split_keeps_the_kind_of_array_and_any_leading_axes():
    sources = Sources((BASE, WIDE))
    assert isinstance(sources.split(np.zeros((4, 1, 5)))[1], np.ndarray)
    assert sources.split(np.zeros((4, 1, 5)))[1].shape == (4, 1, 3)
    assert isinstance(sources.split(jnp.zeros(5))[0], jax.Array)


def test_split_refuses_another_width():
    with pytest.raises(ValueError, match=r"length 6.*'base': 2, 'wide': 3.*5 together"):
        Sources((BASE, WIDE)).split(np.zeros((1, 6)))


def test_norms_are_per_source_and_latent():
    w_dec = jnp.array([[3.0, 4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 2.0, 2.0]])
    np.testing.assert_array_equal(Sources((BASE, WIDE)).norms(w_dec), [[5.0, 0.0], [0.0, 3.0]])


def test_gradient_of_a_zero_norm_is_zero_not_nan():
    gradient = jax.grad(lambda rows: safe_norm(rows).sum())(jnp.array([[0.0, 0.0], [3.0, 4.0]]))
    np.testing.assert_allclose(gradient, [[0.0, 0.0], [0.6, 0.8]], rtol=1e-6)


def test_per_source_repeats_each_value_over_its_coordinates():
    np.testing.assert_array_equal(
        Sources((BASE, WIDE)).per_source(jnp.array([2.0, 5.0])), [2.0, 2.0, 5.0, 5.0, 5.0]
    )


def test_stored_sources_are_passed_through_untouched():
    stored = Sources((BASE, CHAT))
    acts = jnp.ones((3, 4), jnp.bfloat16)
    assert stored.derive(acts, stored) is acts
    assert not stored.is_derived


@pytest.mark.parametrize("own", [(BASE, CHAT), (CHAT, BASE), (difference(CHAT, BASE),)])
def test_stored_activations_are_read_in_float32(own):
    # 1 + 2^-7 is a bfloat16; float32 holds every bfloat16 and these differences exactly.
    acts = jnp.array([[1.0, 2.0, 1.0078125, 3.0]], jnp.bfloat16)
    read = Sources(own).read(acts, Sources((BASE, CHAT)))
    assert read.dtype == jnp.float32
    by_name = {"base": [1.0, 2.0], "chat": [1.0078125, 3.0], "difference": [0.0078125, 1.0]}
    assert read.tolist() == [[x for source in own for x in by_name[source.name]]]


def test_a_difference_is_after_minus_before():
    derived = Sources((BASE, difference(CHAT, BASE)))
    assert derived.is_derived
    acts = jnp.array([[1.0, 2.0, 10.0, 20.0]])
    np.testing.assert_array_equal(derived.derive(acts, Sources((BASE, CHAT))), [[1.0, 2.0, 9.0, 18.0]])


def test_derived_sources_match_by_name_whatever_the_order_of_the_store():
    derived = Sources((difference(CHAT, BASE),))
    stored = Sources((CHAT, WIDE, BASE))
    acts = jnp.array([[10.0, 20.0, 7.0, 7.0, 7.0, 1.0, 2.0]])
    np.testing.assert_array_equal(derived.derive(acts, stored), [[9.0, 18.0]])


def test_a_crosscoder_may_read_some_of_a_store_in_another_order():
    acts = jnp.array([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]])
    out = Sources((CHAT, BASE)).derive(acts, Sources((BASE, WIDE, CHAT)))
    np.testing.assert_array_equal(out, [[6.0, 7.0, 1.0, 2.0]])


def test_differences_of_bfloat16_activations_are_exact():
    # 256 and 0.875 are bfloat16 numbers; 255.125 needs 11 bits and is not: rounded it would be 255.
    stored = Sources((BASE, CHAT))
    acts = jnp.array([[0.875, 1.0, 256.0, 3.0]], jnp.bfloat16)
    out = Sources((difference(CHAT, BASE),)).derive(acts, stored)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, [[255.125, 2.0]])


def test_arbitrary_coefficients_are_applied():
    mean = Source("mean", 2, (("base", 0.25), ("chat", 0.75)))
    out = Sources((mean,)).derive(jnp.array([[4.0, 8.0, 8.0, 0.0]]), Sources((BASE, CHAT)))
    np.testing.assert_array_equal(out, [[7.0, 2.0]])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Sources((Source("other", 2),)), r"'other' reads 'other', but there is \('base', 'wide'\)"),
        (Sources((Source("base", 3),)), "'base' has width 3, but 'base' is stored with width 2"),
        (Sources((Source("d", 2, (("base", 1.0), ("wide", 1.0))),)), "'d' has width 2, but 'wide'"),
    ],
)
def test_sources_that_are_not_in_the_store_are_refused(wanted, message):
    with pytest.raises(ValueError, match=message):
        wanted.derive(jnp.zeros((1, 5)), Sources((BASE, WIDE)))


def test_decoders_of_derived_sources_act_in_stored_space_as_they_do_here():
    # d_stored is right exactly if deriving it gives d back: stored + d_stored -> derived + d.
    derived = Sources((BASE, WIDE, Source("mix", 2, (("chat", 2.0), ("base", -0.5)))))
    stored = Sources((CHAT, BASE, WIDE))
    w_dec = jnp.asarray(np.random.default_rng(0).normal(size=(4, 7)), jnp.float32)
    back = derived.to_stored_decoder(w_dec, stored)
    assert back.shape == (4, 7)
    np.testing.assert_allclose(derived.derive(back, stored), w_dec, atol=1e-6)
    # By hand: chat = (mix + base / 2) / 2.
    base, _, mix = derived.split(w_dec)
    np.testing.assert_allclose(stored.split(back)[0], 0.5 * mix + 0.25 * base, atol=1e-6)


def test_decoders_of_stored_sources_are_already_in_stored_space():
    w_dec = jnp.ones((2, 4))
    stored = Sources((BASE, CHAT))
    assert stored.to_stored_decoder(w_dec, stored) is w_dec


def test_a_difference_alone_has_no_decoder_in_stored_space():
    derived = Sources((difference(CHAT, BASE),))
    with pytest.raises(ValueError, match="do not determine the stored sources"):
        derived.to_stored_decoder(jnp.ones((2, 2)), Sources((BASE, CHAT)))


def test_dependent_combinations_have_no_decoder_in_stored_space():
    twice = Source("twice", 2, (("base", 2.0),))
    with pytest.raises(ValueError, match="do not determine"):
        Sources((BASE, twice)).to_stored_decoder(jnp.ones((2, 4)), Sources((BASE, CHAT)))


# One token of stored sources: base (1, 2), chat (10, 20).
STORED_ACTS = jnp.array([[1.0, 2.0, 10.0, 20.0]])


def stored_by_hand(own, own_acts):
    stored = Sources((BASE, CHAT))
    found = own.to_stored_acts(jnp.asarray([own_acts]), STORED_ACTS, stored)
    return {name: value.tolist()[0] for name, value in found.items()}


@pytest.mark.parametrize(
    ("own", "own_acts", "expected"),
    [
        ((BASE, CHAT), [5.0, 6.0, 7.0, 8.0], {"base": [5.0, 6.0], "chat": [7.0, 8.0]}),
        ((CHAT, BASE), [5.0, 6.0, 7.0, 8.0], {"base": [7.0, 8.0], "chat": [5.0, 6.0]}),
        ((CHAT,), [5.0, 6.0], {"chat": [5.0, 6.0]}),
        # after = before + difference, with the stored before.
        ((difference(CHAT, BASE),), [5.0, 6.0], {"chat": [6.0, 8.0]}),
        # after = before + difference, with the reconstructed before.
        ((BASE, difference(CHAT, BASE)), [5.0, 6.0, 7.0, 8.0], {"base": [5.0, 6.0], "chat": [12.0, 14.0]}),
        # 2 chat + 3 base = own: chat = (own - 3 base) / 2.
        ((Source("mix", 2, (("chat", 2.0), ("base", 3.0))),), [5.0, 6.0], {"chat": [1.0, 0.0]}),
    ],
    ids=["stored", "other order", "some", "difference", "basis", "combination"],
)
def test_activations_are_carried_back_to_the_stored_sources(own, own_acts, expected):
    assert stored_by_hand(Sources(own), own_acts) == expected


def test_activations_as_they_are_stored_are_carried_back_to_themselves():
    """Deriving and going back gives what was stored, whatever the combination."""
    stored = Sources((BASE, CHAT))
    for own in ((difference(CHAT, BASE),), (BASE, difference(CHAT, BASE)), (CHAT,)):
        own_acts = Sources(own).derive(STORED_ACTS, stored)
        for name, value in Sources(own).to_stored_acts(own_acts, STORED_ACTS, stored).items():
            place = stored.names.index(name)
            np.testing.assert_array_equal(value, stored.split(STORED_ACTS)[place])


@pytest.mark.parametrize(
    ("own", "names"),
    [
        ((CHAT, Source("double", 2, (("chat", 2.0),))), r"\('chat',\)"),
        # Two multiples of one difference: neither base nor chat.
        (
            (difference(CHAT, BASE), Source("twice", 2, (("chat", 2.0), ("base", -2.0)))),
            r"\('base', 'chat'\)",
        ),
    ],
    ids=["chat twice", "difference twice"],
)
def test_sources_that_do_not_determine_what_they_are_made_of_are_refused(own, names):
    with pytest.raises(ValueError, match=f"do not determine the stored sources {names}: train on a basis"):
        stored_by_hand(Sources(own), [1.0, 2.0, 3.0, 4.0])


MID = Source("mid", 2)
OWN_ACTS = [5.0, 6.0, 7.0, 8.0]


@pytest.mark.parametrize("order", [("base", "mid", "chat"), ("chat", "mid", "base")])
@pytest.mark.parametrize(
    ("own", "own_acts", "expected"),
    [
        # after = before + difference, with the reconstructed before, whatever lies between them.
        ((BASE, difference(CHAT, BASE)), OWN_ACTS, {"base": [5.0, 6.0], "chat": [12.0, 14.0]}),
        ((BASE, CHAT), OWN_ACTS, {"base": [5.0, 6.0], "chat": [7.0, 8.0]}),
        # base = (1, 2) stays as it is stored; each change adds to what the one before has made.
        ((difference(CHAT, BASE),), OWN_ACTS[:2], {"chat": [6.0, 8.0]}),
        (
            (difference(MID, BASE, name="first"), difference(CHAT, MID, name="second")),
            OWN_ACTS,
            {"mid": [6.0, 8.0], "chat": [13.0, 16.0]},
        ),
        (
            (difference(MID, BASE, name="first"), difference(CHAT, BASE, name="second")),
            OWN_ACTS,
            {"mid": [6.0, 8.0], "chat": [8.0, 10.0]},
        ),
        # chat = base + difference, and nothing reconstructs base.
        ((MID, difference(CHAT, BASE)), OWN_ACTS, {"mid": [5.0, 6.0], "chat": [8.0, 10.0]}),
    ],
    ids=["basis", "stored", "difference", "chain", "two differences", "mixed"],
)
def test_activations_are_carried_back_in_a_store_that_holds_more(own, own_acts, expected, order):
    values = {"base": [1.0, 2.0], "mid": [3.0, 5.0], "chat": [10.0, 20.0]}
    stored = Sources(tuple(Source(name, 2) for name in order))
    stored_acts = jnp.array([[number for name in order for number in values[name]]])
    found = Sources(own).to_stored_acts(jnp.array([own_acts]), stored_acts, stored)
    assert {name: value.tolist()[0] for name, value in found.items()} == expected


@pytest.mark.parametrize(
    ("own", "names", "is_basis"),
    [
        ((CHAT, BASE), ("chat", "base"), True),
        ((BASE, difference(CHAT, BASE)), ("base", "chat"), True),
        ((difference(CHAT, BASE), BASE), ("base", "chat"), True),
        # What is subtracted is what comes before: here the change goes from chat to base.
        ((CHAT, difference(BASE, CHAT)), ("chat", "base"), True),
        ((difference(CHAT, BASE),), ("base", "chat"), False),
        ((BASE, difference(MID, BASE), difference(CHAT, MID, name="d2")), ("base", "mid", "chat"), True),
        ((MID, difference(CHAT, BASE)), ("base", "mid", "chat"), False),
    ],
)
@pytest.mark.parametrize("order", [(BASE, MID, CHAT), (CHAT, MID, BASE)], ids=["in order", "backwards"])
def test_what_sources_are_made_of_does_not_depend_on_what_else_is_stored(own, names, is_basis, order):
    made_of = Sources(own).made_of(Sources(order))
    assert made_of.names == names
    assert Sources(own).is_basis_of(made_of) == is_basis


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Source("", 2), "name='' of a source must not be empty"),
        (lambda: Source("base", 0), "width=0 of source 'base' must be positive"),
        (lambda: Source("base", 2, ()), "must name at least one stored source"),
        (lambda: Source("d", 2, (("a", 1.0), ("a", 1.0))), "names a stored source twice"),
        (lambda: Sources(()), "at least one source"),
        (lambda: Sources((BASE, Source("base", 3))), "must differ"),
        (lambda: difference(WIDE, BASE), "'wide' has width 3 and 'base' has 2"),
    ],
)
def test_impossible_sources_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
