"""The bytes of the tokens of a text, put together, are the text."""

import pytest

pytest.importorskip("torch", reason="language models run in torch: install the extra 'lm'")
pytest.importorskip("transformers", reason="language models run in torch: install the extra 'lm'")

import tokenizers
import transformers
from language_models_cases import VOCABULARY, byte_level_tokenizer, sentencepiece_tokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from crosscoder_jax.language_models.tokenizers import PROBES
from crosscoder_jax.language_models.vocabulary import byte_level_alphabet, vocabulary_bytes


def joined(tokenizer, text):
    vocabulary = vocabulary_bytes(tokenizer)
    return b"".join(vocabulary[i] for i in tokenizer(text, add_special_tokens=False)["input_ids"])


def test_the_alphabet_is_the_one_of_byte_level_bpe():
    assert byte_level_alphabet() == {character: byte for byte, character in bytes_to_unicode().items()}
    assert sorted(byte_level_alphabet().values()) == list(range(256))


@pytest.mark.parametrize("text", PROBES)
def test_byte_level_tokens_give_back_the_text(text):
    assert joined(byte_level_tokenizer(), text) == text.encode()


@pytest.mark.parametrize("text", ["a cat in the hat", "  two\nlines", "Größe 🐋", "at▁least"])
def test_sentencepiece_tokens_give_back_the_text(text):
    # The metaspace itself is a space in the text's place: sentencepiece cannot tell them apart.
    assert joined(sentencepiece_tokenizer(), text) == text.replace("▁", " ").encode()


def test_single_tokens_by_hand():
    byte_level, pieces = byte_level_tokenizer(), sentencepiece_tokenizer()
    of_bytes, of_pieces = vocabulary_bytes(byte_level), vocabulary_bytes(pieces)
    assert of_bytes[byte_level.get_vocab()["Ġthe"]] == b" the"
    assert of_bytes[byte_level.get_vocab()["Ċ"]] == b"\n"
    assert of_bytes[1] == b"<bos>"
    assert of_pieces[pieces.get_vocab()["<0x0A>"]] == b"\n"
    assert of_pieces[pieces.get_vocab()["▁a"]] == b" a"
    assert of_pieces[1] == b"<s>"


def test_every_id_is_there_in_order():
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<Ġtool é>"])
    vocabulary = vocabulary_bytes(tokenizer)
    assert list(vocabulary) == list(range(len(tokenizer)))
    assert len(tokenizer) <= VOCABULARY
    # An added token is its own text, although its characters are in the byte alphabet too.
    assert vocabulary[len(tokenizer) - 1] == "<Ġtool é>".encode()


def test_a_token_outside_the_byte_alphabet_is_its_own_text():
    backend = tokenizers.Tokenizer(models.WordLevel({"Ġa": 0, "語": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    assert vocabulary_bytes(tokenizer) == {0: b" a", 1: "語".encode(), 2: b"?"}


def test_word_pieces_continue_or_begin_a_word():
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    vocabulary = vocabulary_bytes(transformers.PreTrainedTokenizerFast(tokenizer_object=backend))
    assert (vocabulary[1], vocabulary[2]) == (b" play", b"ing")


class SlowTokenizer:
    """A tokenizer without the fast backend, as sentencepiece models may have."""

    @property
    def added_tokens_decoder(self):
        return {0: "<unk>"}

    def get_vocab(self):
        return {"<unk>": 0, "▁the": 1, "<0xE2>": 2}


def test_a_slow_tokenizer_is_read_as_sentencepiece():
    assert vocabulary_bytes(SlowTokenizer()) == {0: b"<unk>", 1: b" the", 2: b"\xe2"}
