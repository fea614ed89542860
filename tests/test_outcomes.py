"""How outcomes are counted on dictionaries that are known, and a small run of the experiment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.outcomes import outcomes
from experiments.outcomes.worlds import FREQUENT, NARROW, RARE, drifted
from experiments.planted.trial import Measured
from experiments.planted.world import CHAT_ONLY, plant


def planted(world):
    """The crosscoder that was planted: one latent a feature, in the features' order."""
    truth = plant(world, jax.random.key(0))
    w_dec = np.concatenate([np.asarray(truth.base[0]), np.asarray(truth.chat)], axis=1)
    num = len(w_dec)
    nothing = np.zeros(num)
    measured = Measured(1.0, 2.0, np.full(num, 10), w_dec, nothing, nothing, np.ones(num, bool))
    return measured, truth


def test_every_feature_of_the_planted_dictionary_is_rightly_classed():
    measured, truth = planted(FREQUENT)
    assert outcomes._num_rightly_classed(measured, truth, FREQUENT) == 24
    # Latents that never fire are of no class, and a chat-only latent with a base decoder is shared.
    fired = measured.fired.copy()
    fired[:3] = 0
    assert outcomes._num_rightly_classed(measured._replace(fired=fired), truth, FREQUENT) == 21


def test_the_mean_delta_norm_is_that_of_the_latents_that_stand_for_the_features():
    measured, truth = planted(RARE)
    assert outcomes._mean_delta_norm(measured, truth, RARE) == 1.0
    w_dec = measured.w_dec.copy()
    chat_only = np.asarray(truth.kind) == CHAT_ONLY
    # A base decoder half as long as the chat decoder: (1 + (1 - 1/2) / 1) / 2.
    w_dec[chat_only, :32] = w_dec[chat_only, 32:] / 2
    found = outcomes._mean_delta_norm(measured._replace(w_dec=w_dec), truth, RARE)
    assert found == pytest.approx(0.75, abs=1e-6)


def test_the_density_ratio_pools_the_latents_of_all_seeds():
    measured, truth = planted(FREQUENT)
    is_exclusive = np.asarray(truth.kind) > 4
    one = measured._replace(fired=np.where(is_exclusive, 30, 10))
    two = measured._replace(fired=np.where(is_exclusive, 10, 10))
    assert outcomes._density_ratio([one, two], FREQUENT) == pytest.approx(2.0)
    none = measured._replace(fired=np.where(is_exclusive, 0, 10))
    assert np.isnan(outcomes._density_ratio([none], FREQUENT))


def test_drift_turns_shared_features_and_gain_makes_chat_louder():
    truth = plant(drifted(30.0, 2.0), jax.random.key(0))
    base, chat = np.asarray(truth.base[0])[:6], np.asarray(truth.chat)[:6]
    np.testing.assert_allclose(np.linalg.norm(chat, axis=1), 2.0, rtol=1e-5)
    cosines = (base * chat).sum(axis=1) / 2
    np.testing.assert_allclose(cosines, np.cos(np.pi / 6), rtol=1e-5)
    # A change of drift or gain alone keeps the features: the settings differ in nothing else.
    again = plant(drifted(0.0, 1.0), jax.random.key(0))
    np.testing.assert_allclose(again.chat, np.asarray(truth.chat) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("outcome", "num_lines", "finds"),
    [(outcomes.frequent_exclusives, 1, "of 24 in 1 seeds"), (outcomes.narrow_change, 1, "difference SAE 0.")],
)
def test_a_small_run_gives_a_line_of_the_table(outcome, num_lines, finds, monkeypatch):
    monkeypatch.setattr(outcomes, "NUM_TOKENS", 100 * 512)
    found = outcome(range(1))
    assert len(found) == num_lines
    assert finds in found[0].found


def test_narrow_changes_are_rare_beside_what_is_shared():
    truth = plant(NARROW, jax.random.key(0))
    frequency = np.asarray(truth.frequency)
    np.testing.assert_allclose(frequency[:200], (10 - 8 * 0.005) / 200, rtol=1e-5)
    np.testing.assert_allclose(frequency[200:], 0.005, rtol=1e-5)
    assert jnp.sum(truth.kind == CHAT_ONLY) == 4
