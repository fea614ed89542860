"""When latents appear over several sources, and how they turn, against numbers by hand and NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_cases import random_crosscoder
from training_cases import write_store

import crosscoder_jax as cc
from crosscoder_jax.activations import Split, StoredSource, TokenView
from crosscoder_jax.diffing import diff_run
from crosscoder_jax.diffing.trajectories import appearance, are_snapshots, turning

STEPS = cc.Sources(tuple(cc.Source(f"step{i}", 4) for i in range(3)))


def test_a_latent_appears_where_its_norm_first_reaches_the_share_of_its_largest():
    norms = jnp.array([[0.0, 3.0, 1.0, 0.0], [0.5, 1.0, 1.9, 0.0], [1.0, 2.0, 4.0, 0.0]])
    assert appearance(norms).tolist() == [1, 0, 2, 0]
    assert appearance(norms, share=0.25).tolist() == [1, 0, 0, 0]
    with pytest.raises(ValueError, match=r"share=0 must lie above 0"):
        appearance(norms, share=0)


def test_turning_is_the_cosine_with_the_last_decoder():
    w_dec = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)
    w_dec[2, 4:8] = 0
    parts = w_dec.reshape(5, 3, 4).astype(np.float64)
    with np.errstate(invalid="ignore"):
        expected = [
            [
                parts[j, s] @ parts[j, 2] / (np.linalg.norm(parts[j, s]) * np.linalg.norm(parts[j, 2]))
                for j in range(5)
            ]
            for s in range(3)
        ]
    found = jax.jit(lambda w: turning(w, STEPS))(w_dec)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert np.isnan(found[1, 2])


def test_sources_of_other_widths_do_not_turn():
    uneven = cc.Sources((cc.Source("a", 3), cc.Source("b", 5)))
    with pytest.raises(ValueError, match=r"turning needs sources of one width, .* \{'a': 3, 'b': 5\}"):
        turning(jnp.ones((2, 8)), uneven)


def test_the_diff_of_several_sources_tells_when_each_latent_appears_and_how_it_turns(tmp_path):
    store = write_store(tmp_path / "store", widths=(4, 4, 4))
    crosscoder = random_crosscoder(sources=store.sources, sparsity=cc.BatchTopK(k=3))
    columns = diff_run(crosscoder, TokenView.of_split(store, Split(), held_out=True)).columns
    norms = np.stack([columns[f"norm_{name}"] for name in store.sources.names])
    first = [store.sources.names[i] for i in (norms >= norms.max(axis=0) / 2).argmax(axis=0)]
    assert columns["appears_in"].tolist() == first
    raw = np.asarray(crosscoder.raw_decoder()[0])
    expected = np.asarray(turning(jnp.asarray(raw), store.sources))
    for i, name in enumerate(store.sources.names):
        np.testing.assert_array_equal(columns[f"turning_{name}"], expected[i].astype(np.float64))


def stored_at(*places):
    """Sources s0, s1, ... by model, revision and hook point."""
    return [StoredSource(f"s{i}", 4, *place) for i, place in enumerate(places)]


@pytest.mark.parametrize(
    ("places", "is_so"),
    [
        ([("a", None, "L1"), ("b", None, "L1"), ("c", None, "L1")], True),
        ([("a", "step1", "L1"), ("a", "step2", "L1"), ("a", "step3", "L1")], True),
        ([("a", None, "L1"), ("a", None, "L2"), ("b", None, "L1"), ("b", None, "L2")], False),
        # Where layers are not told apart, the models are still two.
        ([("a", None, ""), ("a", None, ""), ("b", None, ""), ("b", None, "")], False),
        ([("a", None, "L1"), ("a", None, "L2"), ("a", None, "L3")], False),
        ([("a", None, "L1"), ("b", None, "L1"), ("c", None, "L7")], False),
    ],
    ids=["models", "revisions", "two models at two layers", "unknown layers", "layers", "other layers"],
)
def test_snapshots_are_one_layer_of_as_many_models(places, is_so):
    stored = stored_at(*places)
    sources = cc.Sources(tuple(cc.Source(one.name, 4) for one in stored))
    assert are_snapshots(sources, stored) is is_so
    assert are_snapshots(sources, [*stored, StoredSource("more", 4, "a", None, "L9")]) is is_so


def test_combinations_are_no_snapshots():
    stored = stored_at(("a", None, "L1"), ("b", None, "L1"), ("c", None, "L1"))
    s0, s1, s2 = (cc.Source(one.name, 4) for one in stored)
    changes = cc.Sources((s0, cc.difference(s1, s0, name="d1"), cc.difference(s2, s0, name="d2")))
    assert not are_snapshots(changes, stored)


def test_the_diff_of_two_models_at_two_layers_tells_no_order_of_appearance(tmp_path):
    store = write_store(tmp_path / "store", widths=(4, 4, 4))
    layers = [dataclasses.replace(s, hook_point=f"L{i}") for i, s in enumerate(store.manifest.sources)]
    store.manifest = dataclasses.replace(store.manifest, sources=tuple(layers))
    crosscoder = random_crosscoder(sources=store.sources, sparsity=cc.BatchTopK(k=3))
    columns = diff_run(crosscoder, TokenView.of_split(store, Split(), held_out=True)).columns
    assert f"norm_{store.sources.names[2]}" in columns
    assert not any(name.startswith(("appears_in", "turning_")) for name in columns)


def test_the_diff_of_sources_of_other_widths_tells_when_they_appear_alone(tmp_path):
    store = write_store(tmp_path / "store", widths=(4, 5, 4))
    crosscoder = random_crosscoder(sources=store.sources, sparsity=cc.BatchTopK(k=3))
    columns = diff_run(crosscoder, TokenView.of_split(store, Split(), held_out=True)).columns
    assert "appears_in" in columns
    assert not any(name.startswith("turning_") for name in columns)
