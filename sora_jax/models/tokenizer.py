"""Text to bytes to token ids, as ByT5 numbers them (Xue et al. 2022, arXiv:2105.13626): no vocabulary, any language.

    0 padding · 1 end of text · 2 unknown · byte b -> b + 3 · 259..383 sentinels, which no text makes

Nothing in a text is special: "</s>" in a prompt is four letters, not the end of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sora_jax.errors import UserError

SPECIALS = ("<pad>", "</s>", "<unk>")


@dataclass(frozen=True)
class ByteTokenizer:
    """`max_length` is the most ids a text may have, end of text included."""

    max_length: int = 512

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
