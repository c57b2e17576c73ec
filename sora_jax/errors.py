"""The one exception that means "what you asked for cannot be done as asked".

Everything a user can get wrong raises `UserError` with one line: what, why, and the nearest thing that works.
The command line prints that line and exits with code 2; a library caller catches it like any `ValueError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A request that cannot be met as asked; the message is one clear line."""


class NoRoomError(UserError):
    """A disk is full. Threads that were writing to it may still be there, and have much to say about it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint that ends an "unknown X" message.

    >>> nearest("eular", ["euler", "heun"])
    'did you mean "euler"? (known: euler, heun)'
    >>> nearest("zzz", ["euler", "heun"])
    'known: euler, heun'
    """
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    listing = ", ".join(known)
    return f'did you mean "{close[0]}"? (known: {listing})' if close else f"known: {listing}"
