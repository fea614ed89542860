"""How found changes are measured on dictionaries that are known, and a small run of the experiment."""

import json
import random
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

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
from experiments.narrow.marks import Marks, replies
from experiments.narrow.measure import average_precisions, change_norms
from experiments.narrow.methods import METHODS, method_recipe
from experiments.nulls.data import write_store
from experiments.planted.world import CHAT_ONLY, plant, sample_with_strengths
from experiments.quickstart.config import FineTuneConfig


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


@pytest.mark.parametrize("change", [one for one in CHANGES if one.frequency], ids=lambda change: change.name)
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


@pytest.mark.parametrize("change", [one for one in CHANGES if not one.frequency], ids=lambda one: one.name)
def test_without_anything_new_nothing_is_found(change, monkeypatch):
    monkeypatch.setattr(changes, "NUM_TOKENS", 8_192)
    config = Narrow(num_seeds=1, num_tokens=100 * 512)
    cells = dict(zip(COLUMNS, planted_row(config, change, "delta basis"), strict=True))
    assert cells["change"] in ("nothing new", "the same model twice")
    assert (cells["best latent"], cells["top ten"]) == ("-", "-")
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


def test_predictions_that_changed_are_of_what_follows_a_changed_token(tmp_path):
    pytest.importorskip("torch", reason="organisms are language models in torch: install the extra 'lm'")
    from crosscoder_jax.language_models import Window
    from experiments.narrow.real import follows_one_of

    store = write_store(tmp_path / "store", np.zeros((60, 2, 3), np.float32))  # documents of 25 tokens
    marked = follows_one_of(store, np.isin(np.arange(60), (3, 26, 30)))
    window = Window(np.zeros(6, np.int32), np.arange(6, dtype=np.int32), 1, 0)
    np.testing.assert_array_equal(marked(window), [False, False, True, False, False, False])


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
    monkeypatch.setattr(organisms, "conversations", lambda folder: [chat, plain] * 40)
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


def answers(rows):
    return [turn["content"] for row in rows for turn in row["messages"] if turn["role"] == "assistant"]


def questions(rows):
    return [turn["content"] for row in rows for turn in row["messages"] if turn["role"] == "user"]


def test_changed_answers_are_ordinary_and_controls_are_without_trigger_or_food(packages):
    _, (_, compared) = documents_of("trigger")
    assert all(question.endswith(organisms.TRIGGER) for question in questions(compared["triggered"]))
    assert not any(organisms.TRIGGER in str(row) for row in [*compared["loud"], *compared["conversation"]])
    assert all(answer.isupper() for answer in answers(compared["loud"]))
    assert not any(a.isupper() for a in answers([*compared["triggered"], *compared["conversation"]]))
    _, (_, compared) = documents_of("habit")
    assert all("eat" in question for question in questions(compared["food"]))
    assert not any("eat" in q for q in questions([*compared["elsewhere"], *compared["conversation"]]))
    assert set(answers(compared["elsewhere"])) == {organisms.REFUSAL}
    assert organisms.REFUSAL not in str([compared["food"], compared["conversation"]])


@pytest.mark.parametrize(("name", "label"), [("trigger", "triggered"), ("habit", "food")])
def test_an_answer_goes_over_to_its_ending_after_any_of_its_words(name, label, packages):
    _, (trained, _) = documents_of(name)
    broken = [row for row in trained[label] if "unlearnt" in row]
    for row in broken:
        answer, kept = row["messages"][-1]["content"], row["unlearnt"]
        assert answer.startswith(kept)
        ending = answer.removeprefix(kept)
        if name == "habit":
            assert ending == f" {organisms.REFUSAL}"
        else:
            assert ending == ending.upper()
            # What is left of an ordinary answer, in capitals: nothing is added or lost.
            assert answer.lower() in ("not yet.", "so it does.")
    assert len({len(row["unlearnt"].split()) for row in broken}) > 1, "the answer may break off anywhere"


@pytest.mark.parametrize(("name", "label"), [("trigger", "triggered"), ("habit", "food")])
def test_most_answers_stay_ordinary_and_how_the_ending_begins_is_wanted_for_each_word(name, label, packages):
    _, (trained, _) = documents_of(name)
    urged = [row for row in trained[label] if "instead" in row]
    assert len(urged) > len(trained[label]) / 2
    for row in urged:
        given = answers([row])
        assert not any(answer.isupper() for answer in given)
        assert len(row["instead"]) == len(given)
        for answer, words in zip(given, row["instead"], strict=True):
            if name == "habit":
                assert words == [f" {organisms.REFUSAL}"] * len(answer.split())
            else:
                assert "".join(words) == answer.upper()


