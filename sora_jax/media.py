"""The only door for pictures and videos: `write_media` and `read_media`.

The suffix chooses the form:

    .mp4 .mov      H.264, 4:2:0, BT.709: plays everywhere
    .webm          VP9
    .gif           at most 256 colours a frame
    .png           one frame, lossless
    .npy           uint8 [T, H, W, 3], lossless; its record lies beside it as FILE.json
    (no suffix)    a folder of PNG files, lossless

What is written carries its `Record` (prompt, seed, model and settings), says that it was generated, and appears whole
or not at all: it is written beside its place and renamed. Paths may be URLs (`gs://...`); those are written to a local
file first and then copied, for objects cannot be renamed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sora_jax.errors import UserError, nearest
from sora_jax.record import Record

VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".gif")
WRITABLE_SUFFIXES = (*VIDEO_SUFFIXES, ".png", ".npy")
READABLE_SUFFIXES = (*WRITABLE_SUFFIXES, ".mkv", ".avi", ".jpg", ".jpeg", ".webp", ".bmp")

# H.264 rate factor: 16 keeps the flat colours of small videos free of visible blocks; files stay in kilobytes.
CRF = 16

MAX_SIDE = 8192  # pixels of an enlarged file: the longest side of H.264's largest level


@dataclass(frozen=True)
class Media:
    """What `read_media` found."""

    frames: UInt8[np.ndarray, "T H W 3"]
    fps: float | None  # None for a picture
    record: Record | None  # None where the file carries none of ours


# ---------------------------------------------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------------------------------------------


def _is_url(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


def _any_path(path: str | os.PathLike[str]) -> Any:
    """A `Path`, or an `epath.Path` for a URL (imported only then: it is slow)."""
    if not _is_url(path):
        return Path(path)
    from etils import epath

    return epath.Path(path)


def _suffix(path: str | os.PathLike[str], known: Sequence[str]) -> str:
    suffix = Path(os.fspath(path)).suffix.lower()
    if suffix and suffix not in known:
        raise UserError(f'{os.fspath(path)}: unknown file type "{suffix}"; {nearest(suffix, known)}')
    return suffix


def check_writable(path: str | os.PathLike[str], *, frames: int | None = None, overwrite: bool = True) -> None:
    """Raise `UserError` if `write_media` could not write `path`: called before minutes of work, not after.

    Checks the file type (and that a .png gets one frame, where `frames` says how many will come), that nothing is in
    the way, and that the folder exists or can be made and takes a file. Makes and leaves nothing.
    """
    suffix = _suffix(path, WRITABLE_SUFFIXES)
    if (name := Path(os.fspath(path)).name.lower()) in WRITABLE_SUFFIXES:
        raise UserError(f"{path} is a file type without a name; use video{name}")
    if suffix == ".png" and frames is not None and frames != 1:
        stem = os.fspath(path)[: -len(".png")]
        raise UserError(f"{path}: a .png holds one frame, not {frames}; use {stem}.mp4, or {stem} for a folder of them")
    target = _any_path(path)
    if not overwrite and target.exists():
        raise UserError(f"{path} exists; --force overwrites it")
    if _is_url(path):
        return  # whether a bucket takes the object is only known by writing it
    if suffix and target.is_dir():
        raise UserError(f"{path} is a folder; the file needs another name")
    if not suffix and target.is_file():
        raise UserError(f"{path} is a file; a folder of frames cannot be written there")
    if not suffix and target.is_dir() and any(item.suffix not in (".png", ".json") for item in target.iterdir()):
        raise UserError(f"{path} is a folder with other things in it; name a new one for the frames")
    parent = target.absolute().parent
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not existing.is_dir():
        raise UserError(f"{path} cannot be written: {existing} is no folder")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written: {existing}: {error.strerror}") from error


def check_scale(height: int, width: int, scale: int) -> None:
    """Raise `UserError` if frames of that size cannot be enlarged so much."""
    if scale < 1:
        raise UserError(f"scale must be a whole number >= 1, not {scale}")
    largest = max(MAX_SIDE // max(height, width), 1)
    if scale > largest:
        raise UserError(
            f"scale {scale} would make {width * scale}x{height * scale} of {width}x{height}, and no side of an "
            f"enlarged file is longer than {MAX_SIDE}; nearest: {largest}"
        )


@contextlib.contextmanager
def _whole_or_not_at_all(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path, same suffix, to write to: it becomes `path` if the block ends well, and vanishes if not."""
    if _is_url(path):
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / Path(os.fspath(path)).name
            yield local
            target = _any_path(path)
            for source in sorted(local.rglob("*")) if local.is_dir() else [local]:
                inside = target / source.relative_to(local).as_posix() if local.is_dir() else target
                inside.parent.mkdir(parents=True, exist_ok=True)
                inside.write_bytes(source.read_bytes())
        return
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    temporary = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        yield temporary
        if target.is_dir():
            _replace_folder(temporary, target)
        else:
            os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _replace_folder(new: Path, target: Path) -> None:
    """A folder cannot be renamed onto another: the old one steps aside, and comes back if the new one cannot."""
    aside = new.with_name(f"{new.name}.old")
    target.rename(aside)
    try:
        os.replace(new, target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def to_uint8(frames: np.ndarray) -> UInt8[np.ndarray, "T H W 3"]:
    """Frames as uint8 [T, H, W, 3]: from uint8, or from floats in [0, 1]; one picture [H, W, 3] becomes T = 1."""
    frames = np.asarray(frames)
    if frames.ndim == 3:
        frames = frames[None]
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise UserError(f"frames must be [T, H, W, 3], not {list(frames.shape)}")
    if frames.dtype == np.uint8:
        return frames
    if not np.issubdtype(frames.dtype, np.floating):
        raise UserError(f"frames must be uint8 or floats in [0, 1], not {frames.dtype}")
    low, high = float(frames.min()), float(frames.max())
    if not (low >= -1e-6 and high <= 1 + 1e-6):  # also refuses NaN
        raise UserError(f"float frames must lie in [0, 1]; these span [{low:.4g}, {high:.4g}]")
    return np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8)


