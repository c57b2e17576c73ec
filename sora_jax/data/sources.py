"""Clips of a folder of your own, as frames with captions: what `sora-jax encode FOLDER` reads."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sora_jax.data.captions import Captioned, read_folder
from sora_jax.data.clips import ClipRef, Window, cut_video, exact_rate
from sora_jax.data.video_io import IMAGE_SUFFIXES, UnreadableError
from sora_jax.errors import UserError

MAX_UNREADABLE_SHARE = 0.05


class FolderSource:
    """The clips of all videos and images in a folder, by number; each item is a dict:

      frames    uint8 [T, height, width, 3], T = 1 + step k <= `frames`, at `fps` frames a second; images have T = 1
      captions  those of the video or image
      fps       the rate
      source    its name in the folder, and for a video the number of its first frame: "cats/a.mp4@17"

    Videos are sampled by their timestamps, cut into consecutive windows, scaled to cover and cropped; nothing is padded
    or stretched. A caption holds for all windows of its video.

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

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Clip `index`. Raises `UnreadableError`."""
        media, clip = self._clips[index]
        return {
            "frames": clip.read(self.fps, height=self.height, width=self.width),
            "captions": list(media.captions),
            "fps": self.fps,
            "source": self._name(index),
        }

    def read(self, index: int) -> dict[str, Any] | None:
        """Clip `index`, or None when it cannot be decoded, which is then listed."""
        try:
            return self[index]
        except UnreadableError as error:
            self.unreadable.append(f"{self._name(index)}: {error}")
            self._refuse_many_unreadable(len(self._clips) + len(self.unreadable))
            return None

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for two sources to have the same clips, as JSON."""
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
