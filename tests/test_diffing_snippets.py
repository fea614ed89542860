import numpy as np
import pytest

from crosscoder_jax.diffing.snippets import context_range, decode_tokens


def test_a_character_over_three_tokens_appears_at_its_last():
    smile = "\N{SLIGHTLY SMILING FACE}".encode()  # four bytes
    vocabulary = {0: b"so ", 1: smile[:1], 2: smile[1:3], 3: smile[3:] + b"!"}
    assert decode_tokens([0, 1, 2, 3], vocabulary) == ["so ", "", "", "\N{SLIGHTLY SMILING FACE}!"]


def test_broken_bytes_become_replacement_characters_and_nothing_is_lost():
    vocabulary = {0: b"\xa9 end", 1: b"ok", 2: b"caf\xc3"}
    # A run that begins in the middle of a character, and one that stops in the middle.
    assert decode_tokens([0, 1], vocabulary) == ["\ufffd end", "ok"]
    assert decode_tokens([1, 2], vocabulary) == ["ok", "caf\ufffd"]
    assert decode_tokens([2, 1], vocabulary) == ["caf", "\ufffdok"]


def test_unknown_tokens_are_shown_by_number():
    assert decode_tokens([5, 7], {5: b"a"}) == ["a", "[7]"]
    assert decode_tokens([9, 7], {9: b"\xc3"}) == ["", "\ufffd[7]"]
    assert decode_tokens([], {}) == []


def test_joined_tokens_are_the_text():
    text = "naïve café 日本 \N{SLIGHTLY SMILING FACE} end"
    raw = text.encode()
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(np.arange(1, len(raw)), 12, replace=False))
    pieces = [bytes(p) for p in np.split(np.frombuffer(raw, np.uint8), cuts)]
    assert "".join(decode_tokens(range(len(pieces)), dict(enumerate(pieces)))) == text


DOCUMENTS = np.array([0, 0, 0, 0, 1, 2, 2, 2, 2, 2], np.int32)


@pytest.mark.parametrize(
    ("token", "context", "expected"),
    [
        (0, 2, (0, 3)),
        (3, 2, (1, 4)),
        (4, 3, (4, 5)),  # a document of one token
        (5, 3, (5, 9)),
        (9, 100, (5, 10)),
        (2, 0, (2, 3)),
    ],
)
def test_context_stays_within_its_document(token, context, expected):
    assert context_range(lambda start, stop: DOCUMENTS[start:stop], 10, token, context) == expected
