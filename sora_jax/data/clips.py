"""Cutting videos into clips: consecutive windows of 1 + 4k frames, sampled at one rate; never padded."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from sora_jax.data.video_io import Timing, count_frames, probe, read_image, read_video


class Window(NamedTuple):
    """Frames [start, start + length) of a video at the rate of the clips."""

    start: int
    length: int


def windows(count: int, frames: int, step: int = 4) -> list[Window]:
    """Consecutive windows of `frames` frames of a video that has `count`; the last may be shorter, of 1 + step k.

    What is left over then, at most `step` frames, is not used.

    >>> windows(42, 17)
    [Window(start=0, length=17), Window(start=17, length=17), Window(start=34, length=5)]
    """
    cut = [Window(start, frames) for start in range(0, count - frames + 1, frames)]
    end = len(cut) * frames
    length = 1 + step * ((count - end - 1) // step)
    return [*cut, Window(end, length)] if length > step else cut


@dataclass(frozen=True)
class ClipRef:
    """Where a clip is: a window of a video, or (without timing) an image."""

    path: str
    window: Window
    timing: Timing | None = None

    def read(self, fps: float, *, height: int, width: int) -> UInt8[np.ndarray, "T height width 3"]:
        """Its frames. Raises `UnreadableError`."""
        if self.timing is None:
            return read_image(self.path, height=height, width=width)
        rate = exact_rate(fps)
        times = [Fraction(self.window.start + index) / rate for index in range(self.window.length)]
        return read_video(self.path, self.timing, times, height=height, width=width)


def exact_rate(fps: float) -> Fraction:
    """29.97 is 30000/1001, as the makers of cameras mean it."""
    return Fraction(fps).limit_denominator(1001)


def cut_video(path: str, *, fps: float, frames: int, step: int = 4) -> list[ClipRef]:
    """The clips of a video; none when it is shorter than 1 + step frames. Raises `UnreadableError`."""
    timing = probe(path)
    return [ClipRef(path, window, timing) for window in windows(count_frames(timing, exact_rate(fps)), frames, step)]
