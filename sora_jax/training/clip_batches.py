"""Batches of clips for the autoencoder, rendered or read a few steps ahead.

Batch b is a function of (seed, b): whether it is of videos or of images, and which clips. So the state is one number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

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


class ClipSource(NamedTuple):
    """Clips to train an autoencoder on."""

    draw: Callable[[int, int, bool], Clips]  # (number of the batch, rows, of images?) -> clips
    held_out: Callable[[int], Clips]  # (rows) -> clips that `draw` never gives
    identity: Mapping[str, Any]  # what must be the same for a run to go on, as JSON


class ClipBatches(NumberedBatches):
    """Endless uint8 [B, T, H, W, 3]; with probability `image_share` a batch of images, T = 1.

    A batch of images has as many latents as one of videos: `rows` * (1 + (T - 1) / time_stride) of them.
    With several processes, `rows` are those of this one, which makes every `process_count`-th part of the whole.
    """

    def __init__(
        self,
        source: ClipSource,
        data: DataConfig,
        rows: int,
        *,
        time_stride: int,
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 2,
    ):
        self._source, self._data, self._rows = source, data, rows
        self._images = rows * (1 + (data.frames - 1) // time_stride)
        self._process_index, self._process_count = process_index, process_count
        super().__init__(self.batch, {"processes": process_count, "source": dict(source.identity)}, prefetch=prefetch)

    def batch(self, number: int) -> Clips:
        """This process's part of batch `number`."""
        images = bool(np.random.default_rng((self._data.seed, number)).random() < self._data.image_share)
        part = number * self._process_count + self._process_index
        return self._source.draw(part, self._images if images else self._rows, images)


# ------------------------------------------------------------------------------------------------------------- sources


def clip_source(data: DataConfig, time_stride: int) -> ClipSource:
    """The world, or the folder that `data.source` names."""
    return _world(data) if data.source == "world" else _folder(data, time_stride)


def _world(data: DataConfig) -> ClipSource:
    """Part b takes the clips from b * rows on, of `data.clips`; held out are combinations that these never show."""

    def clips(split: str, frames: int) -> WorldSource:
        return WorldSource(data.seed, data.clips, split, frames, data.height, data.width, data.mix)

    def draw(number: int, rows: int, images: bool) -> Clips:
        source = clips("train", 1 if images else data.frames)
        return _frames(source, [(number * rows + row) % len(source) for row in range(rows)])

    return ClipSource(draw, lambda rows: _frames(clips("heldout", data.frames), range(rows)), {"world": data.seed})


def _frames(source: WorldSource, indices: Any) -> Clips:
    return np.stack([item["frames"] for item in source.batch(indices)])


def _folder(data: DataConfig, time_stride: int) -> ClipSource:
    """Part b draws clips at random, with replacement; the last `data.held_out` clips are held out."""
    source = FolderSource(
        data.source,
        fps=data.fps,
        frames=data.frames,
        height=data.height,
        width=data.width,
        step=time_stride,
        captions=False,
    )
    kept = len(source) - data.held_out
    if kept < 1:
        raise UserError(f"{data.source} has {len(source)} clips and data.held_out is {data.held_out}: leave some over")

    def gather(indices: Any, frames: int, rows: int) -> list[np.ndarray]:
        read = [item["frames"] for item in source.batch(indices) if isinstance(item, dict)]
        return [clip[:frames] for clip in read if len(clip) >= frames][:rows]

    def draw(number: int, rows: int, images: bool) -> Clips:
        rng = np.random.default_rng((data.seed, number, 1))
        found: list[np.ndarray] = []
        for _ in range(TRIES):
            found += gather(rng.integers(kept, size=rows).tolist(), 1 if images else data.frames, rows - len(found))
            if len(found) == rows:
                return np.stack(found)
        raise UserError(
            f"{data.source} has hardly a clip of {data.frames} frames at {data.fps:g} fps: lower data.frames"
        )

    def held_out(rows: int) -> Clips:
        found = gather(range(kept, len(source)), data.frames, rows)
        if not found:
            raise UserError(f"none of the last {data.held_out} clips of {data.source} has {data.frames} frames")
        return np.stack([found[row % len(found)] for row in range(rows)])

    return ClipSource(draw, held_out, source.identity)
