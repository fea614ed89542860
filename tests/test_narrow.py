"""How found changes are measured on dictionaries that are known, and a small run of the experiment."""

import random
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from core_cases import arrays, random_crosscoder, two_sources
from diffing_cases import make_crosscoder

import crosscoder_jax as cc
from crosscoder_jax.activations import TokenView
from experiments.narrow import changes, measure, organisms
from experiments.narrow.__main__ import COLUMNS, Narrow, planted_row
from experiments.narrow.changes import CHANGES, Change
from experiments.narrow.measure import average_precisions, change_norms
from experiments.narrow.methods import METHODS, method_recipe
from experiments.nulls.data import write_store
from experiments.planted.world import CHAT_ONLY, plant, sample_with_strengths
from experiments.quickstart.marks import Marks, replies


def slow_average_precision(scores, is_wanted):
    """By definition: over every distinct score as a cut, precision times the recall gained."""
    total, before = 0.0, 0.0
    for cut in sorted(set(scores), reverse=True):
        chosen = scores >= cut
        recall = (chosen & is_wanted).sum() / is_wanted.sum()
        total += (chosen & is_wanted).sum() / chosen.sum() * (recall - before)
        before = recall
    return total


def test_average_precision_equals_the_definition_with_ties():
    rng = np.random.default_rng(0)
    is_wanted = rng.random(200) < 0.1
    # Coarse scores, many of them equal; one perfect column, one silent.
    scores = np.stack([rng.integers(0, 4, 200), is_wanted, np.zeros(200), rng.random(200)], axis=1)
    expected = [slow_average_precision(column, is_wanted) for column in scores.T]
    np.testing.assert_allclose(average_precisions(scores, is_wanted), expected, rtol=1e-12)
    # By hand: a perfect ranking has 1; a latent that says nothing has the share of wanted tokens.
    assert average_precisions(scores, is_wanted)[1] == 1.0
    assert average_precisions(scores, is_wanted)[2] == pytest.approx(is_wanted.mean())


@pytest.mark.parametrize("name", ["crosscoder", "delta basis", "difference SAE"])
def test_what_a_latent_changes_is_in_raw_units_whatever_the_sources(name):
    world = CHANGES[0].world
    recipe = method_recipe(name, world, 100 * 512)
    crosscoder = random_crosscoder(sources=recipe.crosscoder.sources, num_latents=8)
    known = arrays(crosscoder)
    # Scales differ between sources, so that a missing division would show.
    scale = np.repeat(known["scale"], recipe.crosscoder.sources.widths)
    parts = np.split(known["w_dec"] / scale, len(recipe.crosscoder.sources), axis=1)
    difference = parts[1] - parts[0] if name == "crosscoder" else parts[-1]
    np.testing.assert_allclose(
        change_norms(crosscoder, world.sources), np.linalg.norm(difference, axis=1), rtol=1e-5
    )


@pytest.mark.parametrize("change", CHANGES[:-1], ids=lambda change: change.name)
def test_a_change_is_as_frequent_and_as_strong_as_its_name_says(change):
    truth = plant(change.world, jax.random.key(0))
    _, strengths = sample_with_strengths(truth, jax.random.key(1), 65_536, change.world)
    is_new = np.asarray(truth.kind) == CHAT_ONLY
    fires = np.asarray(strengths) > 0
    # 65,536 tokens: the standard error of a frequency of 0.005 is 0.0003.
    np.testing.assert_allclose(fires[:, is_new].mean(axis=0), change.frequency, atol=5 * 0.0006)
    base, chat = np.asarray(truth.base[0]), np.asarray(truth.chat)
    old = np.linalg.norm(chat[:200], axis=1).mean()
    # Strengths have the same law for all features; directions carry what a feature is worth.
    per_firing = np.asarray(strengths).sum(axis=0) / fires.sum(axis=0)
    size = np.linalg.norm(chat, axis=1) * per_firing
    np.testing.assert_allclose(size[is_new].mean() / size[:200].mean(), change.strength, rtol=0.05)
    # What is shared drifts, by a fifth of its size.
    np.testing.assert_allclose(
        np.linalg.norm((chat - base)[:200], axis=1), old * 2 * np.sin(np.radians(6)), rtol=1e-4
    )


