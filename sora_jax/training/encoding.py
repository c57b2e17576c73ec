"""Clips through the autoencoder into a latent cache: what `sora-jax encode` does, and training on first need."""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from sora_jax import sharding
from sora_jax.data.latents import CacheInfo, LatentRecord, LatentWriter, Shard, ShotHeader
from sora_jax.data.producer import Producer
from sora_jax.data.sources import MAX_UNREADABLE_SHARE, Clips
from sora_jax.data.workers import Workers, in_processes
from sora_jax.errors import UserError
from sora_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sora_jax.models.structure import structure_of
from sora_jax.shapes import latent_extent
from sora_jax.training.autoencoder_step import ENCODER
from sora_jax.training.compilations import Compilations
from sora_jax.training.processes import first_then_others, wait_for_all

Batch = list[dict[str, Any] | str]  # clips, or why they are left out (`data.sources`)
Progress = Callable[[int, int], None]  # clips done, of how many


class Encoded(NamedTuple):
    """What is in the cache after encoding."""

    clips: int
    made: int  # of these, by this run, in all its processes
    left_out: tuple[str, ...]  # clips that could not be read, and why
    programs: int  # that this process compiled: one for the videos of a size, one for its images
    seconds: float


def autoencoder_hash(config: AutoencoderConfig, params: nnx.State) -> str:
    """SHA-256 of the config and of every parameter that makes latents, by name and float32 bytes: equal for equal
    latents only, and the same whatever the decoder is and has learned since."""
    made_by = {name: value for name, value in config.to_dict().items() if not name.startswith("decoder_")}
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode())
    for path, variable in sorted(nnx.to_flat_state(params), key=lambda item: list(map(str, item[0]))):
        if path[0] not in ENCODER:
            continue
        digest.update(".".join(map(str, path)).encode())
        digest.update(np.ascontiguousarray(variable.get_value(), np.float32).tobytes())
    return digest.hexdigest()


def encode_clips(
    source: Clips,
    config: AutoencoderConfig,
    params: nnx.State,
    out: str | os.PathLike[str],
    *,
    name: str,
    batch_size: int = 16,
    clips_per_shard: int = 1024,
    dtype: DTypeLike = jnp.float32,
    threads: int = 2,
    workers: int = 0,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> Encoded:
    """Write the normalised latents (posterior means) of all clips of `source` to the cache `out`; goes on with one that
    was cut short. `name` is the autoencoder's, for people.

    Several processes (`sora_jax.cluster`) share the shards that are missing, each whole ones, and all return what all
    have made. One that was killed ends the others; started again, in any number, they go on with what is missing then.

    Of a cut clip each shot is encoded as a clip of its own, as it will be when a storyboard is sampled.

    Batches have `batch_size` clips (rounded up to the devices of `mesh`, by default all of this process), split over
    the devices, while `threads`, or `workers` processes in their place, read or render the next ones. For each size one
    program encodes all videos and one all images: a clip shorter than the longest is filled up at its end, which a
    causal autoencoder does not see, and cut again.

    Raises `UserError` when `out` holds latents of another autoencoder or source, when clips do not fit the
    autoencoder, or when more than 5 % of the clips cannot be read; `LoaderError` when one of the processes dies.
    """
    if batch_size < 1 or threads < 1 or workers < 0:
        raise UserError(
            f"a batch has at least 1 clip and is read by 1 thread, or by no fewer than 0 processes: not {batch_size}, "
            f"{threads} and {workers}"
        )
    for extent in source.extents:  # before anything is written
        latent_extent(extent, config.stride)
    started = time.monotonic()
    info = CacheInfo(name, autoencoder_hash(config, params), config.stride, config.z_dim, source.identity)
    total = len(source)
    process, processes = jax.process_index(), jax.process_count()
    sizes = {"clips": total, "clips_per_shard": clips_per_shard}
    writer = first_then_others(
        "open the cache", lambda: LatentWriter(out, info, **sizes, shared=processes > 1, first=process == 0)
    )
    before, done = writer.count, writer.done
    own = writer.missing()[process::processes]
    there = done + sum(shard.stop - shard.start for shard in own)
    mesh = mesh or sharding.make_mesh(devices=jax.local_devices())
    longest = max(extent.frames for extent in source.extents)
    encoder = _Encoder(config, params, mesh, longest, batch_size, jnp.dtype(dtype))
    if progress is not None:
        progress(done, there)
    batches = {shard: _batches(shard, batch_size) for shard in own}
    with _read_ahead(source, [batch for shard in own for batch in batches[shard]], threads, workers) as ready:
        for shard in own:
            with writer.shard(shard) as file:
                for batch, latents in encoder.run(itertools.islice(ready, len(batches[shard]))):
                    for clip in batch:
                        if isinstance(clip, str):
                            file.skip(clip)
                        else:
                            file.add(_record(clip, [latents.pop(0) for _ in _shots(clip)]))
                    done += len(batch)
                    if progress is not None:
                        progress(done, there)
            _refuse_many_left_out(writer, total)  # those of earlier runs included
    if processes > 1:
        wait_for_all("all shards are written")
        first_then_others("gather the shards", writer.gather if process == 0 else writer.reload)
        _refuse_many_left_out(writer, total)  # now those of all processes
    seconds = time.monotonic() - started
    return Encoded(writer.count, writer.count - before, tuple(writer.skipped), encoder.programs.count, seconds)


def _refuse_many_left_out(writer: LatentWriter, total: int) -> None:
    if len(writer.skipped) > MAX_UNREADABLE_SHARE * total:
        raise UserError(
            f"{len(writer.skipped)} of {total} clips cannot be read, more than the {MAX_UNREADABLE_SHARE:.0%} "
            f"that may be left out: {'; '.join(writer.skipped[:5])}"
        )


def _shots(clip: dict[str, Any]) -> list[np.ndarray]:
    """What is encoded on its own: the frames of each shot, or of the whole clip."""
    frames = clip["frames"]
    return np.split(frames, np.cumsum([length for length, _ in clip.get("shots", ())][:-1]).astype(int))


def _record(clip: dict[str, Any], latents: list[np.ndarray]) -> LatentRecord:
    shots = [ShotHeader(len(own), tuple(said)) for own, (_, said) in zip(latents, clip.get("shots", ()), strict=False)]
    return LatentRecord(
        latents=np.concatenate(latents),
        captions=tuple(clip["captions"]),
        captions_image=tuple(clip["captions_image"]),
        fps=clip["fps"],
        source=clip["source"],
        pixels=clip["frames"].shape[:3],
        shots=tuple(shots),
    )


def _batches(shard: Shard, batch_size: int) -> list[range]:
    starts = range(shard.start, shard.stop, batch_size)
    return [range(start, min(start + batch_size, shard.stop)) for start in starts]


@dataclass(frozen=True)
class _Batches:
    """The batches of a source as what processes read from."""

    source: Clips
    indices: Sequence[range]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> Batch:
        return self.source.batch(self.indices[number])


@contextlib.contextmanager
def _read_ahead(source: Clips, batches: Sequence[range], threads: int, workers: int) -> Iterator[Iterator[Batch]]:
    """The batches in order, read by threads, or by processes, that are up to two batches each ahead."""
    if workers and batches:
        processes = Workers(workers)
        read = in_processes(_Batches(source, batches), 0, processes)
        with contextlib.closing(Producer(read, 2, processes)) as ready:
            yield ready
    else:
        with contextlib.closing(_in_threads(source, batches, threads)) as read:
            yield read


def _in_threads(source: Clips, batches: Sequence[range], threads: int) -> Generator[Batch, None, None]:
    with ThreadPoolExecutor(threads, thread_name_prefix="read-clips") as pool:
        waiting: collections.deque[Future[Batch]] = collections.deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(source.batch, batch))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@functools.partial(jax.jit, static_argnums=(0, 3))
