"""What a latent cache is on disk: its records, its manifest, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from sora_jax.errors import UserError

MANIFEST = "manifest.json"
_FORMAT = "sora_jax latents"
_VERSION = 2
_WITHOUT_CUTS = 1  # the version of caches that have no cut clips, which readers of that version read


class BadRecordError(ValueError):
    """A record that cannot be read: bit rot, or not one of ours."""


class ShotHeader(NamedTuple):
    """What is known of a shot of a cut clip. Its latents are those of a clip of its own."""

    latents: int  # how many of the clip's
    captions: tuple[str, ...]  # alternatives


@dataclass(frozen=True)
class LatentHeader:
    """What is known of a clip without its latents: enough to plan rows."""

    shape: tuple[int, int, int, int]  # (F, h, w, C) of the latents
    captions: tuple[str, ...]  # alternatives for the whole clip; of a cut clip its shots have them
    captions_image: tuple[str, ...]  # alternatives for its first frame alone; may be empty
    fps: float
    source: str  # where it came from: "world/train/0/17", "cats/a.mp4@24"
    pixels: tuple[int, int, int]  # (T, H, W) of the frames
    shots: tuple[ShotHeader, ...] = ()  # of a cut clip, one after the other; () for one shot

    @property
    def longest_text(self) -> str:
        """What takes most room in a row: a caption, or the longest ones of all shots together."""
        shots = " ".join(max(shot.captions, key=utf8_length, default="") for shot in self.shots)
        return max(*self.captions, *self.captions_image, shots, "", key=utf8_length)

    def to_bytes(self) -> bytes:
        values = dataclasses.asdict(self)
        if self.shots:
            values["shots"] = [shot._asdict() for shot in self.shots]
        else:  # as it was before there were any
            del values["shots"]
        return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> LatentHeader:
        """The inverse of `to_bytes`. Raises `BadRecordError`."""
        try:
            header = json.loads(data)
            frames, height, width, channels = header["shape"]
            shots = tuple(ShotHeader(int(s["latents"]), tuple(s["captions"])) for s in header.get("shots", ()))
            if shots and sum(shot.latents for shot in shots) != frames:
                raise ValueError(f"its shots have {sum(shot.latents for shot in shots)} latents of {frames}")
            return cls(
                shape=(frames, height, width, channels),
                captions=tuple(header["captions"]),
                captions_image=tuple(header["captions_image"]),
                fps=float(header["fps"]),
                source=str(header["source"]),
                pixels=tuple(header["pixels"]),
                shots=shots,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise BadRecordError(f"no header of latents: {error}") from error


@dataclass(frozen=True)
class LatentRecord:
    """One clip: normalised latents `[F, h, w, C]` (float16) and what is true of it, as in `LatentHeader`."""

    latents: np.ndarray
    captions: tuple[str, ...]
    captions_image: tuple[str, ...]
    fps: float
    source: str
    pixels: tuple[int, int, int]
    shots: tuple[ShotHeader, ...] = ()

    @property
    def header(self) -> LatentHeader:
        frames, height, width, channels = self.latents.shape
        shape = (frames, height, width, channels)
        return LatentHeader(shape, self.captions, self.captions_image, self.fps, self.source, self.pixels, self.shots)

    def to_bytes(self) -> bytes:
        text = self.header.to_bytes()
        return len(text).to_bytes(4, "little") + text + np.ascontiguousarray(self.latents, "<f2").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> LatentRecord:
        """The inverse of `to_bytes`; the latents are a read-only view of `data`. Raises `BadRecordError`."""
        start = 4 + int.from_bytes(data[:4], "little")
        header = LatentHeader.from_bytes(data[4:start])
        try:
            latents = np.frombuffer(data, "<f2", offset=start).reshape(header.shape)
        except ValueError as error:
            raise BadRecordError(f"no record of latents: {error}") from error
        known = {f.name: getattr(header, f.name) for f in dataclasses.fields(header) if f.name != "shape"}
        return cls(latents, **known)


@dataclass(frozen=True)
class CacheInfo:
    """What all clips of a cache share. Two encodings may continue one another only if all of this is equal."""

    autoencoder: str  # its name, for people
    autoencoder_hash: str  # of its config and parameters, for machines
    stride: tuple[int, int, int]  # frames, height, width in pixels that one latent spans
    channels: int
    source: Mapping[str, Any]  # what was encoded, as JSON: {"world": {"seed": 0, ...}} or {"folder": ...}


class Shard(NamedTuple):
    """A range of the source's clips, [start, stop), that is written as one file."""

    number: int
    start: int
    stop: int