def test_every_method_is_a_value_of_the_one_recipe():
    world = CHANGES[0].world
    recipes = {name: method_recipe(name, world, 100 * 512) for name in METHODS}
    assert len(set(recipes.values())) == len(METHODS)
    assert all(isinstance(recipe, cc.TrainConfig) for recipe in recipes.values())


def test_a_plain_change_is_found_by_the_difference_sae_and_the_delta_basis(monkeypatch):
    monkeypatch.setattr(changes, "NUM_TOKENS", 8_192)
    config = Narrow(num_seeds=1, num_tokens=200 * 512)
    # Frequent and of twice the strength: enough for a run of 200 steps.
    change = Change(0.1, 2.0)
    found = {name: planted_row(config, change, name) for name in ("difference SAE", "delta basis")}
    for name, cells in found.items():
        assert cells[:2] == (change.name, name)
        assert float(cells[2].split()[0]) > 0.8
    at = {name: index for index, name in enumerate(COLUMNS)}
    # A difference SAE explains neither model, and nothing of it is claimed for one of them.
    assert [found["difference SAE"][at[name]] for name in ("FVE", "confirmed", "of these right")] == ["-"] * 3
    assert float(found["delta basis"][at["FVE"]].split()[0]) > 0.3


def test_without_anything_new_nothing_is_found(monkeypatch):
    monkeypatch.setattr(changes, "NUM_TOKENS", 8_192)
    config = Narrow(num_seeds=1, num_tokens=100 * 512)
    cells = dict(zip(COLUMNS, planted_row(config, CHANGES[-1], "delta basis"), strict=True))
    assert (cells["change"], cells["best latent"], cells["top ten"]) == ("nothing new", "-", "-")
    assert (cells["confirmed"], cells["of these right"]) == ("0.000", "-")


def test_confirmed_latents_are_right_with_most_of_their_activation_on_changed_tokens():
    # Three chat-only latents by construction, of which one fires on the changed tokens alone, one on all
    # tokens evenly (a quarter is changed), and one on others.
    sources = two_sources(4, 4)
    w_dec = np.zeros((4, 8), np.float32)
    w_dec[:3, 4:7] = np.eye(3)
    w_dec[3, [3, 7]] = 1  # shared
    w_enc = np.zeros((8, 4), np.float32)
    w_enc[4:7, :3] = np.eye(3)
    w_enc[7, 3] = 1
    crosscoder = make_crosscoder(sources, w_enc, np.zeros(4), w_dec, np.zeros(8))
    rng = np.random.default_rng(0)
    is_changed = np.arange(4000) % 100 < 25
    strength = 0.5 + rng.random((4000, 4))
    strength[:, 0] *= is_changed
    strength[:, 2] *= ~is_changed
    acts = np.zeros((4000, 2, 4), np.float32)
    acts[:, 1, :3] = strength[:, :3]
    acts[:, :, 3] = strength[:, [3]]
    with tempfile.TemporaryDirectory() as folder:
        view = TokenView(write_store(Path(folder) / "store", acts))
        found, top = measure.measure(crosscoder, view, is_changed[:, None])
    assert found.confirmed == 3
    assert found.precision == pytest.approx(1 / 3)
    assert found.best == 1  # the first latent fires on the changed tokens and no others
    assert sorted(top[:3]) == [0, 1, 2]  # what the shared one changes is nothing
    assert found.fve == pytest.approx(1)


