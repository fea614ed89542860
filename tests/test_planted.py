"""The planted worlds, the judgement of claims, and a small run of the experiment."""

import csv
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.planted import trial
from experiments.planted.methods import ABLATIONS, METHODS, ablated, recipe
from experiments.planted.scores import claims, recovery
from experiments.planted.tables import Interval, Row, markdown, update_readme, write_results
from experiments.planted.world import CHAT_ONLY, KINDS, WORLDS, World, plant, sample_jit

WORLD = World(
    width=24,
    num_same=6,
    num_rotated=4,
    num_rescaled=4,
    num_weak=3,
    num_split=3,
    num_exclusive=4,
    mean_l0=3.0,
    noise=0.0,
)
TOKENS = 20_000


@pytest.fixture(scope="module")
def truth():
    return plant(WORLD, jax.random.key(0))


@pytest.fixture(scope="module")
def acts(truth):
    return np.asarray(sample_jit(truth, jax.random.key(1), num_tokens=TOKENS, world=WORLD))


def of_kind(truth, name):
    return np.flatnonzero(np.asarray(truth.kind) == KINDS.index(name))


def cosine(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_each_kind_is_held_by_the_models_as_its_name_says(truth):
    base, chat = np.asarray(truth.base), np.asarray(truth.chat)
    strength = np.linalg.norm(base[0], axis=1), np.linalg.norm(chat, axis=1)
    same, rotated = of_kind(truth, "same"), of_kind(truth, "rotated")
    np.testing.assert_array_equal(base[0][same], chat[same])
    np.testing.assert_allclose(cosine(base[0][rotated], chat[rotated]), np.sqrt(0.5), atol=1e-6)
    ratio = strength[0] / np.where(strength[1] > 0, strength[1], np.nan)
    rescaled = of_kind(truth, "rescaled")
    np.testing.assert_allclose(np.sort(ratio[rescaled]), [0.5, 0.5, 2, 2], rtol=1e-6)
    np.testing.assert_allclose(ratio[of_kind(truth, "weak in base")], 0.3, rtol=1e-6)
    assert not strength[0][of_kind(truth, "chat-only")].any()
    assert not strength[1][of_kind(truth, "base-only")].any()
    split = of_kind(truth, "split in base")
    for variant in base:
        np.testing.assert_allclose(cosine(variant[split], chat[split]), np.sqrt(0.5), atol=1e-6)
    assert (np.abs(base[0] - base[1]).max(axis=1) > 0.1).nonzero()[0].tolist() == split.tolist()


def test_frequencies_follow_the_ranking_and_add_up_to_the_l0(truth):
    frequency = np.sort(np.asarray(truth.frequency))[::-1]
    np.testing.assert_allclose(frequency / frequency[0], 10 / (np.arange(28) + 10), rtol=1e-5)
    np.testing.assert_allclose(frequency.sum(), 3.0, rtol=1e-5)


def test_exclusive_features_can_be_made_rare():
    world = dataclasses.replace(WORLD, exclusive_frequency=0.005)
    truth = plant(world, jax.random.key(0))
    np.testing.assert_allclose(truth.frequency[of_kind(truth, "chat-only")], 0.005, rtol=1e-6)
    np.testing.assert_allclose(truth.frequency.sum(), 3.0, rtol=1e-5)


def test_tokens_have_the_second_moment_that_the_features_give_them(truth, acts):
    # E||chat||^2 = sum_j p_j E[g^2] ||d_j||^2 + cross terms p_i p_j E[g]^2 d_i . d_j, with log-normal
    # strengths: E[g] = exp(s^2 / 2), E[g^2] = exp(2 s^2).
    p, chat = np.asarray(truth.frequency, np.float64), np.asarray(truth.chat, np.float64)
    mean, square = np.exp(0.125), np.exp(0.5)
    gram = chat @ chat.T
    expected = (p * square * np.diag(gram)).sum() + mean**2 * (p @ gram @ p - (p**2 * np.diag(gram)).sum())
    norms = (acts[:, 24:] ** 2).sum(axis=1)
    standard_error = norms.std() / np.sqrt(TOKENS)
    assert abs(norms.mean() - expected) < 4 * standard_error


def test_noise_has_the_stated_share_of_the_energy(truth):
    noisy = dataclasses.replace(WORLD, noise=0.5)
    with_noise = np.asarray(sample_jit(truth, jax.random.key(1), num_tokens=TOKENS, world=noisy))
    without = np.asarray(sample_jit(truth, jax.random.key(1), num_tokens=TOKENS, world=WORLD))
    share = ((with_noise - without) ** 2).mean() / (without**2).mean()
    # 960,000 normal numbers: their mean square has a relative standard error of sqrt(2 / n) = 0.0014.
    assert share == pytest.approx(0.5, rel=4 * 0.0014)


def test_features_of_one_topic_fire_together(truth):
    world = dataclasses.replace(WORLD, num_topics=4, topic_boost=3.0)
    truth = plant(world, jax.random.key(0))
    assert len(np.unique(truth.topic)) == 4
    from experiments.planted.world import _fires

    fires = np.asarray(_fires(truth, jax.random.key(1), 100_000, world), np.float64)
    rate, frequency = fires.mean(axis=0), np.asarray(truth.frequency)
    np.testing.assert_allclose(rate, frequency, atol=4 * np.sqrt(0.3 * 0.7 / 100_000))
    together = fires.T @ fires / 100_000 / np.outer(frequency, frequency)
    is_one_topic = np.asarray(truth.topic)[:, None] == np.asarray(truth.topic)[None]
    off_diagonal = ~np.eye(28, dtype=bool)
    # One topic: (3^2 + 3 (1/3)^2) / 4 = 2.33 times more often than by chance; two: (2 + 2/9) / 4 = 0.56.
    assert together[is_one_topic & off_diagonal].mean() == pytest.approx(28 / 12, rel=0.05)
    assert together[~is_one_topic].mean() == pytest.approx(20 / 36, rel=0.05)


def test_a_boost_that_cannot_be_balanced_is_refused():
    with pytest.raises(ValueError, match="topic_boost=3"):
        World(topic_boost=3.0)


def measured(truth, **changes):
    """The dictionary that was planted, one latent a feature, and a verdict that passes every latent."""
    w_dec = np.concatenate([np.asarray(truth.base[0]), np.asarray(truth.chat)], axis=1)
    n = len(w_dec)
    values = {
        "fve": 1.0,
        "l0": 3.0,
        "fired": np.full(n, 10),
        "w_dec": w_dec,
        "nu_error": np.zeros(n),
        "nu_recon": np.zeros(n),
        "has_evidence": np.ones(n, bool),
    }
    return trial.Measured(**values | changes)


def test_the_planted_dictionary_is_judged_perfect(truth):
    judged = claims(measured(truth), truth, WORLD)
    assert judged["delta_norm"] == (4, 1.0, 1.0, 1.0)
    assert judged["both"] == (4, 1.0, 1.0, 1.0)
    found = recovery(measured(truth), truth, WORLD)
    assert found["mean max cosine"] == pytest.approx(1.0, abs=1e-6)
    assert found["matched"] == 1.0


def test_latent_scaling_alone_takes_every_passing_latent_that_is_stronger_in_chat(truth):
    # Half as strong in base (2 of 4 rescaled), weak in base (3), chat-only (4); equal is not stronger.
    base, chat = np.linalg.norm(truth.base[0], axis=1), np.linalg.norm(truth.chat, axis=1)
    stronger = chat > 1.001 * base
    assert stronger.sum() == 9
    nu = np.where(stronger, 0.0, 1.0)
    judged = claims(measured(truth, nu_error=nu), truth, WORLD)["Latent Scaling"]
    assert (judged.num_claimed, judged.precision, judged.recall) == (9, 4 / 9, 1.0)


def test_what_fails_the_test_or_never_fires_is_not_claimed(truth):
    exclusive = of_kind(truth, "chat-only")
    nu, fired, evidence = np.zeros(28), np.full(28, 10), np.ones(28, bool)
    nu[exclusive[0]], fired[exclusive[1]], evidence[exclusive[2]] = 0.3, 0, False
    result = measured(truth, nu_error=nu, fired=fired, has_evidence=evidence)
    judged = claims(result, truth, WORLD)
    assert judged["delta_norm"].num_claimed == 3
    assert judged["both"][:3] == (1, 1.0, 1 / 4)


def test_a_claimed_latent_in_another_direction_is_wrong_and_two_of_one_feature_are_one_find(truth):
    w_dec = np.array(measured(truth).w_dec)
    exclusive = of_kind(truth, "chat-only")
    w_dec[exclusive[0]] = w_dec[exclusive[1]]
    w_dec[exclusive[2], 24:] = np.linalg.svd(np.asarray(truth.chat))[2][-1]
    judged = claims(measured(truth, w_dec=w_dec), truth, WORLD)["delta_norm"]
    assert judged.num_claimed == 4
    assert judged.precision == 3 / 4
    assert judged.recall == 2 / 4


def test_nothing_claimed_has_no_precision(truth):
    judged = claims(measured(truth, fired=np.zeros(28)), truth, WORLD)["both"]
    assert np.isnan(judged.precision)
    assert (judged.num_claimed, judged.recall, judged.f1) == (0, 0.0, 0.0)


def test_intervals_are_student_ts():
    # Mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.302653.
    interval = Interval.over([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.half_width == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)
    assert str(Interval.over([0.5])) == "0.500"


def test_seeds_trained_together_equal_seeds_trained_alone():
    config = recipe("BatchTopK", WORLD, num_latents=56, num_tokens=20 * 512)
    together = trial.train_seeds(config, WORLD, range(2))
    for seed in range(2):
        (alone,) = trial.train_seeds(config, WORLD, range(seed, seed + 1))
        np.testing.assert_array_equal(alone.truth.chat, together[seed].truth.chat)
        # Batched matrix products may add in another order: 20 steps of rounding, far below a learning rate.
        np.testing.assert_allclose(
            alone.crosscoder.w_dec[...], together[seed].crosscoder.w_dec[...], atol=1e-5
        )
    assert not np.allclose(together[0].crosscoder.w_dec[...], together[1].crosscoder.w_dec[...])


def test_an_ablation_changes_one_thing_and_keeps_the_tokens():
    config = recipe("BatchTopK", WORLD, num_latents=56, num_tokens=100 * 2048)
    for name in ABLATIONS:
        changed = ablated(config, name)
        assert changed.num_steps * changed.batch_size == config.num_steps * config.batch_size
        assert changed != config


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_measured(method):
    config = recipe(method, WORLD, num_latents=56, num_tokens=40 * 512)
    (trained,) = trial.train_seeds(config, WORLD, range(1))
    result = trial.measure(trained, WORLD)
    assert 0 < result.fve < 1
    if method in ("TopK", "BatchTopK"):
        assert result.l0 == pytest.approx(3.0, rel=0.02)
    assert set(claims(result, trained.truth, WORLD)) == {"delta_norm", "Latent Scaling", "both"}


def test_results_are_written_as_table_and_figure(truth, tmp_path):
    judged = claims(measured(truth), truth, WORLD)
    common = {name: [0.5, 0.6] for name in ("fve", "l0", "dead", "mean_max_cosine", "matched")}
    rows = [Row.of_seeds("small", "L1", by, [claim, claim], common, 1.0) for by, claim in judged.items()]
    write_results(rows, tmp_path)
    with (tmp_path / "planted.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["by"] for row in read] == ["delta_norm", "Latent Scaling", "both"]
    assert float(read[0]["fve"]) == 0.55
    assert float(read[0]["recall_half_width"]) == 0.0
    assert markdown(rows).count("\n") == 5
    assert rows[0].short_cells() == (
        "L1",
        "norms",
        "0.55",
        "0.6",
        "0.55",
        "1.00±0.00",
        "1.00±0.00",
        "1.00±0.00",
    )
    assert (tmp_path / "planted.png").read_bytes().startswith(b"\x89PNG")


def test_a_section_of_the_readme_is_replaced_and_nothing_else(truth, tmp_path):
    judged = claims(measured(truth), truth, WORLD)["both"]
    common = {name: [0.5] for name in ("fve", "l0", "dead", "mean_max_cosine", "matched")}
    row = Row.of_seeds("small", "L1", "both", [judged], common, 60.0)
    path = tmp_path / "README.md"
    path.write_text("head\n<!-- begin methods -->\nold\n<!-- end methods -->\ntail\n")
    for _ in range(2):
        update_readme([row], "methods", path)
    text = path.read_text()
    assert text.startswith("head\n<!-- begin methods -->\n| world |")
    assert text.endswith("<!-- end methods -->\ntail\n")
    assert "old" not in text
    assert text.count("| small | L1 | both |") == 1
    assert (tmp_path / "methods.png").is_file()
    with pytest.raises(ValueError, match="has no section"):
        update_readme([row], "ablation", path)


def test_the_expectation_of_the_reference_world_can_fail(truth):
    judged = claims(measured(truth, fired=np.zeros(28)), truth, WORLD)["both"]
    common = {name: [0.5] for name in ("fve", "l0", "dead", "mean_max_cosine", "matched")}
    assert Row.of_seeds("reference", "BatchTopK", "both", [judged], common, 1.0).is_below_expectation
    assert not Row.of_seeds("small", "BatchTopK", "both", [judged], common, 1.0).is_below_expectation


def test_the_reference_world_has_the_stated_size():
    world = WORLDS["reference"]
    assert world.counts == (210, 80, 40, 40, 40, 51, 51)
    assert (sum(world.counts), world.width, world.mean_l0) == (512, 128, 10.0)
    assert KINDS[CHAT_ONLY] == "chat-only"
    assert jnp.asarray(world.noise) == jnp.float32(0.02)
