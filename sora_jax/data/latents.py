"""The latent cache: clips already through the autoencoder, in ArrayRecord shards, so that training never encodes.

    FOLDER/
      manifest.json                       what was encoded, by which autoencoder, and the shards with counts and sizes
      latents-00000.arrayrecord ...        one record = one clip

A record is a 4-byte little-endian length, that many bytes of JSON (captions, fps, source, sizes), and the normalised
latents `[F, h, w, C]` in float16, C order. ArrayRecord keeps a checksum of every record, so bit rot is an error.

The autoencoder is causal: the first 1 + k latents of a clip are exactly the latents of its first 1 + stride.time * k
frames, and the first latent is that of its first frame as an image. The cache therefore stores whole clips only;
images and shorter clips are cut from them when they are read (`loader`).
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import itertools
import json
import operator
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from sora_jax.errors import UserError

MANIFEST = "manifest.json"
_FORMAT = "sora_jax latents"
_VERSION = 1


class BadRecordError(ValueError):
    """A record that cannot be read: bit rot, or not one of ours."""


@dataclass(frozen=True)
class LatentRecord:
    """One clip: normalised latents `[F, h, w, C]` (float16) and what is true of it."""

    latents: np.ndarray
    captions: tuple[str, ...]  # alternatives for the whole clip
    captions_image: tuple[str, ...]  # alternatives for its first frame alone; may be empty
    fps: float
    source: str  # where it came from: "world/train/0/17", "cats/a.mp4@24"
    pixels: tuple[int, int, int]  # (T, H, W) of the frames

    def to_bytes(self) -> bytes:
        header = {
            "shape": list(self.latents.shape),
            "captions": list(self.captions),
            "captions_image": list(self.captions_image),
            "fps": self.fps,
            "source": self.source,
            "pixels": list(self.pixels),
        }
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        return len(text).to_bytes(4, "little") + text + np.ascontiguousarray(self.latents, "<f2").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> LatentRecord:
        """The inverse of `to_bytes`; the latents are a read-only view of `data`. Raises `BadRecordError`."""
        try:
            start = 4 + int.from_bytes(data[:4], "little")
            header = json.loads(data[4:start])
            latents = np.frombuffer(data, "<f2", offset=start).reshape(header["shape"])
            return cls(
                latents=latents,
                captions=tuple(header["captions"]),
                captions_image=tuple(header["captions_image"]),
                fps=float(header["fps"]),
                source=str(header["source"]),
                pixels=tuple(header["pixels"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise BadRecordError(f"no record of latents: {error}") from error


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
class _Entry:
    """A finished shard, as the manifest lists it."""

    file: str
    clips: int  # of the source, that it covers
    count: int  # records; fewer than `clips` when some could not be read
    bytes: int
    sizes: dict[str, int] = field(default_factory=dict)  # "FxHxW" of the latents -> records of that size
    longest_caption: str = ""
    skipped: list[str] = field(default_factory=list)  # the clips that could not be read, with the reason


@dataclass
class _Manifest:
    info: CacheInfo
    clips: int
    clips_per_shard: int
    shards: dict[int, _Entry]

    @property
    def planned(self) -> int:
        return -(-self.clips // self.clips_per_shard)

    def save(self, folder: epath.Path) -> None:
        entries = {index: self.shards[index] for index in sorted(self.shards)}
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "complete": len(entries) == self.planned,
            "count": sum(entry.count for entry in entries.values()),
            **dataclasses.asdict(self.info),
            "clips": self.clips,
            "clips_per_shard": self.clips_per_shard,
            "shards": [{"index": index, **dataclasses.asdict(entry)} for index, entry in entries.items()],
        }
        _write_whole(
            folder / MANIFEST, lambda path: path.write_text(json.dumps(document, indent=1, ensure_ascii=False))
        )

    @classmethod
    def load(cls, folder: epath.Path) -> _Manifest:
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
            shards = {entry.pop("index"): _Entry(**entry) for entry in document["shards"]}
            return cls(info, document["clips"], document["clips_per_shard"], shards)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is no manifest of a latent cache ({error}); `sora-jax encode` makes one"
            ) from error


# --------------------------------------------------------------------------------------------------------------- write


class LatentWriter:
    """Writes a cache of `clips` clips, `clips_per_shard` to a file; continues one that was cut short.

    A shard appears whole or not at all, and only then enters the manifest, so a killed encoding goes on at the first
    shard that is missing. More clips of the same source may be asked for later; what is there is kept.

        writer = LatentWriter(folder, info, clips=len(source))
        for shard in writer.missing():
            with writer.shard(shard) as out:
                for index in range(shard.start, shard.stop):
                    out.add(record)  # or out.skip("a.mp4: why it could not be read")

    Raises `UserError` when the folder holds something else, or latents of another autoencoder or source.
    """

    def __init__(self, path: str | os.PathLike[str], info: CacheInfo, *, clips: int, clips_per_shard: int = 1024):
        if clips < 1 or clips_per_shard < 1:
            raise UserError(f"a latent cache holds at least 1 clip a shard, not {clips} in shards of {clips_per_shard}")
        self.path = epath.Path(path)
        if (self.path / MANIFEST).exists():
            self._manifest = _Manifest.load(self.path)
            self._refuse_other(info, clips, clips_per_shard)
            self._manifest.clips = clips
        else:
            if self.path.exists() and (
                not self.path.is_dir() or any(p.suffix != ".partial" for p in self.path.iterdir())
            ):
                raise UserError(f"{self.path} is there and is no latent cache; give an empty or a new folder")
            self.path.mkdir(parents=True, exist_ok=True)
            self._manifest = _Manifest(info, clips, clips_per_shard, {})
        for left_behind in self.path.glob("*.partial"):
            left_behind.unlink()
        self._manifest.save(self.path)

    def _refuse_other(self, info: CacheInfo, clips: int, clips_per_shard: int) -> None:
        """A cache is of one autoencoder and one source: mixed latents would train without an error, and badly."""
        there = self._manifest.info
        if there.autoencoder_hash != info.autoencoder_hash:
            raise UserError(
                f"{self.path} holds latents of autoencoder {there.autoencoder} ({there.autoencoder_hash[:12]}), "
                f"not {info.autoencoder} ({info.autoencoder_hash[:12]}); give another folder"
            )
        here, found = json.loads(json.dumps(info.source)), there.source
        for name, ours, theirs in (
            *((key, here.get(key), found.get(key)) for key in sorted({*here, *found})),
            ("clips per shard", clips_per_shard, self._manifest.clips_per_shard),
        ):
            if ours != theirs:
                raise UserError(
                    f"{self.path} was encoded with {name} = {theirs}, not {ours}; ask for that or give another folder"
                )
        if clips < self._manifest.clips:
            raise UserError(
                f"{self.path} already has {self._manifest.clips} clips, more than {clips}; give another folder"
            )

    @property
    def count(self) -> int:
        """Records written so far, earlier runs included."""
        return sum(entry.count for entry in self._manifest.shards.values())

    @property
    def done(self) -> int:
        """Clips of the source dealt with so far, written or skipped, earlier runs included."""
        return sum(entry.clips for index, entry in self._manifest.shards.items() if self._whole(self._range(index)))

    @property
    def skipped(self) -> list[str]:
        return [reason for _, entry in sorted(self._manifest.shards.items()) for reason in entry.skipped]

    def _range(self, index: int) -> Shard:
        size = self._manifest.clips_per_shard
        return Shard(index, index * size, min((index + 1) * size, self._manifest.clips))

    def _whole(self, shard: Shard) -> bool:
        entry = self._manifest.shards.get(shard.number)
        return (
            entry is not None
            and entry.clips == shard.stop - shard.start
            and _size(self.path / entry.file) == entry.bytes
        )

    def missing(self) -> list[Shard]:
        """The shards still to be written, in order."""
        ranges = (self._range(index) for index in range(self._manifest.planned))
        return [shard for shard in ranges if not self._whole(shard)]

    @contextlib.contextmanager
    def shard(self, shard: Shard) -> Iterator[ShardWriter]:
        """Writes one shard; it exists when the block ends, and not at all when the block raises."""
        # Imported here: it brings in absl flags, which the rest of the package does without.
        from array_record.python import array_record_module

        name = f"latents-{shard.number:05d}.arrayrecord"
        entry = _Entry(name, clips=shard.stop - shard.start, count=0, bytes=0)
        with _whole_file(self.path / name) as temporary:
            file = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
            try:
                yield ShardWriter(file, entry)
            finally:
                file.close()
        entry.bytes = _size(self.path / name)
        self._manifest.shards[shard.number] = entry
        self._manifest.save(self.path)


class ShardWriter:
    """The open shard of `LatentWriter.shard`."""

    def __init__(self, file: Any, entry: _Entry):
        self._file, self._entry = file, entry

    def add(self, record: LatentRecord) -> None:
        self._file.write(record.to_bytes())
        entry, size = self._entry, "x".join(map(str, record.latents.shape[:3]))
        entry.count += 1
        entry.sizes[size] = entry.sizes.get(size, 0) + 1
        entry.longest_caption = max(entry.longest_caption, *record.captions, *record.captions_image, key=_utf8)

    def skip(self, reason: str) -> None:
        self._entry.skipped.append(reason)


def _utf8(text: str) -> int:
    return len(text.encode())


def _size(path: epath.Path) -> int:
    """Bytes of a file; -1 when it is not there."""
    return path.stat().length if path.exists() else -1


def _is_local(path: epath.Path) -> bool:
    return "://" not in os.fspath(path)


@contextlib.contextmanager
def _whole_file(path: epath.Path) -> Iterator[Path]:
    """A local file to write; it becomes `path` when the block ends, and nothing is left when the block raises.

    Objects in a store do not rename, but appear whole when they are uploaded; so the upload comes last there.
    """
    if _is_local(path):
        temporary = Path(f"{os.fspath(path)}.partial")
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


def _write_whole(path: epath.Path, write: Callable[[Path], object]) -> None:
    with _whole_file(path) as temporary:
        write(temporary)


# ---------------------------------------------------------------------------------------------------------------- read


class LatentSource(Sequence[LatentRecord]):
    """The records [start, stop) of a cache, by number (negative numbers count from the end, as in a slice).

        LatentSource(folder, stop=-256)   # to train on
        LatentSource(folder, start=-256)  # held out

    Files open when they are first read (those of a store are copied to this machine then), so a source is cheap to
    make and to send to another process. Raises `UserError` when the cache is missing, foreign, unfinished or damaged;
    reading a record raises `BadRecordError`.
    """

    def __init__(self, path: str | os.PathLike[str], start: int = 0, stop: int | None = None):
        self.path = epath.Path(path)
        if not (self.path / MANIFEST).exists():
            why = "has no manifest.json" if self.path.exists() else "is not there"
            raise UserError(f"latent cache {self.path} {why}; `sora-jax encode SOURCE --out {self.path}` makes one")
        manifest = _Manifest.load(self.path)
        if missing := manifest.planned - len(manifest.shards):
            raise UserError(
                f"latent cache {self.path} is not finished: {missing} of {manifest.planned} shards are missing; "
                "run the same `sora-jax encode` again and it goes on where it stopped"
            )
        self.info = manifest.info
        self._shards = [manifest.shards[index] for index in sorted(manifest.shards)]
        for entry in self._shards:
            size = _size(self.path / entry.file)
            if size != entry.bytes:
                found = "is missing" if size < 0 else f"has {size} bytes, not {entry.bytes}"
                raise UserError(f"latent cache {self.path} is damaged: {entry.file} {found}; encode it again")
        self._ends = list(itertools.accumulate(entry.count for entry in self._shards))
        self._range = range(self._ends[-1] if self._ends else 0)[start:stop]
        if not self._range:
            raise UserError(f"latent cache {self.path} has {self._ends[-1]} clips, none of them in [{start}:{stop}]")
        self._files: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            raise TypeError("a source is read record by record; give LatentSource start and stop")
        number = self._range[operator.index(index)]
        shard = bisect.bisect_right(self._ends, number)
        first = self._ends[shard - 1] if shard else 0
        try:
            return LatentRecord.from_bytes(self._file(shard)[number - first])
        except (RuntimeError, OSError, BadRecordError) as error:
            raise BadRecordError(f"{self.path}/{self._shards[shard].file}, record {number - first}: {error}") from error

    @property
    def sizes(self) -> Counter[tuple[int, int, int]]:
        """How many clips of the whole cache have latents of each size (F, h, w)."""
        total: Counter[tuple[int, int, int]] = Counter()
        for entry in self._shards:
            for size, count in entry.sizes.items():
                frames, height, width = map(int, size.split("x"))
                total[frames, height, width] += count
        return total

    @property
    def identity(self) -> dict[str, Any]:
        """What tells these records from others, as JSON gives it back."""
        return {
            "autoencoder": self.info.autoencoder_hash,
            "source": self.info.source,
            "first": self._range.start,
            "records": len(self),
        }

    @property
    def longest_caption(self) -> str:
        """The caption of the whole cache with most bytes."""
        return max((entry.longest_caption for entry in self._shards), key=_utf8, default="")

    def _file(self, shard: int) -> Any:
        """The open file of a shard; two threads that open it at once both succeed, and one is kept."""
        if shard not in self._files:
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            entry = self._shards[shard]
            instruction = _FileInstruction(str(self._local(entry)), 0, entry.count, entry.count)
            self._files.setdefault(shard, ArrayRecordDataSource([instruction]))
        return self._files[shard]

    def _local(self, entry: _Entry) -> Path:
        path = self.path / entry.file
        if _is_local(path):
            return Path(path)
        # One copy for all processes of this machine, under the identity of the cache and the shard.
        name = f"{self.info.autoencoder_hash[:12]}-{entry.bytes}-{os.fspath(path).replace('/', '_')}"
        copy = Path(tempfile.gettempdir()) / "sora_jax-latents" / name
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            partial = copy.with_name(f"{name}.{os.getpid()}.partial")
            path.copy(partial, overwrite=True)
            os.replace(partial, copy)
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}


@dataclass(frozen=True)
class _FileInstruction:
    """What `ArrayRecordDataSource` asks of a file whose number of records is known, so that it need not open it."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int
