"""Which clips of the stream share a row and a step, known to every process of a run before any latents are read.

    packed    rows of one length, filled with clips of any shape. Each row is chosen from the `look_ahead` clips that
              have waited longest, and the rows of `plan_steps` steps are dealt so that those of one step cost the same
    buckets   the clips of a step have one shape, and its rows the length that holds as many of them as may be. A bucket
              gives a step when it is full, and at the latest an epoch after its first clip came

A plan depends on shapes and captions alone, and nothing is left out of it in silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple, Self

from sora_jax.data.stream import Element, Elements, random_stream, stream
from sora_jax.data.workers import Workers
from sora_jax.errors import UserError
from sora_jax.tokens.planning import ClipShape, LookAhead, imbalance, like_steps, misfit, row_cost

MAX_BAD_SHARE = 0.05
# Why clips are left out of the stream, besides those that cannot be read; and captions, of clips that have others.
CLIP_TOO_LONG, CAPTION_TOO_LONG, LONG_CAPTIONS = REASONS = "clip too long", "caption too long", "long captions"

Rows = list[list[Element]]


class Unreadable:
    """The records that cannot be read: left out as long as they are few."""

    def __init__(self, source: Any, found: list[int]):
        self._source, self.records = source, set(found)

    def add(self, record: int, read: int, reason: str) -> None:
        """Raises `UserError` when there are too many of them; never for a handful of the first ones."""
        self.records.add(record)
        total = len(self._source)
        if len(self.records) > MAX_BAD_SHARE * min(total, max(read, 1000)):
            raise UserError(
                f"{len(self.records)} of {min(total, read)} records could not be read, more than {MAX_BAD_SHARE:.0%} "
                f"allow; encode again; the last: {reason}"
            )


class PlannedStep(NamedTuple):
    """The rows of one step, of all parts, and where the stream is after it."""

    rows: Rows
    sizes: ClipShape  # tokens, text places and groups of a row
    imbalance: float  # (max - mean) / mean over the costs of the rows
    read: int  # elements of the stream so far, in rows or waiting
    left_out: dict[str, int]  # how many so far, by reason
    state: dict[str, Any]  # from which the steps after this one come

    @property
    def clips(self) -> int:
        return sum(map(len, self.rows))


def first_state() -> dict[str, Any]:
    """Where a stream begins: its next element, those that wait, and what has happened before. In the middle of a plan
    of several steps, it is the state before the plan and how many of its steps are `done`."""
    return {"next": 0, "carry": [], "done": 0, "clips": 0, "left_out": {}}


def planned_steps(
    elements: Elements, state: Mapping[str, Any], unreadable: Unreadable, workers: Workers | None = None
) -> Generator[PlannedStep, None, None]:
    """The steps from `state` on; they end with the stream. Raises `UserError` for a clip that fits no row, unless these
    are left out, and when too many records cannot be read. `workers` gets to know the processes that read."""
    options = elements.options
    plan = _packed if options.packing == "packed" else _buckets
    clips = int(state["clips"])
    with _Arrivals(elements, state, unreadable, workers) as arrivals:
        before = {name: state[name] for name in first_state()}
        for steps, waiting in plan(arrivals):
            left_out = {reason: arrivals.left_out[reason] for reason in REASONS if arrivals.left_out[reason]}
            after = {"next": arrivals.read, "carry": waiting, "done": 0, "left_out": left_out}
            for done in range(before["done"], len(steps)):
                rows, sizes = steps[done]
                clips += sum(map(len, rows))
                here = after if done + 1 == len(steps) else {**before, "done": done + 1}
                costs = [_cost(row, arrivals) for row in rows]
                yield PlannedStep(rows, sizes, imbalance(costs), arrivals.read, left_out, {**here, "clips": clips})
            before = after


class _Arrivals:
    """The clips of the stream that can be planned, with their shapes: first those that wait, then new ones."""

    def __init__(
        self, elements: Elements, state: Mapping[str, Any], unreadable: Unreadable, workers: Workers | None = None
    ):
        self.options, self._elements, self._unreadable = elements.options, elements, unreadable
        self.limits = ClipShape(self.options.row_tokens, self.options.row_text, self.options.row_groups)
        self.read = int(state["next"])
        self.left_out = Counter(state["left_out"])
        self._carry = [self._again(number) for number in state["carry"]]
        self._stream = stream(elements, self.read, workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    @property
    def epoch(self) -> int:
        """Elements that an epoch has."""
        return len(self._elements.source)

    @property
    def carried(self) -> int:
        """How many of those that wait have not been taken yet."""
        return len(self._carry)

    def take(self) -> tuple[ClipShape, Element] | None:
        """The next clip that fits a row; None at the end."""
        if self._carry:
            element = self._carry.pop(0)
            return self.shape(element), element
        for refused, element in enumerate(self._stream):
            self.read += 1
            if element.size is None:
                self._unreadable.add(element.record, self.read, element.name)
                continue
            self.left_out[LONG_CAPTIONS] += element.long_captions
            shape = self.shape(element)
            if not (fault := misfit(shape, self.limits)):
                return shape, element
            if not self.options.skip_misfits:
                raise UserError(f"{element.name} has {fault}, or set data.skip_misfits to leave such clips out")
            too_long = shape.tokens > self.limits.tokens or shape.frames > self.limits.frames
            self.left_out[CLIP_TOO_LONG if too_long else CAPTION_TOO_LONG] += 1
            if refused >= self.epoch:
                raise UserError(f"no clip of {self.epoch} fits a row: the last, {element.name}, has {fault}")
        return None

    def shape(self, element: Element) -> ClipShape:
        return element.shape(self.options.patch)

    def _again(self, number: int) -> Element:
        """A clip that was read before the loader stopped, and waited."""
        element = self._elements[number]
        if element.size is None:
            raise UserError(f"the data cannot go on where it stopped: {element.name}")
        return element


Plan = tuple[list[tuple[Rows, ClipShape]], list[int]]  # steps, and the numbers of the clips that wait


def _packed(arrivals: _Arrivals) -> Generator[Plan, None, None]:
    options = arrivals.options
    waiting: LookAhead[Element] = LookAhead()
    while True:
        rows: Rows = []
        first = arrivals.read
        while len(rows) < options.rows * options.plan_steps:
            while len(waiting) < options.look_ahead and (arrived := arrivals.take()):
                waiting.add(*arrived)
            if not waiting:
                break
            rows.append(waiting.take_row(arrivals.limits))
        if not rows:
            return
        rng = random_stream(options.seed, first, purpose=2)
        steps = like_steps(rows, lambda row: _cost(row, arrivals), size=options.rows, rng=rng)
        filled = [([row or [] for row in step], arrivals.limits) for step in steps]
        yield filled, [element.number for element in waiting]


def _buckets(arrivals: _Arrivals) -> Generator[Plan, None, None]:
    options, limits = arrivals.options, arrivals.limits
    buckets: dict[tuple[int, ...], list[Element]] = {}  # by the latents' frames, height and width

    def most(shape: ClipShape) -> int:
        """Clips in a row of a bucket."""
        return min(limits.tokens // shape.tokens, limits.frames // shape.frames)

    def due() -> tuple[int, ...] | None:
        """A bucket that is full, or of which a clip has waited for an epoch."""
        for size, bucket in buckets.items():
            if len(bucket) >= options.rows * most(arrivals.shape(bucket[0])):
                return size
        oldest = min(buckets, key=lambda size: buckets[size][0].number, default=None)
        late = oldest is not None and arrivals.read - buckets[oldest][0].number > arrivals.epoch
        return oldest if late else None

    def step(size: tuple[int, ...]) -> Plan:
        """As many rows as a step has, of the clips that came first."""
        bucket = buckets.pop(size)
        shape = arrivals.shape(bucket[0])
        each = min(most(shape), -(-len(bucket) // options.rows))
        rows: Rows = []
        for _ in range(options.rows):
            row: list[Element] = []
            text = limits.text
            while bucket and len(row) < each and len(bucket[0].text) <= text:
                text -= len(bucket[0].text)
                row.append(bucket.pop(0))
            rows.append(row)
        if bucket:
            buckets[size] = bucket
        waiting = sorted(element.number for bucket in buckets.values() for element in bucket)
        sizes = ClipShape(most(shape) * shape.tokens, limits.text, most(shape) * shape.frames)
        return [(rows, sizes)], waiting

    def add(element: Element) -> None:
        assert element.size is not None
        buckets.setdefault(element.size[:3], []).append(element)

    for _ in range(arrivals.carried):  # all of them before any step, as it was when they were left
        if arrived := arrivals.take():
            add(arrived[1])
    while True:
        while size := due():
            yield step(size)
        if not (arrived := arrivals.take()):
            break
        add(arrived[1])
    while buckets:
        yield step(min(buckets, key=lambda size: buckets[size][0].number))


def _cost(row: list[Element], arrivals: _Arrivals) -> float:
    return row_cost([arrivals.shape(element).tokens for element in row], arrivals.options.quadratic)
