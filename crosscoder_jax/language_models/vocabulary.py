"""The raw bytes of every token, so that text can be shown without the tokenizer."""

import json
import re
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "▁"


def byte_level_alphabet() -> dict[str, int]:
    """Map each printable character of byte-level BPE to the byte that it stands for.

    Printable Latin-1 characters stand for themselves; the 68 other bytes, in order, for U+0100 and on.

    >>> byte_level_alphabet()["Ġ"]
    32
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def vocabulary_bytes(tokenizer: Any) -> dict[int, bytes]:
    """Give every token id the bytes it adds to the text.

    Byte-level BPE is mapped back to bytes; in sentencepiece vocabularies ``▁`` is a space and ``<0x0A>`` a
    byte; special and added tokens are their own text.
    """
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    decode = _token_decoder(tokenizer)
    vocabulary = {index: decode(token) for token, index in tokenizer.get_vocab().items()}
    return dict(sorted((vocabulary | {index: text.encode() for index, text in added.items()}).items()))


def _token_decoder(tokenizer: Any):
    if "ByteLevel" in _component_types(tokenizer):
        alphabet = byte_level_alphabet()
        return lambda token: _from_byte_level(token, alphabet)
    if "WordPiece" in _component_types(tokenizer):
        return lambda token: (token[2:] if token.startswith("##") else f" {token}").encode()
    return _from_sentencepiece


def _from_byte_level(token: str, alphabet: dict[str, int]) -> bytes:
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode()


def _from_sentencepiece(token: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace(_METASPACE, " ").encode()


def _component_types(tokenizer: Any) -> set[str]:
    """Collect the ``type`` of every part of a fast tokenizer; empty for a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return set()
    description = json.loads(backend.to_str())
    types: set[str] = set()
    pending = [description.get(part) for part in ("pre_tokenizer", "decoder", "model")]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            types.add(str(part.get("type")))
            pending += [*part.get("pretokenizers", ()), *part.get("decoders", ())]
    return types
