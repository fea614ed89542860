"""Two tokenizers are one, or it is said where they are not."""

import pytest

pytest.importorskip("torch", reason="language models run in torch: install the extra 'lm'")
pytest.importorskip("transformers", reason="language models run in torch: install the extra 'lm'")

from language_models_cases import CORPUS, byte_level_tokenizer, sentencepiece_tokenizer

from crosscoder_jax.language_models.tokenizers import check_tokenizers_agree, encode


def test_equal_tokenizers_agree():
    check_tokenizers_agree(byte_level_tokenizer(), byte_level_tokenizer())
    check_tokenizers_agree(sentencepiece_tokenizer(), sentencepiece_tokenizer())


def test_templates_and_roles_may_differ():
    # A chat model ends its turns with another token and has a template where the base model has none.
    chat = byte_level_tokenizer(eos_token="<|im_end|>", pad_token="<eos>")
    check_tokenizers_agree(byte_level_tokenizer(template=None), chat)


def test_the_first_differing_token_is_named():
    other = byte_level_tokenizer(corpus=[*CORPUS[:2], "zebra zebra zebra zebra zebra zebra " * 9])
    base, chat = byte_level_tokenizer(), other
    ours, theirs = ({i: t for t, i in tokenizer.get_vocab().items()} for tokenizer in (base, chat))
    first = min(i for i in ours if ours[i] != theirs.get(i))
    assert first > 100, "the byte alphabet is common to both"
    with pytest.raises(ValueError, match="disagree: token ") as caught:
        check_tokenizers_agree(base, chat)
    assert f"token {first} is {ours[first]!r} in base and {theirs[first]!r} in the other" in str(caught.value)


def test_a_token_that_only_one_has_is_named():
    chat = byte_level_tokenizer()
    chat.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    size = len(byte_level_tokenizer())
    with pytest.raises(
        ValueError, match=f"token {size} is nothing in base and '<tool>' in the other .1 differ"
    ):
        check_tokenizers_agree(byte_level_tokenizer(), chat)


def test_a_token_matched_whole_by_one_only_is_named():
    # The id and the string are in both vocabularies, but only chat cuts texts at it.
    chat = byte_level_tokenizer()
    merged = next(token for token in chat.get_vocab() if token == "the")
    chat.add_tokens([merged])
    with pytest.raises(ValueError, match=r"added token \d+ is nothing in base and 'the' in the other"):
        check_tokenizers_agree(byte_level_tokenizer(), chat)


def test_a_bos_that_only_one_adds_shows_in_the_first_text():
    with pytest.raises(ValueError, match=r"the text .The quick.*\" is \[1, 56, .*\] in base and \[56, "):
        check_tokenizers_agree(byte_level_tokenizer(), byte_level_tokenizer(use_bos=False))


def test_a_normaliser_that_only_one_has_shows_in_a_text():
    with pytest.raises(ValueError, match=r"the text .The quick"):
        check_tokenizers_agree(byte_level_tokenizer(), byte_level_tokenizer(lowercase=True))


def test_own_texts_are_compared():
    pair = byte_level_tokenizer(), byte_level_tokenizer(lowercase=True)
    check_tokenizers_agree(*pair, texts=["all lower case"])
    with pytest.raises(ValueError, match="the text 'Upper'"):
        check_tokenizers_agree(*pair, texts=["all lower case", "Upper"])


def test_encode_adds_bos_to_plain_texts_only():
    tokenizer = byte_level_tokenizer()
    assert encode(tokenizer, "") == [1]
    templated = encode(tokenizer, "<|im_start|>", is_templated=True)
    assert templated == [tokenizer.convert_tokens_to_ids("<|im_start|>")]


def test_encode_never_cuts_or_warns_about_long_texts(recwarn):
    tokenizer = byte_level_tokenizer()
    tokenizer.model_max_length = 8
    assert len(encode(tokenizer, "!?" * 50)) == 101
    assert not recwarn.list