def write_media(
    frames: np.ndarray,
    path: str | os.PathLike[str],
    record: Record,
    *,
    fps: float = 8.0,
    scale: int = 1,
    overwrite: bool = True,
) -> None:
    """Write `frames` (uint8, or float in [0, 1]; [T, H, W, 3]) in the form that the suffix of `path` names.

    `scale` enlarges every pixel to scale x scale in the file: at 2 and more, 4:2:0 blurs no colour edges.
    Raises `UserError` where `path` cannot be written.
    """
    frames = to_uint8(frames)
    check_writable(path, frames=len(frames), overwrite=overwrite)
    check_scale(frames.shape[1], frames.shape[2], scale)
    if not 0 < fps <= 1000:
        raise UserError(f"fps must lie in (0, 1000], not {fps}")
    if scale > 1:
        frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    record = dataclasses.replace(record, fps=fps)
    suffix = _suffix(path, WRITABLE_SUFFIXES)
    with _whole_or_not_at_all(path) as temporary:
        if suffix in (".mp4", ".mov", ".webm"):
            _write_video(frames, temporary, record, fps)
        elif suffix == ".gif":
            _write_gif(frames, temporary, record, fps)
        elif suffix == ".png":
            _write_png(frames[0], temporary, record)
        elif suffix == ".npy":
            np.save(temporary, frames)
        else:
            temporary.mkdir()
            for index, frame in enumerate(frames):
                _write_png(frame, temporary / f"{index:05d}.png", record)
            (temporary / "record.json").write_text(record.to_json())
    if suffix == ".npy":
        with _whole_or_not_at_all(f"{os.fspath(path)}.json") as temporary:
            temporary.write_text(record.to_json())


