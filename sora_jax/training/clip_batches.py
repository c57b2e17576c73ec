"""Batches of clips for the autoencoder, rendered or read a few steps ahead.

Batch b is a function of (seed, b): whether it is of videos or of images, and which clips. So the state is one number,
and any process can make any batch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from sora_jax.data.sources import FolderSource
from sora_jax.data.world import WorldSource
from sora_jax.errors import UserError
from sora_jax.training.numbered_batches import NumberedBatches

if TYPE_CHECKING:
    from sora_jax.config import DataConfig

Clips = UInt8[np.ndarray, "B T H W 3"]
TRIES = 20  # draws of clips for one batch before a folder is found to have too few


@runtime_checkable
class ClipSource(Protocol):
    """Clips to train an autoencoder on; can be pickled."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What must be the same for a run to go on, as JSON."""
        ...

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The same and how much there is, for the notes of a checkpoint."""
        ...

    def draw(self, number: int, rows: int, images: bool) -> Clips:
        """The clips of the rows from `number` * `rows` on: whole ones, or their first frames."""
        ...

    def held_out(self, rows: int) -> Clips:
        """Clips that `draw` never gives."""
        ...


@dataclass(frozen=True)
class ClipBatch:
    """`clip_batch(number)` is this part of a batch; see `ClipBatches`."""

    source: ClipSource
    data: DataConfig
    rows: int  # of a batch of videos
    images: int  # of one of images
    part: int
    parts: int

    def __call__(self, number: int) -> Clips:
        images = bool(np.random.default_rng((self.data.seed, number)).random() < self.data.image_share)
        return self.source.draw(number * self.parts + self.part, self.images if images else self.rows, images)


class ClipBatches(NumberedBatches):
    """Endless uint8 [B, T, H, W, 3]; with probability `image_share` a batch of images, T = 1.

    A batch of images has as many latents as one of videos: `rows` * (1 + (T - 1) / time_stride) of them.
    Of `parts` equal slices of every batch these are the rows of one, `part`; together they are the batch of one part.
    `data.workers` processes make them; 0: a thread of this one.
    """

    def __init__(
        self,
        source: ClipSource,
        data: DataConfig,
        rows: int,
        *,
        time_stride: int,
        part: int = 0,
        parts: int = 1,
        prefetch: int = 2,
    ):
        images = rows * (1 + (data.frames - 1) // time_stride)
        self.batch = ClipBatch(source, data, rows, images, part, parts)
        super().__init__(
            self.batch,
            {"source": dict(source.identity)},
            prefetch=prefetch,
            workers=data.workers,
            stalled_seconds=data.stalled_seconds,
        )


# ------------------------------------------------------------------------------------------------------------- sources


def clip_source(data: DataConfig, time_stride: int) -> ClipSource:
    """The world, or the folder that `data.source` names."""
    return WorldClipSource(data) if data.source == "world" else FolderClipSource(data, time_stride)


@dataclass(frozen=True)
class WorldClipSource:
    """Rows count through `data.clips` clips of the world, again and again; held out are combinations that these never
    show."""

    data: DataConfig

    @property
    def identity(self) -> dict[str, Any]:
        return {"world": self.data.seed}

    @property
    def manifest(self) -> dict[str, Any]:
        data = self.data
        size = {"clips": data.clips, "frames": data.frames, "height": data.height, "width": data.width}
        return {"world": "train", "seed": data.seed, **size, "mix": data.mix.identity}

    def draw(self, number: int, rows: int, images: bool) -> Clips:
        world = self._world("train", 1 if images else self.data.frames)
        return _frames(world, [(number * rows + row) % len(world) for row in range(rows)])

    def held_out(self, rows: int) -> Clips:
        return _frames(self._world("heldout", self.data.frames), range(rows))

    def _world(self, split: str, frames: int) -> WorldSource:
        data = self.data
        return WorldSource(data.seed, data.clips, split, frames, data.height, data.width, data.mix)


def _frames(world: WorldSource, indices: Sequence[int]) -> Clips:
    return np.stack([item["frames"] for item in world.batch(indices)])


class FolderClipSource:
    """Rows draw clips of a folder at random, with replacement; the last `data.held_out` clips are held out."""

    def __init__(self, data: DataConfig, time_stride: int):
        self._data = data
        self._folder = FolderSource(
            data.source,
            fps=data.fps,
            frames=data.frames,
            height=data.height,
            width=data.width,
            step=time_stride,
            captions=False,
        )
        self._kept = len(self._folder) - data.held_out
        if self._kept < 1:
            raise UserError(
                f"{data.source} has {len(self._folder)} clips and data.held_out is {data.held_out}: leave some over"
            )

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        return self._folder.identity

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        return self._folder.manifest

    def draw(self, number: int, rows: int, images: bool) -> Clips:
        data = self._data
        # Every row draws for itself, so that it does not matter which part of a batch it is in.
        streams = [np.random.default_rng((data.seed, number * rows + row, 1)) for row in range(rows)]
        found: dict[int, np.ndarray] = {}
        for _ in range(TRIES):
            missing = [row for row in range(rows) if row not in found]
            if not missing:
                return np.stack([found[row] for row in range(rows)])
            drawn = [int(streams[row].integers(self._kept)) for row in missing]
            clips = zip(missing, self._read(drawn, 1 if images else data.frames), strict=True)
            found |= {row: clip for row, clip in clips if clip is not None}
        raise UserError(
            f"{data.source} has hardly a clip of {data.frames} frames at {data.fps:g} fps: lower data.frames"
        )

    def held_out(self, rows: int) -> Clips:
        data = self._data
        read = self._read(range(self._kept, len(self._folder)), data.frames)
        found = [clip for clip in read if clip is not None]
        if not found:
            raise UserError(f"none of the last {data.held_out} clips of {data.source} has {data.frames} frames")
        return np.stack([found[row % len(found)] for row in range(rows)])

    def _read(self, indices: Sequence[int], frames: int) -> list[np.ndarray | None]:
        """None for a clip that is too short or cannot be read."""
        items = [item["frames"][:frames] if isinstance(item, dict) else None for item in self._folder.batch(indices)]
        return [clip if clip is not None and len(clip) == frames else None for clip in items]
