"""The checker that the suite runs every annotation of the package under (see conftest.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

# As PEP 484 has it, an int is taken where a float is asked for.
CONF = BeartypeConf(is_pep484_tower=True)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return beartype(conf=CONF)(function)
    except BeartypeDecorHintPep673Exception:
        return function  # `Self` means something to whole classes only, and functions come here one by one
