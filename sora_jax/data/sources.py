"""Clips as frames with captions, from a folder of your own or from the procedural world: what is encoded to latents.

A source has a length, `batch(indices)` and an `identity`. `batch` gives for each clip a dict

    frames          uint8 [T, H, W, 3]; T = 1 + step k, and T = 1 for an image
    captions        alternatives for the whole clip
    captions_image  alternatives for its first frame alone; may be empty
    shots           of a cut clip (frames, captions) of each shot, in place of `captions`; each has 1 + step k frames
    fps             frames a second
    source          where it comes from: "cats/a.mp4@17", "world/train/0/17"

or, as a string, why the clip had to be left out.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath

from sora_jax.data.captions import Captioned, read_folder
from sora_jax.data.clips import ClipRef, Window, cut_video, exact_rate
from sora_jax.data.latent_files import LatentHeader
from sora_jax.data.video_io import IMAGE_SUFFIXES, UnreadableError
from sora_jax.data.world import Mix, Shot, WorldSource, shot_captions
from sora_jax.errors import UserError
from sora_jax.shapes import Extent, Stride

MAX_UNREADABLE_SHARE = 0.05
SIZE_RUN = 64  # clips of one size that follow each other, in a world of several sizes
_CAPTIONS = 0x4C415445  # keeps these captions apart from those that the world's own source draws


@runtime_checkable
class Clips(Protocol):
    """What can be encoded."""

    def __len__(self) -> int: ...

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for two sources to have the same clips (but for how many), as JSON."""
        ...

    @property
    def extents(self) -> tuple[Extent, ...]:
        """(frames, height, width) of the longest clips of every size; the others are shorter, and as high and wide."""
        ...

    def batch(self, indices: Sequence[int]) -> list[dict[str, Any] | str]: ...


