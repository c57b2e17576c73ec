"""sora_jax: text to video in JAX.

    from sora_jax import Pipeline

    pipe = Pipeline.load("world")
    pipe.sample("a red ball bounces on a blue floor").save("ball.mp4")

Importing the package starts no JAX backend and sets no global flag; the names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Each public name and the module that defines it.
_HOMES = {
    "Media": "sora_jax.media",
    "Pipeline": "sora_jax.pipeline",
    "Record": "sora_jax.media",
    "UserError": "sora_jax.errors",
    "Video": "sora_jax.pipeline",
    "read_media": "sora_jax.media",
    "write_media": "sora_jax.media",
}

__all__ = [*sorted(_HOMES), "__version__"]

if TYPE_CHECKING:
    from sora_jax.errors import UserError
    from sora_jax.media import Media, Record, read_media, write_media
    from sora_jax.pipeline import Pipeline, Video


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
