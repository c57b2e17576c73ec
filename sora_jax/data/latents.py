"""The latent cache: clips already through the autoencoder, in ArrayRecord shards, so that training never encodes.

    FOLDER/
      manifest.json                       what was encoded, by which autoencoder, and the shards with counts and sizes
      latents-00000.json ...               a shard that is not yet in the manifest, while several processes write
      latents-00000.arrayrecord ...        one record = one clip; then their headers once more, without latents

A record is a 4-byte little-endian length, that many bytes of JSON (captions, fps, source, sizes), and the normalised
latents `[F, h, w, C]` in float16, C order. ArrayRecord keeps a checksum of every record, so bit rot is an error.
Of a cut clip these are the latents of its shots, one after the other, each encoded as a clip of its own.
The headers alone are what all processes of a run plan their rows from; each reads the latents of its own rows only.

The autoencoder is causal: the first 1 + k latents of a clip are exactly the latents of its first 1 + stride.time * k
frames, and the first latent is that of its first frame as an image. The cache therefore stores whole clips only;
images and shorter clips are cut from them when they are read (`loader`).
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import operator
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from sora_jax.data.latent_files import (
    MANIFEST,
    BadRecordError,
    CacheInfo,
    LatentHeader,
    LatentRecord,
    Manifest,
    Shard,
    ShardEntry,
    ShotHeader,
    file_size,
    is_local,
    read_entry,
    utf8_length,
    whole_file,
    write_entry,
)
from sora_jax.errors import UserError

__all__ = [
    "BadRecordError",
    "CacheInfo",
    "LatentHeader",
    "LatentRecord",
    "LatentSource",
    "LatentWriter",
    "Shard",
    "ShardWriter",
    "ShotHeader",
]


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

    Several processes may write one cache: the `first` opens it, then the others do, each writes shards that no other
    does, and when all are done the first one's `gather` makes them known. Until then a finished shard is told of by a
    file of its own, latents-00003.json, so that no two processes write to one file. Whoever opens the cache next, in
    any number of processes, gathers what a run that was killed has left.

    Raises `UserError` when the folder holds something else, or latents of another autoencoder or source.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        info: CacheInfo,
        *,
        clips: int,
        clips_per_shard: int = 1024,
        shared: bool = False,
        first: bool = True,
    ):
        if clips < 1 or clips_per_shard < 1:
            raise UserError(f"a latent cache holds at least 1 clip a shard, not {clips} in shards of {clips_per_shard}")
        self.path, self._shared = epath.Path(path), shared
        if (self.path / MANIFEST).exists():
            self._manifest = Manifest.load(self.path)
            self._refuse_other(info, clips, clips_per_shard)
            self._manifest.clips = clips
        elif not first:
            raise UserError(f"{self.path} cannot be seen from here: all processes must write to one folder")
        else:
            if self.path.exists() and (
                not self.path.is_dir() or any(p.suffix != ".partial" for p in self.path.iterdir())
            ):
                raise UserError(f"{self.path} is there and is no latent cache; give an empty or a new folder")
            self.path.mkdir(parents=True, exist_ok=True)
            self._manifest = Manifest(info, clips, clips_per_shard, {})
        if first:
            for left_behind in self.path.glob("*.partial"):
                left_behind.unlink()
            self.gather()

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

    def gather(self) -> None:
        """Enter the shards of all processes into the manifest; for the first process, when no other writes."""
        told = sorted(self.path.glob("latents-*.json"))
        for path in told:
            number, entry = read_entry(path)
            if file_size(self.path / entry.file) == entry.bytes:
                self._manifest.shards[number] = entry
        self._manifest.save(self.path)
        for path in told:
            path.unlink()

    def reload(self) -> None:
        """See what the first process has gathered."""
        self._manifest = Manifest.load(self.path)

    @property
    def count(self) -> int:
        """Records written so far, earlier runs included."""
        return sum(entry.count for entry in self._manifest.shards.values())

    @property
    def done(self) -> int:
        """Clips of the source dealt with so far, written or skipped, earlier runs included."""
        return sum(shard.stop - shard.start for shard in self._manifest.planned() if self._whole(shard))

    @property
    def skipped(self) -> list[str]:
        return [reason for _, entry in sorted(self._manifest.shards.items()) for reason in entry.skipped]

    def missing(self) -> list[Shard]:
        """The shards still to be written, in order."""
        return [shard for shard in self._manifest.planned() if not self._whole(shard)]

    def _whole(self, shard: Shard) -> bool:
        entry = self._manifest.shards.get(shard.number)
        return entry is not None and self._manifest.covers(shard) and file_size(self.path / entry.file) == entry.bytes

    @contextlib.contextmanager
    def shard(self, shard: Shard) -> Iterator[ShardWriter]:
        """Writes one shard; it exists when the block ends, and not at all when the block raises."""
        # Imported here: it brings in absl flags, which the rest of the package does without.
        from array_record.python import array_record_module

        name = f"latents-{shard.number:05d}.arrayrecord"
        entry = ShardEntry(name, clips=shard.stop - shard.start, count=0, bytes=0, headers=True)
        with whole_file(self.path / name) as temporary:
            file = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
            try:
                writer = ShardWriter(file, entry)
                yield writer
                for header in writer.headers:
                    file.write(header)
            finally:
                file.close()
        entry.bytes = file_size(self.path / name)
        self._manifest.shards[shard.number] = entry
        if self._shared:
            write_entry(self.path / f"latents-{shard.number:05d}.json", shard.number, entry)
        else:
            self._manifest.save(self.path)


class ShardWriter:
    """The open shard of `LatentWriter.shard`."""

    def __init__(self, file: Any, entry: ShardEntry):
        self._file, self._entry = file, entry
        self.headers: list[bytes] = []

    def add(self, record: LatentRecord) -> None:
        self._file.write(record.to_bytes())
        self.headers.append(record.header.to_bytes())
        entry, size = self._entry, "x".join(map(str, record.latents.shape[:3]))
        entry.count += 1
        entry.sizes[size] = entry.sizes.get(size, 0) + 1
        entry.cut += bool(record.shots)
        entry.longest_caption = max(entry.longest_caption, record.header.longest_text, key=utf8_length)

    def skip(self, reason: str) -> None:
        self._entry.skipped.append(reason)


# ---------------------------------------------------------------------------------------------------------------- read


class LatentSource:
    """The records [start, stop) of a cache, or of several one after another, by number (negative numbers count from the
    end, as in a slice).

        LatentSource(folder, stop=-256)        # to train on
        LatentSource(folder, start=-256)       # held out
        LatentSource("runs/easy,runs/harder")  # of one autoencoder

    Files open when they are first read (those of a store are copied to this machine then), so a source is cheap to
    make and to send to another process. Raises `UserError` when the cache is missing, foreign, unfinished or damaged;
    reading a record raises `BadRecordError`.
    """

    def __init__(self, path: str | os.PathLike[str], start: int = 0, stop: int | None = None):
        self.path = os.fspath(path)
        named = self.path.split(",")
        if "" in named:
            raise UserError(f'"{self.path}" names no folder of latents somewhere: give one, or several as "a,b"')
        folders = [epath.Path(part) for part in named]
        manifests = [_whole_manifest(folder) for folder in folders]
        self.info = manifests[0].info
        for folder, manifest in zip(folders, manifests, strict=True):
            if manifest.info.autoencoder_hash != self.info.autoencoder_hash:
                raise UserError(f"{folder} and {folders[0]} hold latents of two autoencoders: train on one of them")
        self._manifests = manifests
        self._shards = [
            (folder, manifest.shards[index])
            for folder, manifest in zip(folders, manifests, strict=True)
            for index in sorted(manifest.shards)
        ]
        self._ends = list(itertools.accumulate(entry.count for _, entry in self._shards))
        self._range = range(self._ends[-1] if self._ends else 0)[start:stop]
        if not self._range:
            raise UserError(f"latent cache {self.path} has {self._ends[-1]} clips, none of them in [{start}:{stop}]")
        self._files: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            raise TypeError("a source is read record by record; give LatentSource start and stop")
        shard, place = self._find(index)
        return self._read(shard, place, LatentRecord.from_bytes)

    def header(self, index: int) -> LatentHeader:
        """What is known of a record without its latents; caches from before there were headers read it whole."""
        shard, place = self._find(index)
        _, entry = self._shards[shard]
        if not entry.headers:
            return self[index].header
        return self._read(shard, entry.count + place, LatentHeader.from_bytes)

    def _find(self, index: Any) -> tuple[int, int]:
        """The shard of a record, and its place in there."""
        number = self._range[operator.index(index)]
        shard = bisect.bisect_right(self._ends, number)
        return shard, number - (self._ends[shard - 1] if shard else 0)

    def _read(self, shard: int, place: int, parse: Callable[[bytes], Any]) -> Any:
        try:
            return parse(self._file(shard)[place])
        except (RuntimeError, OSError, BadRecordError) as error:
            folder, entry = self._shards[shard]
            raise BadRecordError(f"{folder}/{entry.file}, record {place % entry.count}: {error}") from error

    @property
    def sizes(self) -> Counter[tuple[int, int, int]]:
        """How many clips of the whole cache have latents of each size (F, h, w)."""
        total: Counter[tuple[int, int, int]] = Counter()
        for _, entry in self._shards:
            for size, count in entry.sizes.items():
                frames, height, width = map(int, size.split("x"))
                total[frames, height, width] += count
        return total

    @property
    def skipped(self) -> list[str]:
        """The clips that could not be read when the whole cache was encoded, with the reason."""
        return [reason for _, entry in self._shards for reason in entry.skipped]

    @property
    def identity(self) -> dict[str, Any]:
        """What tells these records from others, as JSON gives it back."""
        sources = [manifest.info.source for manifest in self._manifests]
        return {
            "autoencoder": self.info.autoencoder_hash,
            "source": sources[0] if len(sources) == 1 else sources,
            "first": self._range.start,
            "records": len(self),
        }

    @property
    def manifests(self) -> list[dict[str, Any]]:
        """What each cache is, as JSON: autoencoder and source, clips, bytes, and a digest of its table of shards."""
        return [manifest.in_short() for manifest in self._manifests]

    @property
    def longest_caption(self) -> str:
        """The caption of the whole cache with most bytes."""
        return max((entry.longest_caption for _, entry in self._shards), key=utf8_length, default="")

    def _file(self, shard: int) -> Any:
        """The open file of a shard; two threads that open it at once both succeed, and one is kept."""
        if shard not in self._files:
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            folder, entry = self._shards[shard]
            count = entry.count * (2 if entry.headers else 1)
            instruction = _FileInstruction(str(self._local(folder, entry)), 0, count, count)
            self._files.setdefault(shard, ArrayRecordDataSource([instruction]))
        return self._files[shard]

    def _local(self, folder: epath.Path, entry: ShardEntry) -> Path:
        path = folder / entry.file
        if is_local(path):
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


def _whole_manifest(folder: epath.Path) -> Manifest:
    """Of a cache that is finished and whose files are all there."""
    if not (folder / MANIFEST).exists():
        why = "has no manifest.json" if folder.exists() else "is not there"
        raise UserError(f"latent cache {folder} {why}; `sora-jax encode SOURCE --out {folder}` makes one")
    manifest = Manifest.load(folder)
    if missing := manifest.missing():
        raise UserError(
            f"latent cache {folder} is not finished: {len(missing)} of {len(manifest.planned())} "
            "shards are missing; run the same `sora-jax encode` again and it goes on where it stopped"
        )
    for entry in manifest.shards.values():
        size = file_size(folder / entry.file)
        if size != entry.bytes:
            found = "is missing" if size < 0 else f"has {size} bytes, not {entry.bytes}"
            raise UserError(f"latent cache {folder} is damaged: {entry.file} {found}; encode it again")
    return manifest


@dataclass(frozen=True)
class _FileInstruction:
    """What `ArrayRecordDataSource` asks of a file whose number of records is known, so that it need not open it."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int