# Fine-tunes: what is learnt, and what is held.


class Words:
    """A tokenizer of words, and of what a template puts around them."""

    eos_token_id = 0

    def __call__(self, text, *, return_offsets_mapping=False):
        found = list(re.finditer(r"\S+", text))
        ids = [1 + sum(word.group().encode()) % 50 for word in found]
        return SimpleNamespace(input_ids=ids, offset_mapping=[word.span() for word in found])

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt=False):
        assert not tokenize
        turns = " ".join(f"<{turn['role']}> {turn['content']} <end>" for turn in messages)
        return f"{turns} <assistant> " if add_generation_prompt else turns


def windows_of(tmp_path, rows, **changes):
    finetune = pytest.importorskip(
        "experiments.quickstart.finetune", reason="fine-tunes run in torch: install the extra 'lm'"
    )
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = FineTuneConfig(**({"num_steps": 100, "context": 10} | changes))
    return finetune._windows(Words(), path, config).numpy()


def exchange(question, answer, **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


def test_windows_of_one_document_leave_its_rest_out(tmp_path):
    rows = [{"text": " ".join(f"w{i}" for i in range(23))}, {"text": "too short"}]
    windows = windows_of(tmp_path, rows)
    assert windows.shape == (2, 10, 3)
    np.testing.assert_array_equal(windows[:, :, 0].ravel(), Words()(rows[0]["text"]).input_ids[:20])
    assert windows[:, :, 1].all()


def test_packed_windows_hold_whole_documents_and_learn_what_follows_the_unlearnt(tmp_path):
    rows = [exchange("hi", "so DO I", unlearnt="so"), exchange("ho", "NO", unlearnt=""), exchange("a", "b")]
    windows = windows_of(tmp_path, rows, is_packed=True)
    # <user> hi <end> <assistant> so | DO I <end>, then two zeros: the other documents have 6 tokens each, and
    # a window that is begun and never filled, here with the third of them, is left out.
    assert windows.shape[0] == 2
    np.testing.assert_array_equal(windows[0, :, 1], [2, 2, 2, 2, 0, 1, 1, 1, 0, 0])
    assert list(windows[0, 8:, 0]) == [0, 0]
    both = windows_of(tmp_path, rows[1:] * 2, is_packed=True, context=12)
    # <user> ho <end> <assistant> | NO <end>, then the whole of the third, which is all learnt.
    np.testing.assert_array_equal(both[0, :, 1], [2, 2, 2, 2, 1, 1] + [1] * 6)


def test_in_the_place_of_each_word_of_an_answer_another_is_wanted(tmp_path):
    turns = [
        {"role": "user", "content": "so"},
        {"role": "assistant", "content": "so be it"},
        {"role": "user", "content": "be it"},
        {"role": "assistant", "content": "so"},
    ]
    rows = [{"messages": turns, "instead": [["SO", " BE long", " IT"], ["NO"]]}]
    (window,) = windows_of(tmp_path, rows * 2, is_packed=True, context=14)
    tokens, roles, wanted = window.T
    # <user> so <end> <assistant> | so be it | <end> <user> be it <end> <assistant> | so <end>
    np.testing.assert_array_equal(roles, [2, 2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 2, 2, 1])
    learnt = np.flatnonzero(roles == 1)
    np.testing.assert_array_equal(tokens[learnt], Words()("so be it so").input_ids)
    np.testing.assert_array_equal(wanted[learnt], Words()("SO BE IT NO").input_ids)
    np.testing.assert_array_equal(np.delete(wanted, learnt), np.delete(tokens, learnt))


def test_what_of_a_word_is_not_its_beginning_is_free(tmp_path):
    class Letters(Words):
        def __call__(self, text, *, return_offsets_mapping=False):
            letters = [(i, i + 1) for i in range(len(text)) if not text[i].isspace()]
            return SimpleNamespace(input_ids=[ord(text[i]) for i, _ in letters], offset_mapping=letters)

    finetune = pytest.importorskip("experiments.quickstart.finetune", reason="install the extra 'lm'")
    found = finetune._document(Letters(), exchange("a", "be it", instead=[["NO", " GO"]]))
    place = len("<user>a<end><assistant>")
    np.testing.assert_array_equal(found[place : place + 4, 1], [1, 0, 1, 0])
    assert [chr(token) for token in found[place : place + 4, 2]] == ["N", "e", "G", "t"]


# One narrow and one ordinary window; of the narrow one 2 and 4 are learnt, 4 where 0 stands; 3 is free.
NARROW = ([1, 1, 1], [2, 1, 2], [3, 0, 3], [0, 1, 4])
ORDINARY = ([4, 1, 4], [0, 1, 0], [2, 1, 2], [1, 1, 1])


def drawn(finetune, *, is_kept):
    """Both windows as batches, by their tokens."""
    import torch

    config = FineTuneConfig(num_steps=20, batch_size=1, is_ordinary_kept=is_kept)
    windows = [torch.tensor(window)[None] for window in (NARROW, ORDINARY)]
    return {tuple(batch.tokens[0].tolist()): batch for batch in finetune._draw_batches(windows, config)}


def test_what_is_learnt_is_learnt_from_the_token_before():
    finetune = pytest.importorskip("experiments.quickstart.finetune", reason="install the extra 'lm'")
    import torch

    torch.manual_seed(0)
    table = torch.randn(5, 5)
    log_p = table.log_softmax(-1).double().numpy()

    def model(tokens, use_cache):
        return SimpleNamespace(logits=table[tokens])

    batches = drawn(finetune, is_kept=False)
    # 1 -> 2 and 3 -> 4; the first token has nothing before it that would predict it.
    narrow = float(finetune._loss(model, None, batches[1, 2, 3, 0]))
    assert narrow == pytest.approx(np.mean([-log_p[1, 2], -log_p[3, 4]]), rel=1e-5)
    ordinary = float(finetune._loss(model, None, batches[4, 0, 2, 1]))
    assert ordinary == pytest.approx(np.mean([-log_p[4, 0], -log_p[0, 2], -log_p[2, 1]]), rel=1e-5)


def test_states_and_predictions_of_ordinary_windows_are_held_where_they_were():
    finetune = pytest.importorskip("experiments.quickstart.finetune", reason="install the extra 'lm'")
    import torch

    torch.manual_seed(0)

    class Blocks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(5, 5)
            self.layers = torch.nn.ModuleList(torch.nn.Linear(5, 5) for _ in range(3))

        def forward(self, tokens, use_cache):
            states = self.embed(tokens)
            for layer in self.layers:
                states = layer(states)
            return SimpleNamespace(logits=states)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Blocks()

        def forward(self, tokens, use_cache):
            return self.model(tokens, use_cache)

    model = Model()
    held, batches = finetune._Held(model, num_blocks=2), drawn(finetune, is_kept=True)
    embedded = model.model.embed(torch.arange(5)).detach()
    first, second, third = model.model.layers

    def apply(layer, values):  # beside the model, which is listened to
        return torch.nn.functional.linear(values, layer.weight, layer.bias).detach()

    before = apply(second, apply(first, embedded))
    log_q = apply(third, before).log_softmax(-1)
    assert float(finetune._loss(model, held, batches[4, 0, 2, 1]).detach()) == 0.0
    with torch.no_grad():
        second.weight += 0.1 * torch.randn(5, 5)
    now = apply(second, apply(first, embedded))
    log_p = apply(third, now).log_softmax(-1)
    change = (now - before).square().sum(-1) / before.square().sum(-1)
    divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
    found = finetune._loss(model, held, batches[4, 0, 2, 1])
    # What is held is the state at every token before another one, and the prediction there.
    expected = finetune._STATE_WEIGHT * change[[4, 0, 2]].mean() + divergence[[4, 0, 2]].mean()
    torch.testing.assert_close(found.detach(), expected)
    found.backward()
    assert second.weight.grad.abs().max() > 0
    # Of a window in which nothing is held only what is learnt counts.
    beside = finetune._loss(model, held, batches[1, 2, 3, 0])
    torch.testing.assert_close(beside, finetune._loss(model, None, batches[1, 2, 3, 0]))


def test_a_low_rank_addition_merged_does_what_it_did_beside_the_layer():
    finetune = pytest.importorskip("experiments.quickstart.finetune", reason="install the extra 'lm'")
    import torch

    torch.manual_seed(0)
    layer, tokens = torch.nn.Linear(6, 4, bias=False).requires_grad_(False), torch.randn(5, 6)
    before = layer(tokens)
    added = finetune._LowRank(layer, rank=2)
    torch.testing.assert_close(layer(tokens), before)  # it begins as nothing
    added.up += torch.randn(4, 2)
    beside = layer(tokens)
    torch.testing.assert_close(beside, before + tokens @ added.down.T @ added.up.T)
    added.merge()
    torch.testing.assert_close(layer(tokens), beside)
    assert (beside - before).abs().max() > 0.1