def _encode(
    graphdef: nnx.GraphDef, params: nnx.State, video: UInt8[Array, "B T H W 3"], dtype: jnp.dtype
) -> Float[Array, "B F h w C"]:
    model = nnx.merge(graphdef, params)
    mean = model.encode((video.astype(jnp.float32) / 127.5 - 1.0).astype(dtype)).mean
    return model.normalize(mean.astype(jnp.float32)).astype(jnp.float16)


class _Encoder:
    """Batches of clips -> latents, by one program for videos of `frames` frames and one for images, of each size."""

    def __init__(
        self, config: AutoencoderConfig, params: nnx.State, mesh: Mesh, frames: int, batch_size: int, dtype: jnp.dtype
    ):
        self._graphdef = structure_of(lambda rngs: Autoencoder(config, rngs=rngs))
        self._dtype = dtype
        self._params = jax.device_put(params, sharding.replicated(mesh))
        self._place = sharding.batch_sharding(mesh)
        self._rows = -(-batch_size // mesh.size) * mesh.size
        self._frames, self._stride = frames, config.stride.time
        self.programs = Compilations()

    def run(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, list[np.ndarray]]]:
        """Each batch with the latents `[F, h, w, C]`, float16, of the shots of its clips, one after the other; the
        device works on the batch after it."""
        waiting: tuple[Batch, list[tuple[int, int, jax.Array]]] | None = None
        for batch in batches:
            sent = batch, self._start([shot for clip in batch if isinstance(clip, dict) for shot in _shots(clip)])
            if waiting is not None:
                yield waiting[0], self._finish(waiting[1])
            waiting = sent
        if waiting is not None:
            yield waiting[0], self._finish(waiting[1])

    def _start(self, videos: list[np.ndarray]) -> list[tuple[int, int, jax.Array]]:
        """For each video its row and its number of latents in an array that is being computed."""
        sent: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)  # shape of a program's videos -> which
        for number, video in enumerate(videos):
            sent[(1 if len(video) == 1 else self._frames, *video.shape[1:])].append(number)
        result: dict[int, tuple[int, int, jax.Array]] = {}
        for shape, of_shape in sent.items():
            # The shots of cut clips may be more than a batch has clips.
            for start in range(0, len(of_shape), self._rows):
                numbers = of_shape[start : start + self._rows]
                pixels = np.zeros((self._rows, *shape), np.uint8)
                for row, number in enumerate(numbers):
                    video = videos[number]
                    pixels[row, : len(video)], pixels[row, len(video) :] = video, video[-1]
                placed = jax.device_put(pixels, self._place)
                with self.programs:
                    latents = _encode(self._graphdef, self._params, placed, self._dtype)
                for row, number in enumerate(numbers):
                    result[number] = row, 1 + (len(videos[number]) - 1) // self._stride, latents
        return [result[number] for number in range(len(videos))]

    def _finish(self, sent: list[tuple[int, int, jax.Array]]) -> list[np.ndarray]:
        computed = {id(array): np.asarray(array) for _, _, array in sent}
        return [computed[id(array)][row, :length] for row, length, array in sent]
