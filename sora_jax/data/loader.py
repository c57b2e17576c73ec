"""From a latent cache to packed rows: order, captions, packing, and a state that goes on to the bit.

    headers ─ shuffled, repeated, cut, captioned (`stream`) ─ rows and steps (`plans`) ─ filled ahead, in a thread

The state of a loader is small: how far the stream was read, and the numbers of the clips that were read but are in no
row yet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from sora_jax.data.latents import BadRecordError, LatentSource
from sora_jax.data.plans import PlannedStep, Unreadable, first_state, planned_steps
from sora_jax.data.producer import Producer
from sora_jax.data.stream import Elements, LoaderOptions, Records, Tokenize
from sora_jax.data.workers import Workers
from sora_jax.errors import UserError
from sora_jax.shapes import Stride
from sora_jax.tokens.packing import Clip, FillRatio, fill_ratio, fill_rows
from sora_jax.tokens.planning import ClipShape, misfit

Batch = dict[str, np.ndarray]


class LoaderStats(NamedTuple):
    """How a loader is doing, counted over the batches that were taken from it."""

    elements: int  # of the stream, packed or waiting for room
    epoch: float
    clips: int  # in the batches
    bad_records: int  # different ones that were met here
    left_out: Mapping[str, int]  # how many clips, and captions of clips that have others, by reason (`data.plans`)
    fill: FillRatio | None  # of the last batch
    imbalance: float | None  # (max - mean) / mean over the costs of the last step's rows, of all parts

    def __str__(self) -> str:
        """For people: "epoch 1.25, 4,096 clips, left out: 3 unreadable, 2 clip too long"."""
        counts = {"unreadable": self.bad_records, **self.left_out}
        out = ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count)
        return f"epoch {self.epoch:.2f}, {self.clips:,} clips, left out: {out or 'none'}"


class Loader:
    """An iterator of batches (see `make_loader`) that can be stopped anywhere and gone on with, to the bit.

    `state()` is a small dict that JSON takes; it is about the batches that were taken, not those made ahead.
    """

    def __init__(self, source: Records, tokenize: Tokenize, options: LoaderOptions):
        self.options = options
        self._elements = Elements(source, tokenize, options)
        self._identity = _identity(source, options)
        self._state: dict[str, Any] = {**first_state(), "bad": []}
        self.stats = self._stats(0, 0, [], {})
        self._producer: Producer | None = None
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("this loader is closed")
        if self._producer is None:
            workers = Workers(self.options.workers)
            batches = self._batches(self._state, workers)
            self._producer = Producer(batches, self.options.prefetch, workers, self.options.stalled_seconds)
        batch, self._state, self.stats = next(self._producer)
        return batch

    def state(self) -> dict[str, Any]:
        """Where the batches taken so far leave the loader."""
        return {**self._state, "identity": self._identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on after the batches that `state` has behind it. Raises `UserError` when it is another loader's."""
        there = state.get("identity", {})
        before = {field.name: field.default for field in dataclasses.fields(LoaderOptions)}  # there was the option
        for name, ours in self._identity.items():
            if (theirs := there.get(name, before.get(name))) != ours:
                raise UserError(f"the data cannot go on where it stopped: {name} was {theirs} and is {ours}")
        self._stop()
        self._state = {name: state[name] for name in self._state}
        self.stats = self._stats(*(self._state[name] for name in ("next", "clips", "bad", "left_out")))

    def close(self) -> None:
        """End its thread and processes; it gives no more batches."""
        self._stop()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stop(self) -> None:
        if self._producer is not None:
            self._producer.close()
            self._producer = None

    # ------------------------------------------------------------------------------------------------------- filling

    def _batches(
        self, state: Mapping[str, Any], workers: Workers
    ) -> Generator[tuple[Batch, dict[str, Any], LoaderStats], None, None]:
        """Batches from `state` on, each with the state after it."""
        unreadable = Unreadable(self._elements.source, state["bad"])
        channels: int | None = None
        with contextlib.closing(planned_steps(self._elements, state, unreadable, workers)) as steps:
            for step in steps:
                plan, clips = self._own_clips(step, unreadable)
                if channels is None:
                    channels = next(element.channels for row in step.rows for element in row)
                tokens, text, groups = step.sizes
                batch = fill_rows(
                    plan,
                    clips,
                    row_tokens=tokens,
                    row_text=text,
                    row_groups=groups,
                    patch=self.options.patch,
                    channels=channels,
                )
                bad = sorted(unreadable.records)
                stats = self._stats(step.read, step.state["clips"], bad, step.left_out)
                stats = stats._replace(fill=fill_ratio(batch), imbalance=step.imbalance)
                yield batch, {**step.state, "bad": bad}, stats

    def _own_clips(self, step: PlannedStep, unreadable: Unreadable) -> tuple[list[list[int]], list[Clip]]:
        """This part's rows of a step, as a plan over its own clips. One that cannot be read leaves its place empty: the
        others have planned with it."""
        options = self.options
        size = options.rows // options.parts
        plan: list[list[int]] = []
        clips: list[Clip] = []
        for row in step.rows[options.part * size : (options.part + 1) * size]:
            plan.append([])
            for element in row:
                try:
                    latents = self._elements.latents(element)
                except BadRecordError as error:
                    unreadable.add(element.record, step.state["clips"] // options.parts, str(error))
                    continue
                plan[-1].append(len(clips))
                clips.append(Clip(latents, element.text, element.shots, element.headless))
        return plan, clips

    def _stats(self, read: int, clips: int, bad: Sequence[int], left_out: Mapping[str, int]) -> LoaderStats:
        return LoaderStats(read, read / len(self._elements.source), clips, len(bad), dict(left_out), None, None)


def make_loader(
    source: Records,
    *,
    tokenize: Tokenize,
    rows: int,
    row_tokens: int,
    row_text: int,
    row_groups: int | None = None,
    patch: Stride = Stride(1, 1, 1),
    **options: Any,
) -> Loader:
    """Batches of rows (`PackedRows` as a dict of numpy arrays) from a source of latents, packed or in buckets.

    `tokenize` makes the token ids of a prompt; with workers it must travel to another process. `row_groups` is by
    default as many as `row_tokens` can need. The other options are those of `LoaderOptions`. With `parts`, every loader
    plans all `rows` and fills its own `part` of them: the rows of all parts together, and the state, are those of one
    loader alone.

    A record that cannot be read is left out and counted (`stats`); more than 5 % raise `UserError`. So does, before
    the first batch, a cache with clips or captions that fit no row, unless `skip_misfits` leaves them out as well.
    """
    if not len(source):
        raise UserError("the source of latents is empty")
    if isinstance(source, LatentSource):
        frame_tokens = [h * w // (patch.height * patch.width) for _, h, w in source.sizes]
        row_groups = row_groups or max(1, row_tokens // min(frame_tokens))
    elif row_groups is None:
        raise UserError("row_groups must be given for a source that does not know the sizes of its clips")
    known = [field.name for field in dataclasses.fields(LoaderOptions)]
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"make_loader() has no option {unknown[0]!r}")
    made = LoaderOptions(rows, row_tokens, row_text, row_groups, patch, **options)
    if isinstance(source, LatentSource) and not made.skip_misfits:
        _refuse_misfits(source, tokenize, made)
    return Loader(source, tokenize, made)


def _refuse_misfits(source: LatentSource, tokenize: Tokenize, options: LoaderOptions) -> None:
    """Find what would fit no row now, and not after hours of training."""
    limits = ClipShape(options.row_tokens, options.row_text, options.row_groups)
    shapes = {
        f"a clip of {frames}x{height}x{width} latents": ClipShape(
            frames * height * width // math.prod(options.patch), 1, frames // options.patch.time
        )
        for frames, height, width in source.sizes
    }
    if not options.skip_long_captions:
        caption = source.longest_caption
        shapes[f'the caption "{caption[:40]}..."'] = ClipShape(1, len(tokenize(caption)), 1)
    for name, shape in shapes.items():
        if fault := misfit(shape, limits):
            raise UserError(f"{name} in {source.path} has {fault}, or set data.skip_misfits to leave such clips out")


def _identity(source: Records, options: LoaderOptions) -> dict[str, Any]:
    """What must be the same for a state to mean the same; as JSON gives it back."""
    free = ("workers", "prefetch", "stalled_seconds", "part", "parts")
    identity = {name: value for name, value in dataclasses.asdict(options).items() if name not in free}
    identity["patch"] = list(options.patch)
    identity["records"] = len(source)
    return identity | (source.identity if isinstance(source, LatentSource) else {})