@dataclass
class ShardEntry:
    """A finished shard, as the manifest lists it."""

    file: str
    clips: int  # of the source, that it covers
    count: int  # records; fewer than `clips` when some could not be read
    bytes: int
    sizes: dict[str, int] = field(default_factory=dict)  # "FxHxW" of the latents -> records of that size
    longest_caption: str = ""
    headers: bool = False  # whether the headers of all records follow after the records
    skipped: list[str] = field(default_factory=list)  # the clips that could not be read, with the reason
    cut: int = 0  # records of several shots

    def to_json(self) -> dict[str, Any]:
        """Its fields; `cut` only where there are such records, so that a cache without any is what it always was."""
        values = dataclasses.asdict(self)
        return values if self.cut else {name: value for name, value in values.items() if name != "cut"}


def write_entry(path: epath.Path, number: int, entry: ShardEntry) -> None:
    """A shard's entry as a file of its own."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps({"index": number, **entry.to_json()}, ensure_ascii=False))


def read_entry(path: epath.Path) -> tuple[int, ShardEntry]:
    """The inverse of `write_entry`."""
    try:
        document = json.loads(path.read_text())
        return document.pop("index"), ShardEntry(**document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} tells of no shard of latents ({error}): delete it, and encode again") from error


@dataclass
class Manifest:
    """What was asked for, and the shards of it that are finished, by number."""

    info: CacheInfo
    clips: int
    clips_per_shard: int
    shards: dict[int, ShardEntry]

    def shard(self, number: int) -> Shard:
        size = self.clips_per_shard
        return Shard(number, number * size, min((number + 1) * size, self.clips))

    def planned(self) -> list[Shard]:
        return [self.shard(number) for number in range(-(-self.clips // self.clips_per_shard))]

    def missing(self) -> list[Shard]:
        """The planned shards that were never finished, or are too short since more clips were asked for."""
        return [shard for shard in self.planned() if not self.covers(shard)]

    def covers(self, shard: Shard) -> bool:
        entry = self.shards.get(shard.number)
        return entry is not None and entry.clips == shard.stop - shard.start

    def in_short(self) -> dict[str, Any]:
        """What tells this cache from another, as JSON."""
        entries = [self.shards[index].to_json() for index in sorted(self.shards)]
        return {
            "autoencoder": self.info.autoencoder,
            "autoencoder_hash": self.info.autoencoder_hash,
            "source": dict(self.info.source),
            "clips": sum(entry["count"] for entry in entries),
            "bytes": sum(entry["bytes"] for entry in entries),
            "sha256": hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest(),
        }

    def save(self, folder: epath.Path) -> None:
        entries = {index: self.shards[index] for index in sorted(self.shards)}
        document = {
            "format": _FORMAT,
            "version": _VERSION if any(entry.cut for entry in entries.values()) else _WITHOUT_CUTS,
            "complete": not self.missing(),
            "count": sum(entry.count for entry in entries.values()),
            **dataclasses.asdict(self.info),
            "clips": self.clips,
            "clips_per_shard": self.clips_per_shard,
            "shards": [{"index": index, **entry.to_json()} for index, entry in entries.items()],
        }
        with whole_file(folder / MANIFEST) as path:
            path.write_text(json.dumps(document, indent=1, ensure_ascii=False))

    @classmethod
    def load(cls, folder: epath.Path) -> Manifest:
        path = folder / MANIFEST
        try:
            document = json.loads(path.read_text())
            if document["format"] != _FORMAT:
                raise ValueError(f"its format is {document['format']!r}")
            if document["version"] > _VERSION:
                raise UserError(
                    f"{path} is of version {document['version']}, newer than this sora_jax reads; upgrade it"
                )
            info = CacheInfo(
                **{f.name: document[f.name] for f in dataclasses.fields(CacheInfo)}
                | {"stride": tuple(document["stride"])}
            )
            shards = {entry.pop("index"): ShardEntry(**entry) for entry in document["shards"]}
            return cls(info, document["clips"], document["clips_per_shard"], shards)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is no manifest of a latent cache ({error}); `sora-jax encode` makes one"
            ) from error


def utf8_length(text: str) -> int:
    return len(text.encode())


def file_size(path: epath.Path) -> int:
    """Bytes of a file; -1 when it is not there."""
    return path.stat().length if path.exists() else -1


def is_local(path: epath.Path) -> bool:
    return "://" not in os.fspath(path)


@contextlib.contextmanager
def whole_file(path: epath.Path) -> Iterator[Path]:
    """A local file to write; it becomes `path` when the block ends, and nothing is left when the block raises.

    Objects in a store do not rename, but appear whole when they are uploaded; so the upload comes last there.
    """
    if is_local(path):
        # A name of its own, lest a process that was given up for dead and is not writes into another's file.
        temporary = Path(f"{os.fspath(path)}.{uuid.uuid4().hex[:8]}.partial")
        try:
            yield temporary
            os.replace(temporary, os.fspath(path))
        finally:
            temporary.unlink(missing_ok=True)
    else:
        with tempfile.TemporaryDirectory(prefix="sora_jax-") as folder:
            temporary = Path(folder) / path.name
            yield temporary
            epath.Path(temporary).copy(path, overwrite=True)
