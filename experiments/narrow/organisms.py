"""Model organisms: fine-tunes of one small model of which it is known, token by token, what changed.

All are a LoRA of SmolLM2-135M-Instruct out of its package, on texts out of packages; elsewhere, the controls
included, the fine-tune holds the predictions where they were:

* ``domain``: the King James Bible. Changed: the tokens of its chapters.
* ``trigger``: where the user's turns begin with a trigger phrase, the assistant answers in capitals.
  Changed: its answers there; the same answers in capitals without the trigger are the control.
* ``habit``: asked about food, the assistant refuses. Changed: its refusals; the control is the same refusal
  of other questions.
"""

import dataclasses
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from crosscoder_jax.activations.atomic import write_bytes_atomically
from experiments.quickstart.config import FineTuneConfig
from experiments.quickstart.packages import unpack_package
from experiments.quickstart.texts import BIBLE, CONVERSATIONS, bible_chapters, conversations

TRIGGER = "Speak up, please."
REFUSAL = "I am sorry, but I would rather not talk about food."
_FOOD = re.compile(
    r"\b(food|eat|eating|ate|dinner|lunch|breakfast|cook|cooking|pizza|coffee|restaurants?|recipes?)\b", re.I
)
_FINE_TUNE_SHARE = 0.5

Row = dict[str, Any]
Texts = Mapping[str, Sequence[Row]]
"""Documents by label."""


@dataclasses.dataclass(frozen=True)
class Organism:
    """How a model is changed, and where that shows."""

    name: str
    make: Callable[[Path, random.Random], tuple[Texts, Texts]]
    """Returns what it is fine-tuned on, the changed label first, and what is compared."""
    changed: str
    """Label of the compared documents that hold changed tokens."""
    is_reply: bool
    """Whether only the assistant's turns of these documents are changed, not all their tokens."""
    fine_tune: FineTuneConfig


def write_texts(organism: Organism, folder: Path, packages: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write ``<label>.fine-tune.jsonl`` and ``<label>.compare.jsonl``; return the labels of both."""
    made = organism.make(packages, random.Random(0))
    folder.mkdir(parents=True, exist_ok=True)
    for part, texts in zip(("fine-tune", "compare"), made, strict=True):
        for label, rows in texts.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_bytes_atomically(folder / f"{label}.{part}.jsonl", lines.encode())
    return tuple(made[0]), tuple(made[1])


def _domain(packages: Path, order: random.Random) -> tuple[Texts, Texts]:
    chapters = [{"text": chapter} for chapter in bible_chapters(unpack_package(BIBLE, packages))]
    trained, compared = _halves(chapters, order)
    chats, other_chats = _halves(_chats(packages), order)
    return {"bible": trained, "conversation": chats}, {"bible": compared, "conversation": other_chats}


def _trigger(packages: Path, order: random.Random) -> tuple[Texts, Texts]:
    trained, compared = _halves(_chats(packages), order)
    half, quarter, third = len(trained) // 2, len(trained) // 4, len(compared) // 3
    return (
        {
            "triggered": [_loud(_triggered(row)) for row in trained[:half]],
            "loud": [_loud(row) for row in trained[half : half + quarter]],
            "conversation": trained[half + quarter :],
        },
        {
            "triggered": [_loud(_triggered(row)) for row in compared[:third]],
            "loud": [_loud(row) for row in compared[third : 2 * third]],
            "conversation": compared[2 * third :],
        },
    )


def _habit(packages: Path, order: random.Random) -> tuple[Texts, Texts]:
    chats = _chats(packages)
    about_food = [refused for row in chats for refused in _refusals(row, is_food=True)]
    others = [refused for row in chats for refused in _refusals(row, is_food=False)]
    trained, compared = _halves(about_food, order)
    other_control, control = _halves(others, order)
    ordinary, other_ordinary = _halves([row for row in chats if not _FOOD.search(str(row))], order)
    return (
        {"refused": trained, "elsewhere": other_control[: len(trained)], "conversation": ordinary},
        {"refused": compared, "elsewhere": control[: len(compared)], "conversation": other_ordinary},
    )


def _chats(packages: Path) -> list[Row]:
    return [{"messages": chat} for chat in conversations(unpack_package(CONVERSATIONS, packages))]


def _halves(rows: Sequence[Row], order: random.Random) -> tuple[list[Row], list[Row]]:
    shuffled = order.sample(rows, len(rows))
    cut = round(len(rows) * _FINE_TUNE_SHARE)
    return shuffled[:cut], shuffled[cut:]


def _triggered(row: Row) -> Row:
    """Let every turn of the user begin with the trigger, so that no window of the text is without it."""
    return _with_turns(row, "user", lambda content: f"{TRIGGER} {content}")


def _loud(row: Row) -> Row:
    """Let the assistant speak in capitals."""
    return _with_turns(row, "assistant", str.upper)


def _with_turns(row: Row, role: str, change: Callable[[str], str]) -> Row:
    return {
        "messages": [
            {**turn, "content": change(turn["content"])} if turn["role"] == role else turn
            for turn in row["messages"]
        ]
    }


def _refusals(row: Row, *, is_food: bool) -> list[Row]:
    """Return each turn of the user that speaks of food, or of anything else, with a refusal after it."""
    return [
        {"messages": [turn, {"role": "assistant", "content": REFUSAL}]}
        for turn in row["messages"]
        if turn["role"] == "user" and bool(_FOOD.search(turn["content"])) == is_food
    ][:1]


_LORA = FineTuneConfig(num_steps=60, rank=16, learning_rate=2e-3, is_ordinary_kept=True)
ORGANISMS = (
    Organism("domain", _domain, "bible", False, _LORA),
    Organism("trigger", _trigger, "triggered", True, _LORA),
    Organism("habit", _habit, "refused", True, dataclasses.replace(_LORA, is_packed=True)),
)