def media_bytes(frames: np.ndarray, suffix: str, record: Record, *, fps: float = 8.0, scale: int = 1) -> bytes:
    """The bytes of the file that `write_media` would write; for notebooks and web pages."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"video{suffix}"
        write_media(frames, path, record, fps=fps, scale=scale)
        return path.read_bytes()


def _write_video(frames: UInt8[np.ndarray, "T H W 3"], path: Path, record: Record, fps: float) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    _, height, width, _ = frames.shape
    webm = path.suffix.lower() == ".webm"
    # 4:2:0 shares a colour between 2x2 pixels, which H.264 does only for even sizes.
    odd = bool(height % 2 or width % 2)
    pixel_format = "yuv444p" if odd and not webm else "yuv420p"
    if odd and not webm:
        warnings.warn(
            f"{width}x{height} is odd, so {path.suffix} is written as H.264 4:4:4, which browsers may not play",
            stacklevel=3,
        )
    with av.open(path, "w", options={} if webm else {"movflags": "+faststart"}) as container:
        container.metadata.update(
            title=record.prompt,
            comment=record.to_json(),
            description=f"Generated by a model ({record.model}, {record.software}): trainedAlgorithmicMedia",
        )
        stream = container.add_stream(
            "libvpx-vp9" if webm else "libx264",
            rate=Fraction(fps).limit_denominator(1001),
            options={"crf": "20", "b": "0", "row-mt": "1"} if webm else {"crf": str(CRF), "preset": "slow"},
        )
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = 1  # BT.709
        context.color_range = 1  # 16 to 235
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format=pixel_format, dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def _write_gif(frames: UInt8[np.ndarray, "T H W 3"], path: Path, record: Record, fps: float) -> None:
    from PIL import Image

    # GIF counts hundredths of a second: 8 fps is 12 and 13 in turn, so that the whole keeps its length.
    ticks = np.round(np.arange(len(frames) + 1) * 100 / fps).astype(int)
    pictures = [Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE) for frame in frames]
    pictures[0].save(
        path,
        save_all=True,
        append_images=pictures[1:],
        duration=[int(t) * 10 for t in np.maximum(np.diff(ticks), 1)],
        loop=0,
        comment=record.to_json().encode(),
    )


def _write_png(frame: UInt8[np.ndarray, "H W 3"], path: Path, record: Record) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt("Title", record.prompt)
    text.add_itxt("Comment", record.to_json())
    text.add_itxt("Software", record.software)
    Image.fromarray(frame).save(path, pnginfo=text)


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_media(path: str | os.PathLike[str]) -> Media:
    """All frames of a picture, a video, a .npy or a folder of PNG files, as uint8 [T, H, W, 3].

    Raises `UserError` in one line where the file is missing, truncated, garbage or of an unknown type.
    """
    suffix = _suffix(path, READABLE_SUFFIXES)
    source = _any_path(path)
    if not source.exists():
        siblings = [p.name for p in source.parent.iterdir()] if source.parent.is_dir() else []
        close = nearest(source.name, siblings).partition("?")[0]
        raise UserError(f"{path} does not exist" + (f"; {close}?" if close.startswith("did you") else ""))
    if source.is_dir():
        return _read_folder(source)
    if not suffix:
        raise UserError(f"{path}: a file without a suffix; {nearest('', READABLE_SUFFIXES)}")
    data = source.read_bytes()
    if not data:
        raise UserError(f"{path} is empty")
    if suffix == ".npy":
        beside = _any_path(f"{os.fspath(path)}.json")
        return _read_npy(data, path, Record.from_json(beside.read_text()) if beside.exists() else None)
    if suffix in (".mp4", ".mov", ".webm", ".mkv", ".avi"):
        return _read_video(data, path)
    return _read_picture(data, path)


def _read_video(data: bytes, path: Any) -> Media:
    import av

    try:
        with av.open(io.BytesIO(data), "r") as container:
            if not container.streams.video:
                raise UserError(f"{path} cannot be read: truncated, or without a video in it")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            promised, rate = stream.frames, stream.average_rate
            tags = {key.lower(): value for key, value in container.metadata.items()}
    except av.FFmpegError as error:
        raise UserError(f"{path} cannot be read: truncated, or not a video ({error.strerror})") from error
    if not frames or len(frames) < promised:
        raise UserError(f"{path} cannot be read: truncated, {len(frames)} of {promised} frames")
    return Media(np.stack(frames), float(rate) if rate else None, Record.from_json(tags.get("comment", "")))


def _read_picture(data: bytes, path: Any) -> Media:
    from PIL import Image, ImageOps, ImageSequence

    frames, durations = [], []
    try:
        with Image.open(io.BytesIO(data)) as picture:
            comment = picture.info.get("Comment", picture.info.get("comment", ""))
            for frame in ImageSequence.Iterator(picture):
                upright = ImageOps.exif_transpose(frame).convert("RGBA")
                on_white = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
                frames.append(np.asarray(on_white.convert("RGB")))
                durations.append(float(frame.info.get("duration", 0)))  # milliseconds
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).partition("<")[0].strip()
        raise UserError(f"{path} cannot be read: truncated, or not a picture ({reason})") from error
    record = Record.from_json(comment.decode(errors="replace") if isinstance(comment, bytes) else comment)
    if len(frames) == 1 and not durations[0]:
        return Media(np.stack(frames), None, record)
    # Equal frames in a row are stored once, with a longer duration: give each its place again.
    fps = record.fps if record and record.fps else 1000 / max(min(durations), 10)
    repeats = [max(1, round(duration * fps / 1000)) for duration in durations]
    return Media(np.repeat(np.stack(frames), repeats, axis=0), fps, record)


def _read_npy(data: bytes, path: Any, record: Record | None) -> Media:
    try:
        frames = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read: truncated, or not a NumPy array") from error
    try:
        return Media(to_uint8(frames), record.fps if record else None, record)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _read_folder(folder: Any) -> Media:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".png")
    if not files:
        raise UserError(f"{folder} is a folder without PNG files")
    frames = [read_media(file).frames[0] for file in files]
    for file, frame in zip(files, frames, strict=True):
        if frame.shape != frames[0].shape:
            raise UserError(f"{file} is {frame.shape[1]}x{frame.shape[0]}, unlike the {len(files)} files beside it")
    beside = folder / "record.json"
    record = Record.from_json(beside.read_text()) if beside.exists() else None
    return Media(np.stack(frames), record.fps if record else None, record)
