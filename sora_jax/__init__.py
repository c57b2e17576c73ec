"""sora_jax: text to video in JAX.

    from sora_jax import Pipeline

    pipe = Pipeline.load("world")
    pipe.sample("a red ball bounces on a blue floor").save("ball.mp4")

Importing the package starts no JAX backend and sets no global flag; its names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sora_jax.errors import UserError
    from sora_jax.media import Media, read_media, write_media
    from sora_jax.pipeline import Pipeline
    from sora_jax.record import Record
    from sora_jax.video import Video

# The module that defines each public name.
_HOMES = {
    "Media": "media",
    "Pipeline": "pipeline",
    "Record": "record",
    "UserError": "errors",
    "Video": "video",
    "read_media": "media",
    "write_media": "media",
}

__all__ = ["Media", "Pipeline", "Record", "UserError", "Video", "__version__", "read_media", "write_media"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"sora_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