class FolderSource:
    """The clips of all videos and images in a folder.

    Videos are sampled at `fps` by their timestamps, cut into consecutive windows of at most `frames` frames, scaled to
    cover (height, width) and cropped; nothing is padded or stretched. A caption holds for all windows of its video.

    What cannot be decoded is left out and listed in `unreadable`; more than 5 % of it raise `UserError`. Videos too
    short for one clip are left out and listed in `too_short`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fps: float = 8.0,
        frames: int = 17,
        height: int = 64,
        width: int = 64,
        step: int = 4,
        captions: bool = True,
    ):
        if frames < 1 or (frames - 1) % step:
            low = 1 + (max(frames, 1) - 1) // step * step
            raise UserError(f"{frames} frames cannot be a clip: it has 1 + {step}k; nearest: {low} or {low + step}")
        if not 0 < fps < float("inf") or exact_rate(fps) == 0:
            raise UserError(f"fps must be a number > 0, not {fps}")
        if min(height, width) < 1:
            raise UserError(f"height and width must be >= 1, not {height} and {width}")
        self.path, self.fps, self.frames = os.fspath(path), fps, frames
        self.height, self.width, self.step = height, width, step
        self.unreadable: list[str] = []
        self.too_short: list[str] = []
        self._media = read_folder(path, captions=captions)
        self._clips: list[tuple[Captioned, ClipRef]] = []
        # Reading ahead in threads: files are read without the interpreter's lock.
        with ThreadPoolExecutor(max_workers=8) as pool:
            for media, cut in zip(self._media, pool.map(self._cut, self._media), strict=True):
                if isinstance(cut, UnreadableError):
                    self.unreadable.append(f"{media.name}: {cut}")
                elif cut:
                    self._clips += [(media, clip) for clip in cut]
                else:
                    self.too_short.append(media.name)
        self._refuse_many_unreadable(len(self._media))
        if not self._clips:
            raise UserError(f"no video in {self.path} is as long as {1 + step} frames at {fps:g} fps")

    def _cut(self, media: Captioned) -> list[ClipRef] | UnreadableError:
        if os.path.splitext(media.path)[1].lower() in IMAGE_SUFFIXES:
            return [ClipRef(media.path, Window(0, 1))]
        try:
            return cut_video(media.path, fps=self.fps, frames=self.frames, step=self.step)
        except UnreadableError as error:
            return error

    def __len__(self) -> int:
        return len(self._clips)

    @property
    def extents(self) -> tuple[Extent, ...]:
        return (Extent(self.frames, self.height, self.width),)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Clip `index`. Raises `UnreadableError`."""
        media, clip = self._clips[index]
        still = clip.timing is None
        return {
            "frames": clip.read(self.fps, height=self.height, width=self.width),
            "captions": list(media.captions),
            "captions_image": list(media.captions) if still else [],  # what a video's caption tells may come later
            "fps": self.fps,
            "source": self._name(index),
        }

    def header(self, index: int, stride: Stride, channels: int) -> LatentHeader:
        """What will be known of the latents of clip `index`, without reading a frame of it."""
        media, clip = self._clips[index]
        still, frames = clip.timing is None, clip.window.length
        shape = (1 + (frames - 1) // stride.time, self.height // stride.height, self.width // stride.width, channels)
        pixels = (frames, self.height, self.width)
        return LatentHeader(shape, media.captions, media.captions if still else (), self.fps, self._name(index), pixels)

    def batch(self, indices: Sequence[int]) -> list[dict[str, Any] | str]:
        return [self._read(index) for index in indices]

    def _read(self, index: int) -> dict[str, Any] | str:
        try:
            return self[index]
        except UnreadableError as error:
            reason = f"{self._name(index)}: {error}"
        self.unreadable.append(reason)
        self._refuse_many_unreadable(len(self._clips) + len(self.unreadable))
        return reason

    @property
    def identity(self) -> dict[str, Any]:
        listing = hashlib.sha256()
        for index, (media, clip) in enumerate(self._clips):
            listing.update(repr((self._name(index), clip.window.length, media.captions)).encode())
        return {
            "folder": os.path.abspath(self.path) if "://" not in self.path else self.path,
            "fps": self.fps,
            "frames": self.frames,
            "height": self.height,
            "width": self.width,
            "clips": listing.hexdigest(),
        }

    @property
    def manifest(self) -> dict[str, Any]:
        """What is there, as JSON: the settings of `identity`, how many clips and bytes, and a digest of names, lengths,
        captions and sizes. When files were changed does not count: their copy on another machine is the same data."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode())
        with ThreadPoolExecutor(max_workers=8) as pool:
            sizes = list(pool.map(lambda media: epath.Path(media.path).stat().length, self._media))
        for media, size in zip(self._media, sizes, strict=True):
            digest.update(repr((media.name, size)).encode())
        return {**self.identity, "clips": len(self), "bytes": sum(sizes), "sha256": digest.hexdigest()}

    def _name(self, index: int) -> str:
        media, clip = self._clips[index]
        return media.name if clip.timing is None else f"{media.name}@{clip.window.start}"

    def _refuse_many_unreadable(self, total: int) -> None:
        bad = self.unreadable
        if len(bad) > MAX_UNREADABLE_SHARE * total:
            listing = "; ".join(bad[:5]) + (f"; and {len(bad) - 5} more" if len(bad) > 5 else "")
            raise UserError(
                f"{len(bad)} of {total} files or clips in {self.path} cannot be read, more than the "
                f"{MAX_UNREADABLE_SHARE:.0%} that may be left out: {listing}"
            )


class WorldClips:
    """Clips of the procedural world, each with several captions: 4 short and 2 dense ones of the clip, and of its first
    frame 2 short ones and a dense one.

    With `sizes`, (height, width) pairs, these take turns, `SIZE_RUN` clips each, so that most batches are of one size;
    without, all clips are `height` x `width`. With `shots`, the frames of each shot of a clip, so do these, each for as
    many turns as there are sizes: `shots=((17,), (9, 9))` cuts every second clip in two. Each shot of a cut clip has
    the captions that a whole clip has.
    """

    def __init__(
        self,
        clips: int,
        *,
        seed: int = 0,
        split: str = "train",
        frames: int = 17,
        height: int = 64,
        width: int = 64,
        sizes: Sequence[tuple[int, int]] = (),
        shots: Sequence[tuple[int, ...]] = (),
        mix: Mix | None = None,
    ):
        if clips < 1:
            raise UserError(f"a world has at least 1 clip, not {clips}")
        if not all(shots):
            raise UserError("a clip of the world has at least one shot")
        self._shots = tuple(shots)
        self._sizes = tuple(sizes) or ((height, width),)
        self._worlds = [
            WorldSource(seed, clips, split, frames=sum(cut), height=h, width=w, mix=mix or Mix(), shots=cut)
            for cut in shots or ((frames,),)
            for h, w in self._sizes
        ]

    def __len__(self) -> int:
        return len(self._worlds[0])

    @property
    def identity(self) -> dict[str, Any]:
        world = self._worlds[0]
        size: dict[str, Any] = {"height": world.height, "width": world.width}
        if len(self._sizes) > 1:
            size = {"sizes": [list(size) for size in self._sizes]}
        cut: dict[str, Any] = {"shots": [list(shots) for shots in self._shots]}
        return {
            "world": world.split,
            "seed": world.seed,
            **(cut if self._shots else {"frames": world.frames}),
            **size,
            "mix": world.mix.identity,
        }

    @property
    def extents(self) -> tuple[Extent, ...]:
        lengths = {frames for world in self._worlds for frames in world.shots or (world.frames,)}
        return tuple(Extent(frames, *size) for frames in sorted(lengths, reverse=True) for size in self._sizes)

    def batch(self, indices: Sequence[int]) -> list[dict[str, Any] | str]:
        made: dict[int, dict[str, Any]] = {}
        sizes, cuts = len(self._sizes), len(self._worlds) // len(self._sizes)
        for number, world in enumerate(self._worlds):
            turn = [(index, index // SIZE_RUN) for index in indices]
            here = [index for index, t in turn if (t // sizes % cuts, t % sizes) == divmod(number, sizes)]
            made |= {index: self._captioned(item) for index, item in zip(here, world.batch(here), strict=True)}
        return [made[index] for index in indices]

    def _captioned(self, item: dict[str, Any]) -> dict[str, Any]:
        scene = item["scene"]
        rng = np.random.default_rng((_CAPTIONS, scene.seed, scene.index))
        captions = [self._captions(shot, rng) for shot in scene.shots]
        short_still, dense_still = zip(*(shot_captions(scene.shots[0], rng, image=True) for _ in range(2)), strict=True)
        one = len(captions) == 1
        shots = [(shot.frames, said) for shot, said in zip(scene.shots, captions, strict=True)]
        return {
            "frames": item["frames"],
            "captions": captions[0] if one else [],
            **({} if one else {"shots": shots}),
            "captions_image": [*short_still, dense_still[0]],
            "fps": float(item["fps"]),
            "source": f"world/{self._worlds[0].split}/{scene.seed}/{scene.index}",
        }

    def _captions(self, shot: Shot, rng: np.random.Generator) -> list[str]:
        short, dense = zip(*(shot_captions(shot, rng) for _ in range(4)), strict=True)
        return [*short, *dense[:2]]
