"""What a small model has read: the words of its training captions, for a warning when a prompt has others."""

from __future__ import annotations

import re
from collections.abc import Iterable


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, in order; hyphens and apostrophes belong to them.

    >>> words_of("A red ball, sliding up-left!")
    ['a', 'red', 'ball', 'sliding', 'up-left']
    """
    return re.findall(r"[^\W_]+(?:[-'][^\W_]+)*", text.lower())


def unknown_words(prompt: str, known: Iterable[str]) -> list[str]:
    """The words of `prompt` that are not among `known`, each once."""
    known = set(known)
    return [word for word in dict.fromkeys(words_of(prompt)) if word not in known]


def nearest_prompt(prompt: str, prompts: Iterable[str]) -> str | None:
    """Of `prompts`, the one that shares the most words with `prompt` (Jaccard's index); the first of equals."""
    words = set(words_of(prompt))

    def alike(other: str) -> float:
        theirs = set(words_of(other))
        return len(words & theirs) / max(len(words | theirs), 1)

    return max(prompts, key=alike, default=None)