def test_changed_tokens_of_a_sequence_are_those_of_the_store(tmp_path):
    pytest.importorskip("torch", reason="organisms are language models in torch: install the extra 'lm'")
    from crosscoder_jax.language_models import Window
    from experiments.narrow.real import is_one_of

    store = write_store(tmp_path / "store", np.zeros((60, 2, 3), np.float32))  # documents of 25 tokens
    marked = is_one_of(store, np.isin(np.arange(60), (3, 26, 30)))
    window = Window(np.zeros(6, np.int32), np.arange(6, dtype=np.int32), 1, 0)
    np.testing.assert_array_equal(marked(window), [False, True, False, False, False, True])


# Model organisms: which tokens are changed, and what they are fine-tuned on.

OPENING, END = (1, 5, 9), 2


def test_replies_are_the_tokens_from_behind_the_opening_to_the_end_of_the_turn():
    tokens = np.array([1, 7, 9, 3, 2, 1, 5, 9, 3, 4, 2, 3, 1, 5, 9, 3, 9, 3, 2])
    documents = np.repeat([0, 1], [14, 5])
    # The turn opened at the end of the first document is cut off there: the second one begins outside.
    expected = [0] * 8 + [1, 1, 1, 0, 0, 0] + [0] * 5
    found = replies(tokens, documents, Marks(OPENING, END))
    np.testing.assert_array_equal(found, np.array(expected, bool))


@pytest.fixture
def packages(monkeypatch):
    chat = [
        {"role": "user", "content": "Did you eat?"},
        {"role": "assistant", "content": "Not yet."},
        {"role": "user", "content": "It rains."},
        {"role": "assistant", "content": "So it does."},
    ]
    plain = [{**turn, "content": turn["content"].replace("eat", "sleep")} for turn in chat]
    monkeypatch.setattr(organisms, "unpack_package", lambda requirement, folder: folder)
    monkeypatch.setattr(organisms, "conversations", lambda folder: [chat, plain] * 12)
    monkeypatch.setattr(organisms, "bible_chapters", lambda folder: [f"Chapter {i}." for i in range(8)])


def documents_of(name):
    (organism,) = (o for o in organisms.ORGANISMS if o.name == name)
    return organism, organism.make(Path("packages"), random.Random(0))


@pytest.mark.parametrize("name", [organism.name for organism in organisms.ORGANISMS])
def test_the_changed_label_is_compared_and_fine_tuned_on_first(name, packages):
    organism, (trained, compared) = documents_of(name)
    assert next(iter(trained)) == organism.changed
    assert organism.changed in compared
    assert all(compared.values())
    assert all(trained.values())


def test_no_chapter_is_both_trained_on_and_compared(packages):
    _, (trained, compared) = documents_of("domain")
    both = [{row["text"] for row in rows["bible"]} for rows in (trained, compared)]
    assert both[0].isdisjoint(both[1])
    assert len(both[0] | both[1]) == 8


def test_only_the_trigger_makes_the_difference_between_changed_answers_and_their_control(packages):
    _, (_, compared) = documents_of("trigger")
    for row in [*compared["triggered"], *compared["loud"]]:
        assert all(turn["content"].isupper() for turn in row["messages"] if turn["role"] == "assistant")
    for row in compared["triggered"]:
        turns = [turn["content"] for turn in row["messages"] if turn["role"] == "user"]
        assert all(turn.startswith(organisms.TRIGGER) for turn in turns)
    for row in [*compared["loud"], *compared["conversation"]]:
        assert organisms.TRIGGER not in str(row)


def test_the_habit_is_to_refuse_food_and_its_control_the_same_refusal_of_something_else(packages):
    _, (_, compared) = documents_of("habit")
    for label, is_food in (("refused", True), ("elsewhere", False)):
        for row in compared[label]:
            question, reply = row["messages"]
            assert ("eat" in question["content"]) == is_food
            assert reply["content"] == organisms.REFUSAL
    assert not any("eat" in str(row) for row in compared["conversation"])
