"""Groups of latents: where they lie, what they read, write and share, through training and files."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_cases import MESHES, NO_MESH
from training_cases import activations, recipe, weights, write_store

import crosscoder_jax as cc
from crosscoder_jax.activations import Split, TokenView
from crosscoder_jax.activations.batches import sequential_batches
from crosscoder_jax.configs import config_from_json, config_to_json
from crosscoder_jax.diffing import diff_run
from crosscoder_jax.groups import LatentGroup, Layout, causal_groups, exclusive_groups
from crosscoder_jax.sharding import Shardings, make_mesh
from crosscoder_jax.training.evaluate import calibrate
from crosscoder_jax.training.loop import RunOptions, fit, put_batch
from crosscoder_jax.training.resampling import resample

SOURCES = cc.Sources((cc.Source("base", 6), cc.Source("chat", 6)))
TIED = LatentGroup("shared", 0.5, is_tied=True, cost=0.25)
GROUPS = (TIED, *exclusive_groups(SOURCES, 0.125, is_encoder_masked=True))
"""Of 16 latents: 8 tied, 2 of base, 2 of chat, 4 free."""
SHARED, BASE, CHAT = slice(0, 8), slice(8, 10), slice(10, 12)
BATCH = 32


def make(groups=GROUPS, **changes):
    return recipe(sources=SOURCES, groups=groups, **changes)


@functools.cache
def trained(steps, **changes):
    config = make(num_steps=steps, **changes)
    state = cc.init_state(config)
    for batch in activations(BATCH * steps, (6, 6)).reshape(steps, BATCH, -1):
        state, _ = cc.train_step(state, jnp.asarray(batch), config=config)
    return state


def assert_groups_hold(crosscoder):
    w_enc, w_dec = np.asarray(crosscoder.w_enc[...]), np.asarray(crosscoder.w_dec[...])
    np.testing.assert_array_equal(w_dec[SHARED, :6], w_dec[SHARED, 6:])
    for own, other, latents in ((slice(0, 6), slice(6, 12), BASE), (slice(6, 12), slice(0, 6), CHAT)):
        assert not w_dec[latents, other].any()
        assert not w_enc[other, latents].any()
        assert w_dec[latents, own].any()
        assert w_enc[own, latents].any()
    assert np.abs(w_dec[12:, :6] - w_dec[12:, 6:]).max() > 0.01  # the free latents are free


def test_groups_lie_one_after_the_other_and_the_free_latents_last():
    layout = Layout(GROUPS, SOURCES, 16)
    assert layout.sizes == (8, 2, 2)
    assert layout.names() == ["shared"] * 8 + ["base-dedicated"] * 2 + ["chat-dedicated"] * 2 + ["free"] * 4
    np.testing.assert_array_equal(layout.costs(NO_MESH), [0.25] * 8 + [1.0] * 8)


def test_shares_that_do_not_divide_the_latents_leave_none_over():
    thirds = tuple(LatentGroup(name, 1 / 3) for name in "abc")
    # The ends are round(16 / 3), round(32 / 3) and 16.
    assert Layout(thirds, SOURCES, 16).sizes == (5, 6, 5)


def test_constraining_is_the_orthogonal_projection():
    layout = Layout(GROUPS, SOURCES, 16)
    values = np.random.default_rng(0).normal(size=(16, 12)).astype(np.float32)
    once = layout.constrain_decoder(jnp.asarray(values), NO_MESH)
    np.testing.assert_array_equal(layout.constrain_decoder(once, NO_MESH), once)
    expected = values.copy()
    expected[SHARED, :6] = expected[SHARED, 6:] = (values[SHARED, :6] + values[SHARED, 6:]) / 2
    expected[BASE, 6:] = expected[CHAT, :6] = 0
    np.testing.assert_array_equal(once, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"aux_k": cc.AuxK(0.5, k_aux=4, dead_after_tokens=BATCH), "sparsity": cc.BatchTopK(k=0.25)},
        {"sparsity": cc.ReLU(), "l1": cc.L1OfNorms(0.05), "aux_k": None},
        {"sparsity": cc.JumpReLU(), "l0": cc.L0Penalty(0.1, target=3), "aux_k": None},
        {"matryoshka": cc.Matryoshka((0.25, 1.0))},
        # Its factors of the columns are not the same in both sources.
        {"optimizer": cc.Adam(second_moment="factored")},
        {"optimizer": cc.Adam(first_moment="bfloat16")},
        {"optimizer": cc.Muon(first_moment="bfloat16")},
    ],
    ids=["BatchTopK", "AuxK", "L1", "JumpReLU", "Matryoshka", "factored", "bfloat16 moment", "Muon"],
)
def test_groups_hold_exactly_under_the_optimiser(changes):
    assert_groups_hold(trained(30, **changes).crosscoder())


@pytest.mark.parametrize(
    "optimizer", [cc.Adam(second_moment="factored"), cc.Muon()], ids=["factored", "Muon"]
)
def test_groups_hold_where_moments_are_spread(optimizer):
    config, mesh = make(optimizer=optimizer), make_mesh(2, 4)
    with jax.set_mesh(mesh):
        state = cc.init_state(config, shardings=Shardings.for_mesh(mesh, is_optimizer_spread=True))
        for batch in activations(BATCH * 10, (6, 6)).reshape(10, BATCH, -1):
            state, _ = cc.train_step(state, put_batch(batch, mesh), config=config)
    assert_groups_hold(state.crosscoder())


@pytest.mark.parametrize(
    "optimizer", [cc.Adam(), cc.Adam(second_moment="factored")], ids=["Adam", "factored"]
)
def test_after_a_thousand_steps_and_a_stop_groups_hold_in_memory_and_in_files(optimizer, tmp_path):
    store = write_store(tmp_path / "store", widths=(6, 6), num_tokens=1500)
    config = make(optimizer=optimizer, num_steps=1000)
    run = functools.partial(fit, config, store, tmp_path / "run", options=RunOptions(checkpoint_every=500))

    class Stop(Exception):
        pass

    def stop(done, total, unit):
        if done == 510:
            raise Stop

    with pytest.raises(Stop):
        run(progress=stop)
    crosscoder = run()
    exported = cc.load(cc.save(crosscoder, tmp_path / "exported"))
    for each in (crosscoder, cc.load(tmp_path / "run" / "crosscoder"), exported):
        assert_groups_hold(each)
    folder = cc.save(cc.fold_normalization(crosscoder), tmp_path / "other", format="dictionary_learning")
    for own, other in ((BASE, slice(6, 12)), (CHAT, slice(0, 6))):
        loaded = cc.load(folder)
        assert not np.asarray(loaded.w_dec[...])[own, other].any()
        assert not np.asarray(loaded.w_enc[...])[other, own].any()


def test_groups_hold_where_dead_latents_begin_again():
    law = cc.Resampling(every_steps=1)
    config = make(sparsity=cc.ReLU(), l1=cc.L1OfNorms(0.05), aux_k=None, resampling=law)
    batch = jnp.asarray(activations(BATCH, (6, 6)))
    state = cc.init_state(config)
    dead = jax.tree.map(jnp.copy, state)
    dead = type(state)(**{**vars(dead), "tokens_since_fired": jnp.full(16, 10_000, jnp.int32)})
    begun = resample(dead, batch, law)
    assert (
        np.abs(weights(begun)["w_dec"] - weights(state)["w_dec"]).min(
            where=weights(state)["w_dec"] != 0, initial=1
        )
        > 0
    )
    w_dec = weights(begun)["w_dec"]
    np.testing.assert_array_equal(w_dec[SHARED, :6], w_dec[SHARED, 6:])
    assert not w_dec[BASE, 6:].any()
    assert not w_dec[CHAT, :6].any()


def test_groups_hold_when_a_run_is_stopped_and_goes_on_and_in_its_files(tmp_path):
    store = write_store(tmp_path / "store", widths=(6, 6), num_tokens=600)
    whole = fit(make(), store, tmp_path / "whole", options=RunOptions(checkpoint_every=10))
    assert_groups_hold(whole)

    class Stop(Exception):
        pass

    def stop(done, total, unit):
        if done == 15:
            raise Stop

    with pytest.raises(Stop):
        fit(make(), store, tmp_path / "run", options=RunOptions(checkpoint_every=10), progress=stop)
    again = fit(make(), store, tmp_path / "run", options=RunOptions(checkpoint_every=10))
    np.testing.assert_array_equal(again.w_dec[...], whole.w_dec[...])
    loaded = cc.load(tmp_path / "run" / "crosscoder")
    assert loaded.config == whole.config
    assert_groups_hold(loaded)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_on_a_mesh_groups_hold_and_the_steps_are_those_of_one_device(shape):
    steps, mesh = 5, make_mesh(*shape)
    config = make(num_steps=steps)
    alone = cc.init_state(config)
    with jax.set_mesh(mesh):
        state = cc.init_state(config, shardings=Shardings.for_mesh(mesh))
        for batch in activations(BATCH * steps, (6, 6)).reshape(steps, BATCH, -1):
            state, _ = cc.train_step(state, put_batch(batch, mesh), config=config)
            alone, _ = cc.train_step(alone, jnp.asarray(batch), config=config)
    for name, value in weights(alone).items():
        # Sums over shards are taken in another order; five steps of Adam at a rate of 0.01 carry it on.
        np.testing.assert_allclose(weights(state)[name], value, rtol=0, atol=1e-5, err_msg=name)
    w_dec = weights(state)["w_dec"]
    np.testing.assert_array_equal(w_dec[SHARED, :6], w_dec[SHARED, 6:])
    assert not w_dec[BASE, 6:].any()


def test_a_cheap_group_wins_rankings_and_pays_less_l1():
    crosscoder = trained(30).crosscoder()
    norms = np.asarray(crosscoder.decoder_norms()).sum(axis=0)
    costs = np.array([0.25] * 8 + [1.0] * 8)
    np.testing.assert_allclose(crosscoder.score_weights(), norms / costs, rtol=1e-6)
    np.testing.assert_allclose(crosscoder.penalty_weights(), norms * costs, rtol=1e-6)


def test_the_l1_penalty_of_a_step_is_that_of_the_costs():
    config = make(sparsity=cc.ReLU(), l1=cc.L1OfNorms(0.5), aux_k=None, num_steps=1, warmup_steps=0)
    state = cc.init_state(config)
    crosscoder = state.crosscoder()
    batch = jnp.asarray(activations(BATCH, (6, 6)))
    code = np.asarray(jax.nn.relu(crosscoder.pre_acts(crosscoder.normalize(batch))), np.float64)
    weights_of = np.asarray(crosscoder.decoder_norms(), np.float64).sum(axis=0) * ([0.25] * 8 + [1.0] * 8)
    expected = 0.5 * (code * weights_of).sum() / BATCH
    _, metrics = cc.train_step(state, batch, config=config)
    np.testing.assert_allclose(metrics["loss/l1"], expected, rtol=1e-5)


def test_weights_folded_for_raw_activations_are_the_same_function():
    state = trained(30)
    crosscoder = state.crosscoder()
    crosscoder.scale[...] = jnp.array([0.5, 2.0])
    crosscoder.mean[...] = jnp.arange(12.0) / 10
    folded = cc.fold_normalization(crosscoder)
    acts = jnp.asarray(activations(64, (6, 6), seed=5))
    np.testing.assert_array_equal(folded.encode(acts) > 0, crosscoder.encode(acts) > 0)
    np.testing.assert_allclose(folded(acts), crosscoder(acts), rtol=1e-4, atol=1e-4)
    assert [(group.is_tied, group.cost) for group in folded.config.groups] == [(False, 1.0)] * 3
    assert not np.asarray(folded.w_dec[...])[BASE, 6:].any()


def test_costs_are_not_lost_on_the_way_to_a_format_that_has_none(tmp_path):
    crosscoder = trained(30).crosscoder()
    with pytest.raises(ValueError, match=r"group 'shared' has cost=0\.25, which no other format keeps: save"):
        cc.save(crosscoder, tmp_path / "file", format="dictionary_learning")
    assert cc.save(cc.fold_normalization(crosscoder), tmp_path / "folded", format="dictionary_learning")


# Budgets: groups whose latents are ranked among themselves.

CHANGED = (LatentGroup("shared", 0.5), LatentGroup("chat", 0.25, writes=("chat",), k=0.5))
"""Of 16 latents: 8 shared and the 4 free in one budget, 4 of chat in the other."""
OWN = slice(8, 12)
COMMON = np.r_[0:8, 12:16]


K2 = cc.BatchTopK(k=2)


def budgeted(sparsity: Any = K2, groups=CHANGED, **changes):
    return recipe(sources=SOURCES, groups=groups, sparsity=sparsity, **changes)


def pre_acts(seed=0, batch=BATCH):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, 16)), jnp.float32)


@pytest.mark.parametrize("common", [cc.BatchTopK(k=2), cc.TopK(k=2)], ids=str)
def test_each_budget_keeps_what_it_would_keep_alone(common):
    own_k = 0.5 if isinstance(common, cc.BatchTopK) else 1
    groups = (CHANGED[0], LatentGroup("chat", 0.25, writes=("chat",), k=own_k))
    crosscoder = cc.init_state(budgeted(sparsity=common, groups=groups)).crosscoder()
    pre, score_weights = pre_acts(), crosscoder.score_weights()
    code, smallest = crosscoder.training_code(pre)
    for number, (latents, rule) in enumerate([(COMMON, common), (np.r_[OWN], type(common)(own_k))]):
        alone = rule(pre[:, latents], score_weights[latents])
        np.testing.assert_array_equal(code[:, latents], alone.code)
        np.testing.assert_array_equal(smallest[number], alone.smallest_score)


def test_each_budget_has_its_own_threshold_and_l0():
    config = budgeted(num_steps=40)
    state = cc.init_state(config)
    for batch in activations(BATCH * 40, (6, 6)).reshape(40, BATCH, -1):
        state, metrics = cc.train_step(state, jnp.asarray(batch), config=config)
    assert {"threshold/free", "threshold/chat"} <= set(metrics)
    np.testing.assert_allclose(metrics["l0"], 2.5, atol=1 / BATCH)
    crosscoder = state.crosscoder()
    pre, thresholds = pre_acts(1), crosscoder.threshold[...]
    scores = np.maximum(pre, 0) * np.asarray(crosscoder.score_weights())
    cuts = np.repeat([float(thresholds[0]), float(thresholds[1]), float(thresholds[0])], [8, 4, 4])
    np.testing.assert_array_equal(np.asarray(crosscoder.inference_code(pre)) > 0, scores > cuts)
    assert thresholds[0] != thresholds[1]


def test_calibration_brings_each_budget_to_its_k(tmp_path):
    store = write_store(tmp_path / "store", widths=(6, 6))
    view = TokenView.of_split(store, Split(), held_out=True)
    calibrated = calibrate(cc.init_state(budgeted()).crosscoder(), view)
    acts = np.concatenate([batch.acts[batch.is_valid] for batch in sequential_batches(view, 64)])
    active = np.asarray(calibrated.encode(jnp.asarray(acts, jnp.float32))) > 0
    # Cuts are between scores: one token more or less of the view.
    np.testing.assert_allclose(active[:, COMMON].sum(axis=1).mean(), 2, atol=2 / len(acts) + 2e-3)
    np.testing.assert_allclose(active[:, OWN].sum(axis=1).mean(), 0.5, atol=2 / len(acts) + 5e-4)


def test_groups_can_have_every_latent_in_a_budget_of_its_own():
    groups = (LatentGroup("a", 0.5, k=1), LatentGroup("b", 0.5, k=3))
    crosscoder = cc.init_state(budgeted(groups=groups)).crosscoder()
    assert crosscoder.config.threshold_names == ("a", "b")
    active = np.asarray(crosscoder.training_code(pre_acts()).code) > 0
    assert [active[:, :8].sum(), active[:, 8:].sum()] == [BATCH, 3 * BATCH]


def test_annealing_is_in_proportion_in_every_budget():
    rule = cc.BatchTopK(k=2, initial_k=8, anneal_steps=10).with_k(0.5)
    assert [float(rule.k_at(step)) for step in (0, 5, 10)] == [2.0, 1.25, 0.5]


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_budgets_on_a_mesh_select_as_one_device_does(shape):
    config, mesh = budgeted(), make_mesh(*shape)
    alone = cc.init_state(config)
    expected = alone.crosscoder().training_code(pre_acts())
    with jax.set_mesh(mesh):
        shardings = Shardings.for_mesh(mesh)
        crosscoder = cc.init_state(config, shardings=shardings).crosscoder()
        found = jax.jit(lambda c, p: c.training_code(p))(
            crosscoder, jax.device_put(pre_acts(), shardings.code_bl)
        )
    np.testing.assert_array_equal(np.asarray(found.code) > 0, np.asarray(expected.code) > 0)
    np.testing.assert_allclose(found.smallest_score, expected.smallest_score, rtol=1e-6)


def test_budgets_survive_files_and_folding_and_are_refused_by_formats_without(tmp_path):
    crosscoder = trained(30, groups=CHANGED, sparsity=cc.BatchTopK(k=2)).crosscoder()
    loaded = cc.load(cc.save(crosscoder, tmp_path / "own"))
    acts = jnp.asarray(activations(64, (6, 6), seed=5))
    np.testing.assert_array_equal(loaded.encode(acts), crosscoder.encode(acts))
    folded = cc.fold_normalization(crosscoder)
    np.testing.assert_array_equal(folded.encode(acts) > 0, crosscoder.encode(acts) > 0)
    with pytest.raises(ValueError, match=r"group 'chat' has k=0\.5 and a threshold of its own"):
        cc.save(crosscoder, tmp_path / "other", format="dictionary_learning")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": cc.ReLU()}, r"k=0\.5 of group 'chat' with sparsity=ReLU\(\), which has no k"),
        ({"code_norm": cc.Decoupled()}, r"k=0\.5 of group 'chat' with code_norm=Decoupled\(\)"),
        ({"sparsity": cc.TopK(k=2)}, r"k=0\.5 must be whole for TopK"),
    ],
)
def test_a_k_that_the_sparsity_cannot_keep_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        cc.CrosscoderConfig(SOURCES, 16, groups=CHANGED, **({"sparsity": cc.BatchTopK(k=2)} | changes))


# Tied norms.


def test_tied_norms_are_equal_and_directions_free_under_the_optimiser():
    groups = (LatentGroup("loud", 0.5, is_norm_tied=True),)
    decoders = np.asarray(trained(30, groups=groups).crosscoder().w_dec[...])
    norms = np.linalg.norm(decoders.reshape(16, 2, 6), axis=2)
    np.testing.assert_allclose(norms[:8, 0], norms[:8, 1], rtol=1e-6)
    assert np.abs(norms[8:, 0] / norms[8:, 1] - 1).max() > 0.01
    assert np.abs(decoders[:8, :6] - decoders[:8, 6:]).max() > 0.01


def test_tying_norms_keeps_directions_and_the_root_mean_square():
    layout = Layout((LatentGroup("loud", 0.5, is_norm_tied=True),), SOURCES, 4)
    values = np.zeros((4, 12), np.float32)
    values[0, 0], values[0, 6] = 1.0, 7.0  # norms 1 and 7: their root mean square is 5
    values[1, 0] = 2.0  # no direction in chat: nothing there to scale
    values[2] = values[0]  # of no group
    expected = values.copy()
    expected[0, 0] = expected[0, 6] = 5.0
    expected[1, 0] = np.sqrt(2.0)
    np.testing.assert_allclose(layout.equalise_norms(jnp.asarray(values), NO_MESH), expected, rtol=1e-6)


# Causality: three layers of one model, and what two of them put out.

LAYERS = tuple(f"L{i}" for i in range(3))
RESIDUALS = cc.Sources(tuple(cc.Source(name, 4) for name in LAYERS))
OUTPUTS = cc.Sources((*RESIDUALS.entries, cc.Source("mlp1", 4), cc.Source("mlp2", 4)))
WEAK = causal_groups([(name, LAYERS[i:]) for i, name in enumerate(LAYERS)])
STRICT = causal_groups([("L0", ["mlp1", "mlp2"]), ("L1", ["mlp2"])])


@pytest.mark.parametrize(
    ("sources", "groups", "influences"),
    [
        # A source reaches itself and those after it.
        (RESIDUALS, WEAK, np.triu(np.ones((3, 3), bool))),
        # Residual streams are only read and outputs only written, each from the layers before it.
        (OUTPUTS, STRICT, np.array([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1], *[[0] * 5] * 3], bool)),
    ],
    ids=["weakly causal", "cross-layer transcoder"],
)
def test_a_causal_crosscoder_cannot_read_what_it_predicts(sources, groups, influences):
    config = recipe(sources=sources, groups=groups, num_latents=24, sparsity=cc.TopK(k=24), num_steps=10)
    state = cc.init_state(config)
    rng = np.random.default_rng(0)
    for batch in rng.normal(size=(10, BATCH, sources.width)).astype(np.float32):
        state, _ = cc.train_step(state, jnp.asarray(batch), config=config)
    crosscoder = state.crosscoder()
    acts = jnp.asarray(rng.normal(size=sources.width), jnp.float32)
    jacobian = np.asarray(jax.jacobian(lambda x: crosscoder(x[None])[0])(acts))  # [written, read]
    blocks = [[np.abs(jacobian[w, r]).max() for w in sources.slices()] for r in sources.slices()]
    np.testing.assert_array_equal(np.array(blocks) > 0, influences)


def test_the_diff_tells_groups_and_what_is_exclusive_by_design(tmp_path):
    store = write_store(tmp_path / "store", widths=(6, 6))
    crosscoder = trained(30).crosscoder()
    result = diff_run(crosscoder, TokenView.of_split(store, Split(), held_out=True))
    assert result.columns["group"].tolist() == crosscoder.config.layout.names()
    np.testing.assert_array_equal(np.flatnonzero(result.columns["by_design"]), range(8, 12))
    live = result.columns["latent_class"] != "dead"
    assert result.summary["claimed_by_design"] == live[8:12].sum() > 0
    plain = diff_run(
        cc.init_state(recipe(sources=SOURCES)).crosscoder(), TokenView.of_split(store, Split(), held_out=True)
    )
    assert "group" not in plain.columns
    assert "claimed_by_design" not in plain.summary


def test_a_config_with_groups_survives_its_file():
    config = make()
    assert config_from_json(cc.TrainConfig, config_to_json(config), where="here") == config


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((LatentGroup("a", 0.6), LatentGroup("b", 0.5)), "shares of 1.1 together, more than all latents"),
        ((LatentGroup("a", 0.1), LatentGroup("a", 0.1)), r"group names \['a', 'a'\] must differ"),
        ((LatentGroup("a", 0.01),), "share=0.01 of num_latents=16 leaves group 'a' without a latent"),
        ((LatentGroup("a", 0.5, reads=("cat",)),), "group 'a' names the source 'cat', but there is"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        cc.CrosscoderConfig(SOURCES, 16, groups=groups)


def test_one_decoder_needs_one_width():
    sources = cc.Sources((cc.Source("base", 6), cc.Source("chat", 5)))
    with pytest.raises(ValueError, match=r"group 'shared' is tied over sources of the widths \[5, 6\]"):
        cc.CrosscoderConfig(sources, 16, groups=(TIED,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, r"name='' of a group must not be empty"),
        ({"name": "free"}, "name='free' of a group must not be empty, nor that of latents of none"),
        ({"share": 0.0}, "share=0.0 of group 'a'"),
        ({"cost": 0.0}, "cost=0.0 of group 'a' must be positive and finite"),
        ({"writes": ()}, r"writes=\(\) of group 'a' must name at least one source"),
        ({"reads": ("x", "x")}, "and none twice"),
        ({"k": 0.0}, "k=0.0 of group 'a' must be positive and finite"),
        (
            {"is_tied": True, "is_norm_tied": True},
            "is_norm_tied=True of group 'a' says nothing",
        ),
    ],
)
def test_impossible_groups_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LatentGroup(**({"name": "a", "share": 0.5} | changes))
