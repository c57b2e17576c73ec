"""ByT5's numbers, and that no text is changed."""

import sys

import numpy as np
import pytest

from sora_jax.errors import UserError
from sora_jax.models.tokenizer import ByteTokenizer


def test_ids_are_bytes_plus_three_and_an_end():
    assert ByteTokenizer().encode("a é") == [97 + 3, 32 + 3, 0xC3 + 3, 0xA9 + 3, 1]
    assert ByteTokenizer().encode("") == [1]


def test_every_character_there_is_comes_back():
    points = [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]  # all but the surrogates, which are not characters
    text = "".join(map(chr, points))
    ids = ByteTokenizer(max_length=10**7).encode(text)
    assert ByteTokenizer().decode(ids) == text
    assert min(ids[:-1]) >= 3
    assert max(ids) < 259 <= ByteTokenizer.vocab_size


def test_mixed_texts_come_back_whatever_surrounds_them():
    rng = np.random.default_rng(0)
    for _ in range(200):
        points = rng.choice([*range(1, 300), *range(0x4E00, 0x4E80), *range(0x1F600, 0x1F640)], rng.integers(0, 60))
        text = "".join(map(chr, points))
        ids = ByteTokenizer().encode(text)
        assert ByteTokenizer().decode([0, *ids, 0, 2, 300]) == text
        assert len(ids) == len(text.encode()) + 1


def test_names_of_special_tokens_are_plain_text():
    assert ByteTokenizer().encode("</s>") == [*(b + 3 for b in b"</s>"), 1]


def test_a_cut_character_is_shown_as_such():
    assert ByteTokenizer().decode(ByteTokenizer().encode("aé")[:2]) == "a\ufffd"


def test_too_long_a_text_is_refused_with_the_limit():
    tokenizer = ByteTokenizer(max_length=8)
    assert len(tokenizer.encode("1234567")) == 8
    with pytest.raises(UserError, match=r"9 bytes long and 7 fit: shorten it by 2$"):
        tokenizer.encode("12345678\n")


def test_bytes_that_are_no_text_are_refused():
    """What the command line hands over for an argument that is not UTF-8."""
    with pytest.raises(UserError, match="character 3 of the prompt is not text"):
        ByteTokenizer().encode(b"a \xff".decode(errors="surrogateescape"))


def test_config_goes_through_the_form_of_transformers():
    assert ByteTokenizer.from_dict(ByteTokenizer(77).to_dict()) == ByteTokenizer(77)
    assert (
        ByteTokenizer.from_dict({"tokenizer_class": "ByT5Tokenizer", "model_max_length": int(1e30)}).max_length == 512
    )
    with pytest.raises(UserError, match='"T5TokenizerFast" is not supported'):
        ByteTokenizer.from_dict({"tokenizer_class": "T5TokenizerFast"})
