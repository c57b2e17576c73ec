"""Held against the reference: PyPI's `diffusers` and `transformers` on torch (`pip install -e '.[test,parity]'`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import pytest

NEEDED = ("torch", "diffusers", "transformers", "tokenizers", "ftfy")
ABSENT = [name for name in NEEDED if importlib.util.find_spec(name) is None]


# What the reference's own code warns of.
THEIRS = (
    "ignore:Already found a `peft_config` attribute:UserWarning",
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.parity)
            for warning in THEIRS:
                item.add_marker(pytest.mark.filterwarnings(warning))
            if ABSENT:
                item.add_marker(pytest.mark.skip(reason=f"the reference is not installed: {', '.join(ABSENT)}"))


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield
