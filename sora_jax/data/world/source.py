"""The world as a random-access data source: item i is the same wherever and whenever it is made."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sora_jax.data.world.captions import shot_captions
from sora_jax.data.world.render import render
from sora_jax.data.world.sampling import sample_scenes
from sora_jax.data.world.scene import FPS, Mix

_CAPTION_STREAM = 0x43415054


@dataclass(frozen=True)
class WorldSource:
    """`n` clips of the world that `seed` makes; a sequence, picklable, nothing in memory.

    Item i is a dict:
      frames    uint8 [T, H, W, 3]
      captions  alternatives for the whole clip: [short, dense]; of a cut clip, those of its first shot
      shots     a list of (number of frames, [short, dense]), one per shot
      fps       8
      scene     the truth (`Scene`)
    """

    seed: int
    n: int
    split: str = "train"
    frames: int = 17
    height: int = 64
    width: int = 64
    mix: Mix = field(default_factory=Mix)
    shots: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = operator.index(index)
        if not -self.n <= index < self.n:
            raise IndexError(f"clip {index} of a source of {self.n}")
        return self.batch([index % self.n])[0]

    def batch(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several items at once: several times as fast as one by one, and the same."""
        if not len(indices):
            return []
        scenes = sample_scenes(
            self.seed,
            [operator.index(i) for i in indices],
            split=self.split,
            frames=self.frames,
            height=self.height,
            width=self.width,
            mix=self.mix,
            shots=self.shots,
        )
        items = []
        for scene, frames in zip(scenes, render(scenes), strict=True):
            rng = np.random.default_rng((_CAPTION_STREAM, scene.seed, scene.index))
            shots = [(shot.frames, list(shot_captions(shot, rng))) for shot in scene.shots]
            items.append({"frames": frames, "captions": list(shots[0][1]), "shots": shots, "fps": FPS, "scene": scene})
        return items
