"""Decoding of a user's videos and images: frames at the moments asked for, upright, at the size asked for.

PyAV does the decoding (it brings FFmpeg's libraries along) and Pillow the resizing. Times are exact fractions of a
second from the first shown frame, by the timestamps in the file: a rate in a header says little about phones' videos.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import math
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".gif", ".avi", ".m4v")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# A file whose frames end before this share of the length that its header promises was cut short.
_WHOLE = 0.8


class UnreadableError(ValueError):
    """A video or image that cannot be decoded: missing, truncated, garbage, or of an unknown kind."""


class Timing(NamedTuple):
    """When the frames of a video are shown, in seconds."""

    start: int  # timestamp of the first frame, in ticks
    tick: Fraction  # what timestamps are multiples of
    length: Fraction  # from the beginning of the first frame to the end of the last
    slack: Fraction  # how much later than the truth a timestamp may say: it was rounded to the tick
    stamps: tuple[int, ...] = ()  # of all frames, for a container that gives frames wrong ones


def probe(path: str | os.PathLike[str]) -> Timing:
    """The timing of a video from the timestamps of its packets, which are read but not decoded.

    Raises `UnreadableError`.
    """
    with _opened(path) as (container, stream):
        packets = [(_pts(packet), packet.duration or 0) for packet in _shown(container, stream)]
        if not packets:
            raise UnreadableError("it has no frames")
        (first, _), (last, duration) = min(packets), max(packets)
        tick = Fraction(stream.time_base)
        usual = Fraction(last - first, max(len(packets) - 1, 1)) or Fraction(duration or 1)
        length = (last + (duration or usual) - first) * tick
        # A tick about as long as a frame counts frames, exactly; a shorter one measures time, rounded.
        slack = tick / 2 if usual >= 4 else Fraction(0)
        promised = Fraction(container.duration or 0, 1_000_000)
        if length < _WHOLE * promised and not container.streams.audio:
            raise UnreadableError(f"it ends after {float(length):.1f} of {float(promised):.1f} seconds: truncated")
        if len(packets) < _WHOLE * stream.frames:
            raise UnreadableError(f"it has {len(packets)} of {stream.frames} frames: truncated")
        # AVI has no timestamps. FFmpeg's guesses are right as a set, but not in order when there are B-frames.
        stamps = tuple(sorted(stamp for stamp, _ in packets)) if container.format.name == "avi" else ()
    return Timing(first, tick, length, slack, stamps)


def count_frames(timing: Timing, fps: Fraction) -> int:
    """How many frames `fps` samples of a video: those at 0, 1/fps, 2/fps ... before its end."""
    # The end is rounded twice, with the last frame's beginning and with its duration.
    return max(1, math.ceil((timing.length - 2 * timing.slack) * fps))


def read_video(
    path: str | os.PathLike[str], timing: Timing, times: Sequence[Fraction], *, height: int, width: int
) -> UInt8[np.ndarray, "T height width 3"]:
    """For each of the rising `times` the frame shown then (the last that began at or before it), fitted by `fit`.

    Raises `UnreadableError`.
    """
    wanted = collections.deque(times)
    found: list[np.ndarray] = []
    with _opened(path) as (container, stream):
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        shown: Any = None  # the newest frame so far
        fitted: np.ndarray | None = None
        for begins, frame in _timed_frames(container, stream, timing, wanted[0]):
            while shown is not None and wanted and wanted[0] < begins - timing.slack:
                fitted = _upright(shown, aspect, height, width) if fitted is None else fitted
                found.append(fitted)
                wanted.popleft()
            if not wanted:
                break
            shown, fitted = frame, None
        if shown is None:
            raise UnreadableError(f"no frame at {float(wanted[0]):.2f} s")
        # The last frame stays on until the video ends.
        found += [_upright(shown, aspect, height, width)] * len(wanted)
    return np.stack(found)


def read_image(path: str | os.PathLike[str], *, height: int, width: int) -> UInt8[np.ndarray, "1 height width 3"]:
    """An image as a video of one frame: upright by its EXIF orientation, on white where it is transparent."""
    from PIL import Image, ImageOps

    try:
        with Image.open(_source(path)) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            return fit(np.asarray(upright.convert("RGB")), height, width)[None]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableError(str(error).partition("<")[0].strip()) from error


def fit(
    frame: UInt8[np.ndarray, "rows columns 3"], height: int, width: int, pixel_aspect: Fraction = Fraction(1)
) -> UInt8[np.ndarray, "height width 3"]:
    """Scale a frame to cover (height, width) without distortion, and cut off evenly what hangs over.

    `pixel_aspect` is the width of a pixel by its height. Lanczos, which averages over area when it makes smaller.
    """
    from PIL import Image

    rows, columns = frame.shape[:2]
    shown_width = columns * pixel_aspect
    scale = max(Fraction(width) / shown_width, Fraction(height, rows))
    cut_columns, cut_rows = float(Fraction(width) / scale / pixel_aspect), float(Fraction(height) / scale)
    left, top = (columns - cut_columns) / 2, (rows - cut_rows) / 2
    box = (max(left, 0.0), max(top, 0.0), min(left + cut_columns, columns), min(top + cut_rows, rows))
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS, box=box))


# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream; whatever goes wrong while it is read is an `UnreadableError`."""
    import av

    try:
        with av.open(_source(path)) as container:
            if not container.streams.video:
                raise UnreadableError("it has no video in it, or is truncated")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise UnreadableError(f"{error.strerror or error}") from error


def _source(path: str | os.PathLike[str]) -> Any:
    """What libraries open: the path, or for a URL the bytes."""
    name = os.fspath(path)
    return io.BytesIO(_download(name)) if "://" in name else name


@functools.lru_cache(maxsize=2)  # the clips of a video are read one after the other
def _download(url: str) -> bytes:
    from etils import epath

    return epath.Path(url).read_bytes()


def _shown(container: Any, stream: Any) -> Iterator[Any]:
    return (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)


def _pts(packet: Any) -> int:
    return packet.pts if packet.pts is not None else packet.dts or 0


def _timed_frames(container: Any, stream: Any, timing: Timing, start: Fraction) -> Iterator[tuple[Fraction, Any]]:
    """Decoded frames in order, each with the time at which it begins; from some time at or before `start` on."""
    frames: Iterator[tuple[int, Any]]
    if timing.stamps:  # from the beginning, so that they can be counted
        frames = zip(timing.stamps, container.decode(stream), strict=False)
    else:
        container.seek(timing.start + int(start / timing.tick), stream=stream, backward=True)
        frames = ((frame.pts, frame) for frame in container.decode(stream))
    for stamp, frame in frames:
        begins = (stamp - timing.start) * timing.tick
        if frame.is_corrupt:
            raise UnreadableError(f"its frame at {float(begins):.2f} s is damaged")
        yield begins, frame


def _upright(frame: Any, aspect: Fraction, height: int, width: int) -> np.ndarray:
    """A decoded frame with pixels of that aspect, turned upright (phones store how they were held) and fitted."""
    quarters = round(frame.rotation / 90) % 4
    pixels = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), quarters))
    return fit(pixels, height, width, 1 / aspect if quarters % 2 else aspect)
