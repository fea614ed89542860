"""Two tokenizers that must be one: paired activations mean nothing when the models read different tokens."""

from collections.abc import Sequence
from typing import Any

PROBES = (
    "The quick brown fox, it's 3.14159 and 2,000!",
    "  leading and   inner spaces\n\nline\tbreaks\r\n",
    "def f(x):\n    return {'a': x ** 2}  # comment",
    "Größe, naïve, ñandú, Ελληνικά, русский, עברית, हिन्दी, 中文, 日本語, 한국어",
    "emoji 🐋🏴‍☠️ and \u200bzero width, \ufb01 ligature",
    "<s></s><pad><unk><bos><eos><|endoftext|><|im_start|>user\n<|im_end|><start_of_turn>model\n[INST] x",
)
"""Texts whose encodings must agree: spaces, digits, code, scripts, emoji, and markers of chat templates."""


def check_tokenizers_agree(
    base: Any, chat: Any, texts: Sequence[str] = PROBES, *, name: str = "chat"
) -> None:
    """Refuse two tokenizers that could give different token ids for the same text.

    Compared are the vocabularies, the added and special tokens, and the encodings of ``texts`` with the
    tokens that each tokenizer puts around a text. Not compared are chat templates and the roles of special
    tokens (which one ends a turn): chat models differ there, and one template is used for both.

    Args:
        base: of the first model.
        chat: of the other one.
        texts: to encode with both.
        name: of the other model, for the error.

    Raises:
        ValueError: saying where they disagree: the first token, special token or text that differs.
    """
    fault = _vocabulary_fault(base, chat) or _added_fault(base, chat) or _encoding_fault(base, chat, texts)
    if fault:
        raise ValueError(
            f"the tokenizers of base and {name} disagree: {fault}. Paired activations need the same tokens: "
            f"take models that share a tokenizer"
        )


def _vocabulary_fault(base: Any, chat: Any) -> str | None:
    ours, theirs = _by_id(base.get_vocab()), _by_id(chat.get_vocab())
    return _first_difference("token", ours, theirs)


def _added_fault(base: Any, chat: Any) -> str | None:
    ours = {index: str(token) for index, token in base.added_tokens_decoder.items()}
    theirs = {index: str(token) for index, token in chat.added_tokens_decoder.items()}
    return _first_difference("added token", ours, theirs)


def _by_id(vocabulary: dict[str, int]) -> dict[int, str]:
    return {index: token for token, index in vocabulary.items()}


def _first_difference(what: str, ours: dict[int, str], theirs: dict[int, str]) -> str | None:
    differing = [index for index in ours.keys() | theirs.keys() if ours.get(index) != theirs.get(index)]
    if not differing:
        return None
    index = min(differing)
    mine = repr(ours[index]) if index in ours else "nothing"
    other = repr(theirs[index]) if index in theirs else "nothing"
    return f"{what} {index} is {mine} in base and {other} in the other ({len(differing)} differ)"


def _encoding_fault(base: Any, chat: Any, texts: Sequence[str]) -> str | None:
    for text in texts:
        ours, theirs = encode(base, text), encode(chat, text)
        if ours != theirs:
            return (
                f"the text {text[:60]!r} is {_shortened(ours)} in base and {_shortened(theirs)} in the other"
            )
    return None


def _shortened(ids: list[int], shown: int = 8) -> str:
    return f"[{', '.join(map(str, ids[:shown]))}{', ...' if len(ids) > shown else ''}]"


def encode(tokenizer: Any, text: str, *, is_templated: bool = False) -> list[int]:
    """Token ids of a text; a templated one already holds its special tokens, so none are added around it."""
    return tokenizer(text, add_special_tokens=not is_templated, verbose=False)["input_ids"]
