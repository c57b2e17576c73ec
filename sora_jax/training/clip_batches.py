"""Batches of clips for the autoencoder, rendered or read a few steps ahead.

Batch b is a function of (seed, b): whether it is of videos or of images, and which clips. So the state is one number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

    draw: Callable[[int, int, bool], Clips]  # (number b, rows, of images?) -> the clips of the rows from b * rows on
    held_out: Callable[[int], Clips]  # (rows) -> clips that `draw` never gives
    identity: Mapping[str, Any]  # what must be the same for a run to go on, as JSON
    manifest: Mapping[str, Any]  # the same and how much there is, for the notes of a checkpoint


class ClipBatches(NumberedBatches):
    """Endless uint8 [B, T, H, W, 3]; with probability `image_share` a batch of images, T = 1.

    A batch of images has as many latents as one of videos: `rows` * (1 + (T - 1) / time_stride) of them.
    Of `parts` equal slices of every batch these are the rows of one, `part`; together they are the batch of one part.
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
        self._source, self._data, self._rows = source, data, rows
        self._images = rows * (1 + (data.frames - 1) // time_stride)
        self._part, self._parts = part, parts
        super().__init__(self.batch, {"source": dict(source.identity)}, prefetch=prefetch)

    def batch(self, number: int) -> Clips:
        """This part of batch `number`."""
        images = bool(np.random.default_rng((self._data.seed, number)).random() < self._data.image_share)
        return self._source.draw(number * self._parts + self._part, self._images if images else self._rows, images)


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

    size = {"clips": data.clips, "frames": data.frames, "height": data.height, "width": data.width}
    manifest = {"world": "train", "seed": data.seed, **size, "mix": data.mix.identity}
    return ClipSource(
        draw, lambda rows: _frames(clips("heldout", data.frames), range(rows)), {"world": data.seed}, manifest
    )


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

    def read(indices: Sequence[int], frames: int) -> list[np.ndarray | None]:
        """None for a clip that is too short or cannot be read."""
        items = [item["frames"][:frames] if isinstance(item, dict) else None for item in source.batch(indices)]
        return [clip if clip is not None and len(clip) == frames else None for clip in items]

    def draw(number: int, rows: int, images: bool) -> Clips:
        # Every row draws for itself, so that it does not matter which part of a batch it is in.
        streams = [np.random.default_rng((data.seed, number * rows + row, 1)) for row in range(rows)]
        found: dict[int, np.ndarray] = {}
        for _ in range(TRIES):
            missing = [row for row in range(rows) if row not in found]
            if not missing:
                return np.stack([found[row] for row in range(rows)])
            drawn = [int(streams[row].integers(kept)) for row in missing]
            clips = zip(missing, read(drawn, 1 if images else data.frames), strict=True)
            found |= {row: clip for row, clip in clips if clip is not None}
        raise UserError(
            f"{data.source} has hardly a clip of {data.frames} frames at {data.fps:g} fps: lower data.frames"
        )

    def held_out(rows: int) -> Clips:
        found = [clip for clip in read(range(kept, len(source)), data.frames) if clip is not None]
        if not found:
            raise UserError(f"none of the last {data.held_out} clips of {data.source} has {data.frames} frames")
        return np.stack([found[row % len(found)] for row in range(rows)])

    return ClipSource(draw, held_out, source.identity, source.manifest)
