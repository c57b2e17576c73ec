"""Text to token ids: the bytes of ByT5, which the world model reads, and the pieces of UMT5, which Wan reads.

A tokenizer has `max_length`, `pad_id`, `vocab_size`, `encode`, and `attends_padding`: whether the places that a text
leaves empty are read by the transformer, as zeros (Wan was trained so), or are not there at all. `places` are the ids
of all that is read, empty ones as `pad_id`, which no text makes.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sora_jax.errors import UserError

SPECIALS = ("<pad>", "</s>", "<unk>")


@dataclass(frozen=True)
class ByteTokenizer:
    """The bytes of a text, as ByT5 numbers them (Xue et al. 2022, arXiv:2105.13626): no vocabulary, any language.

        0 padding · 1 end of text · 2 unknown · byte b -> b + 3 · 259..383 sentinels, which no text makes

    Nothing in a text is special: "</s>" in a prompt is four letters, not the end of it. `max_length` is the most ids a
    text may have, end of text included.
    """

    max_length: int = 512

    attends_padding: ClassVar[bool] = False
    vocab_size: ClassVar[int] = 384
    pad_id: ClassVar[int] = 0
    eos_id: ClassVar[int] = 1
    first_byte: ClassVar[int] = len(SPECIALS)

    def encode(self, text: str) -> list[int]:
        """The ids of the UTF-8 bytes of `text`, then `eos_id`; the empty text is `[eos_id]`.

        Raises `UserError` when they are more than `max_length` (a text is never cut), and for what is not text.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"character {error.start + 1} of the prompt is not text ({error.reason})") from None
        if len(data) >= self.max_length:
            raise UserError(
                f"the prompt is {len(data)} bytes long and {self.max_length - 1} fit: shorten it by "
                f"{len(data) - self.max_length + 1}"
            )
        return [*(byte + self.first_byte for byte in data), self.eos_id]

    def places(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the bytes among `ids`; a cut character becomes U+FFFD."""
        data = bytes(i - self.first_byte for i in ids if self.first_byte <= i < self.first_byte + 256)
        return data.decode(errors="replace")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ByteTokenizer:
        """From a tokenizer_config.json of `transformers`. Raises `UserError` when it describes another tokenizer."""
        if (kind := values.get("tokenizer_class")) != "ByT5Tokenizer":
            raise UserError(f'tokenizer class "{kind}" is not supported; known: ByT5Tokenizer')
        limit = values.get("model_max_length", cls.max_length)
        return cls(cls.max_length if limit > 10**9 else int(limit))  # transformers writes 1e30 for no limit

    def to_dict(self) -> dict[str, Any]:
        """As `transformers` reads it."""
        pad, eos, unk = SPECIALS
        return {
            "tokenizer_class": "ByT5Tokenizer",
            "model_max_length": self.max_length,
            "pad_token": pad,
            "eos_token": eos,
            "unk_token": unk,
            "extra_ids": self.vocab_size - 256 - len(SPECIALS),
        }


WAN_TEXT_LENGTH = 512  # places that a prompt has in every model of the Wan family
MISSING = "reading prompts as Wan does needs the package {}: pip install 'sora-jax[weights]'"


def clean_prompt(text: str) -> str:
    """As Wan's prompts were cleaned in training: mended encodings (ftfy), HTML entities read twice, single spaces."""
    try:
        import ftfy
    except ImportError:
        raise UserError(MISSING.format("ftfy")) from None
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


@dataclass(frozen=True)
class SubwordTokenizer:
    """UMT5's: a text is cleaned and cut into pieces of a vocabulary; `definition` is the text of its tokenizer.json."""

    definition: str = field(repr=False)
    config: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)  # of its tokenizer_config.json
    max_length: int = WAN_TEXT_LENGTH

    attends_padding: ClassVar[bool] = True

    @functools.cached_property
    def _pieces(self) -> Any:
        return _read_pieces(self.definition)

    @property
    def vocab_size(self) -> int:
        return self._pieces.get_vocab_size()

    @property
    def pad_id(self) -> int:
        return self._special("pad_token", SPECIALS[0])

    @property
    def eos_id(self) -> int:
        return self._special("eos_token", SPECIALS[1])

    def _special(self, key: str, usual: str) -> int:
        token = self.config.get(key, usual)
        name = token.get("content") if isinstance(token, Mapping) else token  # a description of the token, or its name
        if not isinstance(name, str):
            raise UserError(f"tokenizer_config.json names no {key}, but {token!r}")
        if (found := self._pieces.token_to_id(name)) is None:
            raise UserError(f'tokenizer.json has no {key} "{name}"')
        return found

    def encode(self, text: str) -> list[int]:
        """The ids of the pieces of the cleaned text, then `eos_id`.

        Raises `UserError` when they are more than `max_length`: a text is never cut.
        """
        ids = self._pieces.encode(clean_prompt(text)).ids
        if len(ids) > self.max_length:
            raise UserError(
                f"the prompt is {len(ids) - 1} pieces long and {self.max_length - 1} fit: shorten it by "
                f"{len(ids) - self.max_length}"
            )
        return list(ids)

    def places(self, text: str) -> list[int]:
        ids = self.encode(text)
        return ids + [self.pad_id] * (self.max_length - len(ids))

    @classmethod
    def from_files(cls, definition: str, config: Mapping[str, Any]) -> SubwordTokenizer:
        """From the texts of tokenizer.json and tokenizer_config.json. Raises `UserError` when they are not UMT5's kind:
        a text must end with the end-of-text id."""
        limit = config.get("model_max_length", WAN_TEXT_LENGTH)
        if not isinstance(limit, int | float) or not limit >= 1:
            raise UserError(f"tokenizer_config.json: model_max_length must be a number >= 1, not {limit!r}")
        made = cls(definition, dict(config), int(min(limit, WAN_TEXT_LENGTH)))
        if made._pieces.encode("a").ids[-1] != made.eos_id:
            raise UserError("tokenizer.json does not end a text with its eos_token: it is not UMT5's")
        made.pad_id  # noqa: B018  says that there is none
        return made

    def to_dict(self) -> dict[str, Any]:
        """As `transformers` reads it."""
        return dict(self.config)


def _read_pieces(definition: str) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError(MISSING.format("tokenizers")) from None
    try:
        pieces = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # noqa: BLE001  the package raises nothing narrower
        raise UserError(f"tokenizer.json cannot be read: {str(error).splitlines()[0]}") from None
    pieces.no_truncation()
    pieces.no_padding()
    return pieces


Tokenizer = ByteTokenizer | SubwordTokenizer
