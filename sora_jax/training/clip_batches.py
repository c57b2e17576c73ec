"""Batches of clips for the autoencoder, rendered on the fly a few steps ahead.

Batch b is a function of (seed, b): whether it is of videos or of images, and which clips. So the state is one number.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from sora_jax.data.world import WorldSource
from sora_jax.errors import UserError

if TYPE_CHECKING:
    from sora_jax.config import DataConfig


class ClipBatches:
    """uint8 [B, T, H, W, 3]; with probability `image_share` a batch of images, T = 1.

    A batch of images has as many latents as one of videos: `rows` * (1 + (T - 1) / time_stride) of them.
    """

    def __init__(
        self,
        data: DataConfig,
        rows: int,
        *,
        time_stride: int,
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 2,
    ):
        self._data, self._rows = data, rows
        self._images = rows * (1 + (data.frames - 1) // time_stride)
        self._process = (process_index, process_count)
        self._prefetch = prefetch
        self._videos = world_clips(data, "train", data.frames)
        self._stills = world_clips(data, "train", 1)
        self._next = 0
        self._worker: _Worker | None = None

    def __next__(self) -> UInt8[np.ndarray, "B T H W 3"]:
        if self._worker is None:
            self._worker = _Worker(self.batch, self._next, self._prefetch)
        batch = self._worker.take()
        self._next += 1
        return batch

    def batch(self, number: int) -> UInt8[np.ndarray, "B T H W 3"]:
        """This process's part of batch `number`."""
        image = np.random.default_rng((self._data.seed, number)).random() < self._data.image_share
        source, rows = (self._stills, self._images) if image else (self._videos, self._rows)
        index, count = self._process
        first = (number * count + index) * rows
        return np.stack([item["frames"] for item in source.batch([(first + i) % len(source) for i in range(rows)])])

    def state(self) -> dict[str, Any]:
        return {"next": self._next, "processes": self._process[1]}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state["processes"] != self._process[1]:
            raise UserError(
                f"the data was split over {state['processes']} processes and now is over {self._process[1]}"
            )
        self.close()
        self._next = int(state["next"])

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def world_clips(data: DataConfig, split: str, frames: int) -> WorldSource:
    if data.source != "world":
        raise UserError(f'data.source {data.source!r} is not supported in the autoencoder stage: use "world"')
    return WorldSource(data.seed, data.clips, split, frames=frames, height=data.height, width=data.width)


def held_out_clips(data: DataConfig, count: int) -> UInt8[np.ndarray, "B T H W 3"]:
    """`count` clips with combinations of colour, shape and motion that training never shows."""
    source = world_clips(data, "heldout", data.frames)
    return np.stack([item["frames"] for item in source.batch(range(count))])


class _Worker:
    """A thread that makes batches `first`, `first` + 1, ... and keeps `ahead` of them ready."""

    def __init__(self, make: Any, first: int, ahead: int):
        self._make = make
        self._ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(max(ahead, 1))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(first,), name="clip-batches", daemon=True)
        self._thread.start()

    def _run(self, number: int) -> None:
        item: tuple[Any, BaseException | None]
        while not self._stop.is_set():
            try:
                item = (self._make(number), None)
            except BaseException as error:  # noqa: BLE001 (raised again where the batch is taken)
                item = (None, error)
            while not self._stop.is_set():
                try:
                    self._ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            number += 1

    def take(self) -> Any:
        batch, error = self._ready.get()
        if error is not None:
            raise error
        return batch

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
