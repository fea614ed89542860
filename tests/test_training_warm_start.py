"""Beginning with a saved crosscoder: where its weights go, what is held, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_cases import arrays, random_crosscoder, two_sources
from flax import nnx
from training_cases import activations, recipe, weights, write_store

import crosscoder_jax as cc
from crosscoder_jax.groups import LatentGroup
from crosscoder_jax.publishing import Published
from crosscoder_jax.sharding import Shardings, make_mesh
from crosscoder_jax.training.loop import RunOptions, fit, put_batch
from crosscoder_jax.training.warm_start import begin_with

BATCH = 32
START = cc.WarmStart("a folder")
THREE = cc.Sources((cc.Source("new", 4), cc.Source("base", 3), cc.Source("chat", 5)))
SAVED = cc.Sources((cc.Source("chat", 5), cc.Source("base", 3)))
"""In another order than in THREE."""
OLD = np.r_[7:12, 4:7]
"""Where the width of SAVED lies in THREE."""


def saved(num_latents=8, sources=SAVED, **changes):
    return random_crosscoder(num_latents=num_latents, sources=sources, sparsity=cc.BatchTopK(k=3), **changes)


def begun(start=START, sources=THREE, num_latents=16, crosscoder=None, **changes):
    config = recipe(sources=sources, num_latents=num_latents, start=start, **changes)
    state = cc.init_state(config, mean=np.full(sources.width, 9.0), scale=np.full(len(sources), 2.0))
    return config, begin_with(state, Published.of(crosscoder or saved()), start)


def trained(config, state, steps=10):
    width = config.crosscoder.sources.width
    for batch in np.random.default_rng(0).normal(size=(steps, BATCH, width)).astype(np.float32):
        state, _ = cc.train_step(state, jnp.asarray(batch), config=config)
    return state


def test_saved_weights_lie_at_their_sources_and_their_latents():
    _, state = begun()
    new, old = arrays(state.crosscoder()), arrays(saved())
    np.testing.assert_array_equal(new["w_enc"][OLD, :8], old["w_enc"])
    np.testing.assert_array_equal(new["w_dec"][:8, OLD], old["w_dec"])
    np.testing.assert_array_equal(new["b_enc"], np.r_[old["b_enc"], np.zeros(8)])
    np.testing.assert_array_equal(new["b_dec"][OLD], old["b_dec"])
    # The source that is new keeps the statistics of the data.
    np.testing.assert_array_equal(new["mean"], np.r_[[9.0] * 4, old["mean"][5:], old["mean"][:5]])
    np.testing.assert_array_equal(new["scale"], [2.0, old["scale"][1], old["scale"][0]])


def test_saved_latents_begin_without_a_part_in_a_new_source_and_new_latents_with_one_in_all():
    config, state = begun()
    new = arrays(state.crosscoder())
    assert not new["w_dec"][:8, :4].any()
    assert not new["w_enc"][:4, :8].any()
    drawn = arrays(cc.init_state(config).crosscoder())
    np.testing.assert_array_equal(new["w_dec"][8:], drawn["w_dec"][8:])
    np.testing.assert_array_equal(new["w_enc"][:, 8:], drawn["w_enc"][:, 8:])
    assert np.linalg.norm(new["w_dec"][8:, :4], axis=1).min() > 0


def test_a_crosscoder_begun_with_all_of_another_is_the_other():
    config, state = begun(sources=SAVED, num_latents=8)
    other, acts = saved(), jnp.asarray(activations(64, (5, 3)))
    again = state.crosscoder()
    pre_acts = again.pre_acts(again.normalize(acts))
    np.testing.assert_array_equal(pre_acts, other.pre_acts(other.normalize(acts)))
    assert config.crosscoder == other.config


def test_sources_can_be_other_models_here():
    sources = cc.Sources((cc.Source("tuned", 5),))
    alone = saved(sources=cc.Sources((cc.Source("base", 5),)))
    start = cc.WarmStart("a folder", sources=("tuned",))
    _, state = begun(start=start, sources=sources, num_latents=8, crosscoder=alone)
    np.testing.assert_array_equal(weights(state)["w_dec"], alone.w_dec[...])


def test_saved_latents_keep_to_their_groups():
    group = LatentGroup("chat", 0.25, writes=("chat",))
    old = saved(sources=two_sources(), groups=(group,))
    old.constrain()
    # Of 8 latents 2 are the group's, of 16 with half the share again 2; and of 16 with a quarter 4.
    _, state = begun(sources=two_sources(), num_latents=16, crosscoder=old, groups=(group,))
    w_dec = weights(state)["w_dec"]
    np.testing.assert_array_equal(w_dec[:2], old.w_dec[:2])
    np.testing.assert_array_equal(w_dec[4:10], old.w_dec[2:])
    assert not w_dec[:4, :3].any()


def test_what_a_frozen_start_brings_is_held_and_the_rest_learns():
    config, state = begun(start=dataclasses.replace(START, is_frozen=True))
    before = weights(state)
    after = weights(trained(config, state))
    held = {
        "w_enc": (OLD[:, None], np.arange(8)),
        "w_dec": (np.arange(8)[:, None], OLD),
        "b_enc": np.arange(8),
    }
    for name, where in {**held, "b_dec": OLD}.items():
        np.testing.assert_array_equal(after[name][where], before[name][where], err_msg=name)
        moved = np.ones(after[name].shape, bool)
        moved[where] = False
        # Not all: some of the new latents do not fire in so few steps.
        assert (after[name][moved] != before[name][moved]).mean() > 0.25, name


EVEN = cc.Sources((cc.Source("chat", 4), cc.Source("base", 4)))
WIDER = cc.Sources((cc.Source("new", 4), cc.Source("base", 4), cc.Source("chat", 4)))
BOTH = ("chat", "base")
OPTIMIZERS = {"Adam": cc.Adam(), "factored": cc.Adam(second_moment="factored"), "Muon": cc.Muon()}


def grouped(*groups, **changes):
    """A saved crosscoder that is as its groups ask."""
    crosscoder = saved(sources=EVEN, groups=groups, **changes)
    crosscoder.constrain()
    crosscoder.equalise_norms()
    return crosscoder


def groups_of(writes):
    """Of 8 latents or 16: a quarter with one decoder, one with one norm, one of chat, one free."""
    return (
        LatentGroup("tied", 0.25, is_tied=True, writes=writes),
        LatentGroup("norm-tied", 0.25, is_norm_tied=True, writes=writes),
        LatentGroup("chat", 0.25, reads=("chat",), writes=("chat",)),
    )


def in_sources(values):
    """Weights ``[latent, width]`` by the name of the source; of EVEN or WIDER."""
    names = {8: ("chat", "base"), 12: ("new", "base", "chat")}[values.shape[1]]
    return dict(zip(names, np.split(values, len(names), axis=1), strict=True))


@pytest.mark.parametrize(
    ("sources", "writes", "optimizer"),
    [(EVEN, None, "Adam"), *((WIDER, BOTH, name) for name in OPTIMIZERS)],
    ids=["same sources", *(f"wider, {name}" for name in OPTIMIZERS)],
)
def test_a_frozen_start_is_held_bit_for_bit_whatever_its_groups_share(sources, writes, optimizer):
    start, old = dataclasses.replace(START, is_frozen=True), grouped(*groups_of(None))
    config, state = begun(start, sources, 16, old, groups=groups_of(writes), optimizer=OPTIMIZERS[optimizer])
    begins = weights(state)
    new, old = weights(trained(config, state)), arrays(old)
    # Two latents of each quarter were saved; they come first in quarters of four.
    places = np.flatnonzero(np.arange(16) % 4 < 2)
    for name in BOTH:
        for tensor, of_latent in (("w_dec", lambda values: values), ("w_enc", np.transpose)):
            now, then = (in_sources(of_latent(each[tensor]))[name] for each in (new, old))
            np.testing.assert_array_equal(now[places], then, err_msg=f"{tensor} of {name}")
    np.testing.assert_array_equal(new["b_enc"][places], old["b_enc"])
    decoders = in_sources(new["w_dec"])
    # Latents that are new have learned, and their groups hold for them, too.
    np.testing.assert_array_equal(decoders["base"][2:4], decoders["chat"][2:4])
    norms = [np.linalg.norm(decoders[name][6:8], axis=1) for name in BOTH]
    np.testing.assert_allclose(*norms, rtol=1e-6)
    assert np.abs(new["w_dec"] - begins["w_dec"])[np.arange(16) % 4 >= 2].max() > 1e-3


def test_learned_thresholds_of_a_frozen_start_are_held():
    rule = {"sparsity": cc.JumpReLU(), "l0": cc.L0Penalty(1.0, target=3), "aux_k": None}
    old = random_crosscoder(num_latents=8, sources=SAVED, sparsity=cc.JumpReLU())
    config, state = begun(dataclasses.replace(START, is_frozen=True), crosscoder=old, **rule)
    before = np.asarray(state.crosscoder().latent_threshold[...])
    after = np.asarray(trained(config, state).crosscoder().latent_threshold[...])
    np.testing.assert_array_equal(after[:8], old.latent_threshold[...])
    assert (after[8:] != before[8:]).any()


@pytest.mark.parametrize("tie", ["is_tied", "is_norm_tied"])
def test_what_was_tied_can_be_untied_for_a_new_source(tie):
    old = grouped(LatentGroup("shared", 0.5, **{tie: True}))
    _, state = begun(sources=WIDER, num_latents=8, crosscoder=old, groups=(LatentGroup("shared", 0.5),))
    decoders = in_sources(weights(state)["w_dec"])
    for name, values in in_sources(np.asarray(old.w_dec[...])).items():
        np.testing.assert_array_equal(decoders[name], values)
    assert not decoders["new"].any()


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (
            {"is_tied": True},
            {"is_tied": True},
            r"group 'shared' has is_tied=True and writes \('new', 'base', 'chat'\), but in the saved "
            r"crosscoder it writes \('chat', 'base'\): .* Restrict it to writes=\('chat', 'base'\), or",
        ),
        ({"is_norm_tied": True}, {"is_norm_tied": True}, "group 'shared' has is_norm_tied=True and writes"),
        ({}, {"is_tied": True, "writes": BOTH}, "'shared' has is_tied=True and had not in the saved"),
        (
            {},
            {"is_norm_tied": True, "writes": BOTH},
            "'shared' has is_norm_tied=True and had not in the saved",
        ),
        (
            {"is_norm_tied": True},
            {"is_tied": True, "writes": BOTH},
            "has is_tied=True and had not in the saved crosscoder, whose decoders it would change: set is",
        ),
        (
            {},
            {"writes": ("chat",)},
            r"'shared' writes \('chat',\), but .* it writes \('chat', 'base'\): weights",
        ),
        ({}, {"reads": ("new",)}, r"would be lost. Give it reads=\('chat', 'base'\), or more"),
    ],
)
def test_groups_that_would_change_saved_weights_are_refused(before, now, message):
    old = grouped(LatentGroup("shared", 0.5, **before))
    with pytest.raises(ValueError, match=message):
        begun(sources=WIDER, crosscoder=old, groups=(LatentGroup("shared", 0.5, **now),))


def test_groups_are_those_of_what_the_sources_are_here():
    old = grouped(LatentGroup("chat", 0.5, writes=("chat",)))
    sources = cc.Sources((cc.Source("base", 4), cc.Source("tuned", 4)))
    start = dataclasses.replace(START, sources=("tuned", "base"))
    _, state = begun(start, sources, 8, old, groups=(LatentGroup("chat", 0.5, writes=("tuned",)),))
    np.testing.assert_array_equal(weights(state)["w_dec"][:, 4:], np.asarray(old.w_dec[...])[:, :4])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_decoders_of_groups_stay_bit_for_bit(optimizer):
    config = recipe(sources=EVEN, groups=groups_of(None), frozen=("w_dec",), optimizer=OPTIMIZERS[optimizer])
    state = cc.init_state(config)
    # Norms that are equal but for their last bits, as training leaves them.
    crosscoder = state.crosscoder()
    crosscoder.w_dec[...] = grouped(*groups_of(None), num_latents=16).w_dec[...]
    state = dataclasses.replace(state, params=nnx.state(crosscoder, nnx.Param))
    before, after = weights(state), weights(trained(config, state))
    assert before["w_dec"].tobytes() == after["w_dec"].tobytes()
    assert (before["w_enc"] != after["w_enc"]).any()


@pytest.mark.parametrize("frozen", [("w_enc", "b_enc"), ("w_dec",), ()], ids=str)
def test_frozen_weights_stay_as_they_begin(frozen):
    config = recipe(frozen=frozen)
    state = cc.init_state(config)
    before, after = weights(state), weights(trained(config, state))
    moved = {name for name in ("w_enc", "b_enc", "w_dec", "b_dec") if (before[name] != after[name]).any()}
    assert moved == {"w_enc", "b_enc", "w_dec", "b_dec"} - set(frozen)


@pytest.mark.parametrize("shape", [(2, 4), (1, 8)], ids=str)
def test_on_a_mesh_it_begins_and_learns_as_on_one_device(shape):
    start = dataclasses.replace(START, is_frozen=True)
    config, alone = begun(start=start)
    mesh = make_mesh(*shape)
    with jax.set_mesh(mesh):
        empty = cc.init_state(
            config, mean=np.full(12, 9.0), scale=np.full(3, 2.0), shardings=Shardings.for_mesh(mesh)
        )
        state = begin_with(empty, Published.of(saved()), start)
        for name, value in weights(alone).items():
            np.testing.assert_array_equal(weights(state)[name], value, err_msg=name)
        batch = np.random.default_rng(0).normal(size=(BATCH, 12)).astype(np.float32)
        state, _ = cc.train_step(state, put_batch(batch, mesh), config=config)
    for name, value in weights(trained(config, alone, steps=1)).items():
        # One step of Adam, at the first step of three of the warm-up to 0.01.
        np.testing.assert_allclose(weights(state)[name], value, rtol=0, atol=1e-5, err_msg=name)


def test_a_run_that_began_with_another_goes_on_as_if_never_stopped(tmp_path):
    store = write_store(tmp_path / "store", num_tokens=600)
    first = fit(recipe(num_latents=8), store, tmp_path / "first")
    folder = str(tmp_path / "first" / "crosscoder")
    config = recipe(num_latents=16, start=cc.WarmStart(folder, is_frozen=True))
    whole = fit(config, store, tmp_path / "whole", options=RunOptions(checkpoint_every=10))
    np.testing.assert_array_equal(whole.w_dec[:8], first.w_dec[...])

    class Stop(Exception):
        pass

    def stop(done, total, unit):
        if done == 15:
            raise Stop

    options = RunOptions(checkpoint_every=10)
    with pytest.raises(Stop):
        fit(config, store, tmp_path / "run", options=options, progress=stop)
    again = fit(config, store, tmp_path / "run", options=options)
    np.testing.assert_array_equal(again.w_dec[...], whole.w_dec[...])
    np.testing.assert_array_equal(again.w_enc[...], whole.w_enc[...])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sources": two_sources(3, 5), "num_latents": 4},
            "has 8 latents in the group 'free' and the run 4 of 4",
        ),
        (
            {"sources": cc.Sources((cc.Source("chat", 5),))},
            r"reads 'base', but the run reads \('chat',\): say",
        ),
        (
            {"sources": two_sources(4, 5)},
            "source 'base' has width 3 in the saved crosscoder and 4 in the run",
        ),
        (
            {"start": cc.WarmStart("x", ("chat",))},
            r"sources=\('chat',\) of the warm start must be one for each",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        begun(**changes)


def test_a_missing_start_is_refused_and_leaves_the_folder_to_others(tmp_path):
    store = write_store(tmp_path / "store", num_tokens=600)
    with pytest.raises(ValueError, match="holds no saved crosscoder"):
        fit(recipe(start=cc.WarmStart(str(tmp_path / "nothing"))), store, tmp_path / "run")
    assert fit(recipe(), store, tmp_path / "run")


def test_resampling_does_not_go_with_what_is_frozen():
    with pytest.raises(ValueError, match="resampling would move weights that are frozen"):
        recipe(
            sparsity=cc.ReLU(),
            l1=cc.L1OfNorms(0.1),
            aux_k=None,
            frozen=("w_dec",),
            resampling=cc.Resampling(every_steps=1),
        )
