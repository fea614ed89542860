"""Every method that plugs into the one crosscoder keeps the one contract: mesh, resume, files, thresholds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import activations, recipe, weights, write_store

import crosscoder_jax as cc
from crosscoder_jax.activations import Split, TokenView
from crosscoder_jax.groups import LatentGroup, causal_groups, exclusive_groups
from crosscoder_jax.publishing import Published, tensors_of
from crosscoder_jax.sharding import Shardings, make_mesh
from crosscoder_jax.training.evaluate import calibrate, evaluate
from crosscoder_jax.training.loop import RunOptions, fit, put_batch
from crosscoder_jax.training.warm_start import begin_with

BATCH = 32
BASE, CHAT, THIRD = cc.Source("base", 6), cc.Source("chat", 6), cc.Source("third", 5)
STORED = cc.Sources((BASE, CHAT, THIRD))
WIDTHS = tuple(entry.width for entry in STORED)
PAIR = cc.Sources((BASE, CHAT))
DELTA = cc.Sources((BASE, cc.difference(CHAT, BASE)))
DELTA_NAME = DELTA.names[1]
AUX = cc.AuxK(0.5, k_aux=4, dead_after_tokens=1)
"""At work from the first step on, as latents that are silent in a batch are dead."""
START = cc.WarmStart("of saved()")
VARIANTS = {
    "crosscoder": {},
    "nearly all latents dead": {"sparsity": cc.BatchTopK(k=0.5)},
    "difference SAE": {"sources": cc.Sources((cc.difference(CHAT, BASE),))},
    "delta basis": {"sources": DELTA},
    "delta basis, dedicated": {
        "sources": DELTA,
        "groups": exclusive_groups(DELTA, 0.25, k=1.0)[-1:],
        "sparsity": cc.BatchTopK(k=2),
    },
    "parted": {
        "sources": DELTA,
        "groups": (
            LatentGroup("change", 0.25, reads=(DELTA_NAME,), writes=(DELTA_NAME,), k=1.0),
            LatentGroup("shared", 0.75, writes=("base",), k=2.0),
        ),
    },
    "delta loss": {"delta": cc.DeltaLoss(2.0, "base", "chat")},
    "unequal widths and weights": {
        "sources": cc.Sources((BASE, THIRD)),
        "loss": cc.SquaredError((1.0, 3.0)),
    },
    "dedicated": {"groups": exclusive_groups(PAIR, 0.25, is_encoder_masked=True)},
    "tied and cheap": {"groups": (LatentGroup("shared", 0.5, is_tied=True, cost=0.2),)},
    "tied norms": {"groups": (LatentGroup("shared", 0.5, is_norm_tied=True),)},
    "weakly causal": {"groups": causal_groups([("base", ["base", "chat"]), ("chat", ["chat"])])},
    "strictly causal": {
        "sources": STORED,
        "groups": causal_groups([("base", ["chat", "third"]), ("chat", ["third"])]),
    },
    "Matryoshka": {"matryoshka": cc.Matryoshka((0.25, 1.0))},
    "TopK": {"sparsity": cc.TopK(k=3)},
    "TopK, dedicated": {"sparsity": cc.TopK(k=2), "groups": exclusive_groups(PAIR, 0.25, k=1)},
    "JumpReLU": {"sparsity": cc.JumpReLU(), "l0": cc.L0Penalty(0.1, target=3), "aux_k": None},
    "gated": {"sparsity": cc.Gated(), "l1": cc.L1OfNorms(0.05), "aux_k": None},
    "L1": {"sparsity": cc.ReLU(), "l1": cc.L1OfNorms(0.05), "aux_k": None},
    "decoupled codes": {"code_norm": cc.Decoupled()},
    "frozen encoder": {"frozen": ("w_enc", "b_enc")},
    "warm start": {"start": START},
    "frozen warm start, one decoder": {
        "start": dataclasses.replace(START, is_frozen=True),
        "groups": (LatentGroup("shared", 0.5, is_tied=True),),
        "optimizer": cc.Adam(second_moment="factored"),
    },
}


def make(name, folder="nowhere", **changes):
    """The recipe of a variant; if it begins with a saved crosscoder, with that in a folder."""
    config = recipe(**({"sources": PAIR, "num_latents": 16, "aux_k": AUX} | VARIANTS[name] | changes))
    if config.start is None:
        return config
    return dataclasses.replace(config, start=dataclasses.replace(config.start, crosscoder=str(folder)))


def saved(config):
    """What a variant begins with: half as many latents, with the same groups."""
    half = dataclasses.replace(config.crosscoder, num_latents=8)
    return cc.Crosscoder(half, key=jax.random.key(1))


def begun(config, shardings=Shardings()):
    state = cc.init_state(config, shardings=shardings)
    return state if config.start is None else begin_with(state, Published.of(saved(config)), config.start)


def derived(acts, config):
    return config.crosscoder.sources.derive(jnp.asarray(acts), STORED)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("variants") / "store", widths=WIDTHS, num_tokens=600)


@pytest.mark.parametrize("name", VARIANTS)
def test_on_a_mesh_it_takes_the_steps_of_one_device(name):
    # In float64: sums over shards are taken in another order, and Adam makes a step of the rate's size of
    # whatever is left where a gradient cancels, so float32 would need a tolerance that hides mistakes.
    steps, mesh, config = 3, make_mesh(2, 4), make(name, dtype="float64")
    batches = activations(BATCH * steps, WIDTHS).astype(np.float64).reshape(steps, BATCH, -1)
    with jax.enable_x64():
        alone, revived = begun(config), 0.0
        for batch in batches:
            alone, metrics = cc.train_step(alone, derived(batch, config), config=config)
            revived += metrics.get("loss/aux_k", 0.0)
        assert (revived > 0) == (config.aux_k is not None), "AuxK is to be at work"
        with jax.set_mesh(mesh):
            state = begun(config, Shardings.for_mesh(mesh))
            for batch in batches:
                on_mesh = put_batch(np.asarray(derived(batch, config)), mesh)
                state, _ = cc.train_step(state, on_mesh, config=config)
        for weight, value in weights(alone).items():
            np.testing.assert_allclose(weights(state)[weight], value, rtol=0, atol=1e-10, err_msg=weight)
        np.testing.assert_allclose(state.threshold, alone.threshold, rtol=1e-6)  # kept in float32


@pytest.mark.parametrize("name", VARIANTS)
def test_stopped_and_going_on_it_ends_bit_for_bit_and_its_files_hold_it_whole(name, store, tmp_path):
    config, options = make(name, tmp_path / "saved"), RunOptions(checkpoint_every=10)
    if config.start is not None:
        cc.save(saved(config), config.start.crosscoder)
    whole = fit(config, store, tmp_path / "whole", options=options)

    class Stop(Exception):
        pass

    def stop(done, total, unit):
        if done == 15:
            raise Stop

    with pytest.raises(Stop):
        fit(config, store, tmp_path / "run", options=options, progress=stop)
    again = fit(config, store, tmp_path / "run", options=options)
    loaded = cc.load(tmp_path / "run" / "crosscoder")
    assert loaded.config == config.crosscoder
    for other in (again, loaded):
        for tensor, value in tensors_of(whole).items():
            np.testing.assert_array_equal(tensors_of(other)[tensor], value, err_msg=tensor)


@pytest.mark.parametrize("name", VARIANTS)
def test_at_inference_it_has_the_l0_that_it_is_calibrated_to(name, store):
    config = make(name)
    crosscoder = begun(config).crosscoder()
    view = TokenView.of_split(store, Split(), held_out=True)
    sparsity = config.crosscoder.sparsity
    if not isinstance(sparsity, cc.BatchTopK):
        with pytest.raises(ValueError, match="has no threshold to calibrate: "):
            calibrate(crosscoder, view)
        return
    measured = evaluate(calibrate(crosscoder, view), view)
    budgets = config.crosscoder.layout.budgets
    kept = sum(budget.k or sparsity.k for budget in budgets) if budgets else sparsity.k
    # A cut lies between two scores: one token of the view more or less, and a thousandth for each budget.
    tolerance = 2 / view.num_tokens + 2e-3 * kept
    assert measured["l0_inference_rule"] == pytest.approx(kept, abs=tolerance)
