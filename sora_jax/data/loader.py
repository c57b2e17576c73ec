"""From a latent cache to packed rows: order, captions, packing, and a state that goes on to the bit.

    records ─ shuffled, repeated, cut and captioned (`stream`) ─ first-fit into rows ─ made ahead in a thread

The state of a loader is small: how far the stream was read, and the numbers of the clips that were read but found no
room yet.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import queue
import threading
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple, Self

import numpy as np

from sora_jax.data.latents import BadRecordError, LatentSource
from sora_jax.data.stream import Element, Elements, LoaderOptions, Records, Tokenize, random_stream, stream
from sora_jax.errors import UserError
from sora_jax.shapes import Stride
from sora_jax.tokens.packing import (
    Clip,
    ClipShape,
    FillRatio,
    FirstFit,
    fill_ratio,
    fill_rows,
    steps_of_like_cost,
)

MAX_BAD_SHARE = 0.05
_LOOK_AHEAD = 16  # clips that may wait for the next step, at least: with fewer, rows stay emptier
_WIDTH = 1024  # of the transformer whose costs order rows; the order hardly depends on it

Batch = dict[str, np.ndarray]


class LoaderStats(NamedTuple):
    """How a loader is doing, counted over the batches that were taken from it."""

    elements: int  # of the stream, packed or waiting for room
    epoch: float
    bad_records: int  # different ones that were met here
    fill: FillRatio | None  # of the last batch


class Loader:
    """An iterator of batches (see `make_loader`) that can be stopped anywhere and gone on with, to the bit.

    `state()` is a small dict that JSON takes; it is about the batches that were taken, not those made ahead.
    """

    def __init__(self, source: Records, tokenize: Tokenize, options: LoaderOptions):
        self.options = options
        self._elements = Elements(source, tokenize, options)
        self._least = _least_shape(source, options)
        self._identity = _identity(source, options)
        self._state: dict[str, Any] = {"next": 0, "carry": [], "bad": [], "done": 0}
        self._fill: FillRatio | None = None
        self._producer: _Producer | None = None
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("this loader is closed")
        if self._producer is None:
            self._producer = _Producer(self._batches(self._state), self.options.prefetch)
        batch, self._state = next(self._producer)
        self._fill = fill_ratio(batch)
        return batch

    def state(self) -> dict[str, Any]:
        """Where the batches taken so far leave the loader."""
        return {**self._state, "identity": self._identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on after the batches that `state` has behind it. Raises `UserError` when it is another loader's."""
        there = state.get("identity", {})
        for name, ours in self._identity.items():
            if (theirs := there.get(name)) != ours:
                raise UserError(f"the data cannot go on where it stopped: {name} was {theirs} and is {ours}")
        self._stop()
        self._state = {name: state[name] for name in self._state}

    @property
    def stats(self) -> LoaderStats:
        read = self._state["next"]
        return LoaderStats(read, read / len(self._elements.source), len(self._state["bad"]), self._fill)

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

    # ------------------------------------------------------------------------------------------------------- packing

    def _batches(self, state: Mapping[str, Any]) -> Generator[tuple[Batch, dict[str, Any]], None, None]:
        """Batches from `state` on, each with the state after it.

        A plan takes the clips left over from the one before, then reads on until its rows are full, or until as many
        clips as a step has rows (or `_LOOK_AHEAD`) found no room: these come first next time, so none waits long.
        In the middle of a plan for several steps, the state is that before the plan and how many of its steps are done.
        """
        options, following, bad = self.options, int(state["next"]), set(state["bad"])
        carry = [self._again(number) for number in state["carry"]]
        sizes = {"row_tokens": options.row_tokens, "row_text": options.row_text, "row_groups": options.row_groups}
        with contextlib.closing(stream(self._elements, following)) as arriving:
            while True:
                fit = FirstFit(**sizes, max_rows=options.rows * options.plan_steps, least=self._least)
                packed: list[Element] = []
                waiting: list[Element] = []
                pending = collections.deque(carry)
                while not fit.full and len(waiting) < max(options.rows, _LOOK_AHEAD):
                    if pending:
                        element = pending.popleft()
                    elif (read := next(arriving, None)) is None:
                        break
                    else:
                        element, following = read, following + 1
                    if element.size is None:
                        bad.add(element.record)
                        self._refuse_bad(bad, following, element.name)
                    elif fit.place(len(packed), element.shape(options.patch), element.name):
                        packed.append(element)
                    else:
                        waiting.append(element)
                if not packed:
                    return
                carry = [*waiting, *pending]
                carried = [element.number for element in carry]
                after = {"next": following, "carry": carried, "done": 0}
                steps = self._deal(fit.rows, packed, following)
                channels = packed[0].channels
                for done in range(state["done"], len(steps)):
                    plan, clips = self._own_clips(steps[done], packed, bad, following)
                    batch = fill_rows(plan, clips, **sizes, patch=options.patch, channels=channels)
                    place = after if done + 1 == len(steps) else {**state, "done": done + 1}
                    yield batch, {**place, "bad": sorted(bad)}
                state = after

    def _own_clips(
        self, step: list[list[int]], packed: list[Element], bad: set[int], read: int
    ) -> tuple[list[list[int]], list[Clip]]:
        """This part's rows of a step, as a plan over its own clips. One that cannot be read leaves its place empty: the
        others have planned with it."""
        options = self.options
        size = options.rows // options.parts
        plan: list[list[int]] = []
        clips: list[Clip] = []
        for row in step[options.part * size : (options.part + 1) * size]:
            plan.append([])
            for element in (packed[index] for index in row):
                try:
                    clip = Clip(self._elements.latents(element), element.text)
                except BadRecordError as error:
                    bad.add(element.record)
                    self._refuse_bad(bad, read // options.parts, str(error))
                    continue
                plan[-1].append(len(clips))
                clips.append(clip)
        return plan, clips

    def _deal(self, rows: list[list[int]], packed: list[Element], number: int) -> list[list[list[int]]]:
        """The steps of a plan; those of several steps in random order, lest training sees clips sorted by size."""
        options = self.options
        if options.plan_steps == 1:
            return [rows]
        shapes = [element.shape(options.patch) for element in packed]
        steps = steps_of_like_cost([row for row in rows if row], shapes, rows=options.rows, width=_WIDTH)
        order = random_stream(options.seed, number, purpose=2).permutation(len(steps))
        return [steps[step] for step in order]

    def _again(self, number: int) -> Element:
        """A clip that was read before the loader stopped, and found no room."""
        element = self._elements[number]
        if element.size is None:
            raise UserError(f"the data cannot go on where it stopped: {element.name}")
        return element

    def _refuse_bad(self, bad: set[int], read: int, reason: str) -> None:
        """Give up when too many different records cannot be read; never on a handful of the first ones."""
        records = len(self._elements.source)
        if len(bad) > MAX_BAD_SHARE * min(records, max(read, 1000)):
            raise UserError(
                f"{len(bad)} of {min(records, read)} records could not be read, more than {MAX_BAD_SHARE:.0%} allow; "
                f"encode again; the last: {reason}"
            )


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
    """Batches of packed rows (`PackedRows` as a dict of numpy arrays) from a source of latents.

    `tokenize` makes the token ids of a prompt; with workers it must travel to another process. `row_groups` is by
    default as many as `row_tokens` can need. The other options are those of `LoaderOptions`. With `parts`, every loader
    plans all `rows` and fills its own `part` of them: the rows of all parts together, and the state, are those of one
    loader alone.

    A record that cannot be read is left out and counted (`stats`); more than 5 % raise `UserError`. So does, before
    the first batch, a cache with clips or captions that fit no row.
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
    if isinstance(source, LatentSource):
        _refuse_misfits(source, tokenize, made)
    return Loader(source, tokenize, made)


def _refuse_misfits(source: LatentSource, tokenize: Tokenize, options: LoaderOptions) -> None:
    """Find what would fit no row now, and not after hours of training."""
    fit = FirstFit(options.row_tokens, options.row_text, options.row_groups)
    for frames, height, width in source.sizes:
        tokens = frames * height * width // (options.patch.time * options.patch.height * options.patch.width)
        shape = ClipShape(tokens, 1, frames // options.patch.time)
        fit.place(0, shape, f"a clip of {frames}x{height}x{width} latents in {source.path}")
    if options.skip_long_captions:
        return
    caption = source.longest_caption
    fit.place(0, ClipShape(1, len(tokenize(caption)), 1), f'the caption "{caption[:40]}..." in {source.path}')


def _least_shape(source: Records, options: LoaderOptions) -> ClipShape | None:
    """The smallest clip that may come, so that a row is known to be full."""
    if not isinstance(source, LatentSource):
        return None
    cut = options.image_share + options.prefix_share > 0
    volume = options.patch.time * options.patch.height * options.patch.width
    return ClipShape(
        min((1 if cut else frames) * height * width for frames, height, width in source.sizes) // volume,
        1,
        1 if cut else min(frames for frames, _, _ in source.sizes) // options.patch.time,
    )


def _identity(source: Records, options: LoaderOptions) -> dict[str, Any]:
    """What must be the same for a state to mean the same; as JSON gives it back."""
    free = ("workers", "prefetch", "part", "parts")
    identity = {name: value for name, value in dataclasses.asdict(options).items() if name not in free}
    identity["patch"] = list(options.patch)
    identity["records"] = len(source)
    return identity | (source.identity if isinstance(source, LatentSource) else {})


class _Producer:
    """Runs an iterator up to `ahead` items ahead in a thread; errors are raised where the item would have come."""

    def __init__(self, items: Generator[Any, None, None], ahead: int):
        self._items, self._ahead = items, ahead
        self._queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(max(ahead, 1))
        self._stop = threading.Event()
        self._end: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        if ahead:
            self._thread.start()

    def __next__(self) -> Any:
        if self._end is not None:
            raise self._end
        item, self._end = self._queue.get() if self._ahead else self._draw()
        if self._end is not None:
            raise self._end
        return item

    def _draw(self) -> tuple[Any, BaseException | None]:
        try:
            return next(self._items), None
        except BaseException as error:  # noqa: BLE001 (raised again by __next__, StopIteration among them)
            return None, error

    def _run(self) -> None:
        end = None
        while end is None and not self._stop.is_set():
            item, end = self._draw()
            while not self._stop.is_set():
                with contextlib.suppress(queue.Full):
                    self._queue.put((item, end), timeout=0.1)
                    break

    def close(self) -> None:
        self._stop.set()
        if self._ahead:
            self._thread.join()
        self._items.close()
