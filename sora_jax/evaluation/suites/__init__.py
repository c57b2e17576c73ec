"""What `sora-jax eval` can ask of a model, one small file each: `run(pipe, asked)` makes the report that is printed.

Each turns a pipeline into the functions of arrays that the judges beside this folder take, which know no model.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sora_jax.canvas import Canvas
from sora_jax.codec import Codec
from sora_jax.data.world import Mix
from sora_jax.pipeline import Pipeline
from sora_jax.shapes import Extent
from sora_jax.training.pretrained import load_autoencoder

Clips = UInt8[np.ndarray, "B T H W 3"]


@dataclass(frozen=True)
class Asked:
    """What the command line says of an evaluation; None where the model or the suite has a default."""

    n: int
    seed: int
    batch_size: int
    frames: int | None
    height: int | None
    width: int | None
    settings: dict[str, Any]  # of `Pipeline.sample_canvases`
    mix: Mix | None
    source: str
    shots: tuple[int, ...] | None
    autoencoder: str | None  # in place of the model's, by name
    progress: Callable[[int, int], None]

    def extent(self, pipe: Pipeline) -> Extent:
        return pipe.extent(self.frames, None, self.height, self.width)

    def there_and_back(self, pipe: Pipeline) -> Callable[[Clips], Clips]:
        """Clips through the autoencoder that was named, else through the model's."""
        codec = Codec(*load_autoencoder(self.autoencoder), pipe.dtype) if self.autoencoder else pipe
        return lambda clips: codec.decode(codec.encode(clips))

    def make(self, pipe: Pipeline, drawn: Sequence[Canvas], seeds: Sequence[int]) -> np.ndarray:
        """Clips uint8 [b, T, H, W, 3] of canvases of one layout."""
        videos = pipe.sample_canvases(drawn, seeds=seeds, batch_size=self.batch_size, **self.settings)
        return np.stack([video.frames for video in videos if video.frames is not None])


def run(name: str, pipe: Pipeline, asked: Asked) -> dict[str, Any]:
    """The report of a suite: {"suite", "n", "metrics": {name: {"value", "low", "high", "n"}}, ...}."""
    return importlib.import_module(f"{__name__}.{name}").run(pipe, asked)
