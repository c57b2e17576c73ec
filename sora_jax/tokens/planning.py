"""Which clips share a row, and which rows share a step: decided from shapes alone.

    clips ─ `LookAhead` ─ rows ─ `like_steps` ─ steps

A row is as long as the longest clip that is to be trained on, so short clips have to share one. A step takes as long as
its slowest device, so rows of one step should cost the same. A clip of n tokens costs n + r n^2: what matrices do to a
token, and what attention does to each pair of its tokens (r = `quadratic_share`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

LIKE = 0.05  # rows whose costs differ by less are alike: the slowest device is at most so much behind the mean

T = TypeVar("T")


class ClipShape(NamedTuple):
    """What the plan needs to know of a clip: how many tokens, text tokens and groups (frames) it takes."""

    tokens: int
    text: int
    frames: int


class ShotSize(NamedTuple):
    """What a shot of a cut clip has of its latents, and of its text."""

    frames: int  # latents
    text: int  # token ids


_WHAT = ("tokens", "text tokens", "latent frames")
_OPTIONS = ("row_tokens", "row_text", "row_groups")


def misfit(shape: ClipShape, limits: ClipShape) -> str:
    """Why a clip fits no empty row: "49 tokens and a row holds 48: raise row_tokens to 49"; "" when it does fit."""
    for what, size, limit, option in zip(_WHAT, shape, limits, _OPTIONS, strict=True):
        if size > limit:
            return f"{size} {what} and a row holds {limit}: raise {option} to {size}"
    return ""


# ---------------------------------------------------------------------------------------------------------------- rows


class LookAhead(Generic[T]):
    """Clips that wait for a row, in the order they came; `take_row` makes a row of some of them.

    A row begins with the clip that has waited longest, so none waits for ever, and goes on with the longest that finds
    room, again and again: best-fit (Johnson 1973) turned round, for it is the row that looks for clips. The more clips
    there are to choose from, the fuller the rows.
    """

    def __init__(self) -> None:
        self._items: dict[int, tuple[ClipShape, T]] = {}  # by number of arrival
        self._by_tokens: dict[int, dict[int, ClipShape]] = {}
        self._arrived = 0

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[T]:
        return (item for _, item in self._items.values())

    def add(self, shape: ClipShape, item: T) -> None:
        self._items[self._arrived] = shape, item
        self._by_tokens.setdefault(shape.tokens, {})[self._arrived] = shape
        self._arrived += 1

    def take_row(self, limits: ClipShape) -> list[T]:
        """The clips of one row, which no longer wait; none of them may be longer than the limits are."""
        row, free = [], limits
        number: int | None = next(iter(self._items), None)
        while number is not None:
            shape, item = self._items.pop(number)
            of_size = self._by_tokens[shape.tokens]
            del of_size[number]
            if not of_size:
                del self._by_tokens[shape.tokens]
            free = ClipShape(*(a - b for a, b in zip(free, shape, strict=True)))
            if min(free) < 0:
                raise ValueError(f"a clip of {shape} was to be packed into rows of {limits}")
            row.append(item)
            number = self._longest(free)
        return row

    def _longest(self, free: ClipShape) -> int | None:
        """The clip with most tokens that finds room, and of those the first to come."""
        for tokens in sorted((size for size in self._by_tokens if size <= free.tokens), reverse=True):
            for number, shape in self._by_tokens[tokens].items():
                if shape.text <= free.text and shape.frames <= free.frames:
                    return number
        return None


# ---------------------------------------------------------------------------------------------------------------- cost


def quadratic_share(dim: int, ffn_dim: int) -> float:
    """r of n + r n^2, for a transformer of that width: what a pair of tokens costs, in units of a token's matrices.

    A layer of width D with a feed-forward of F does 2 (6 D^2 + 2 D F) floating-point operations a token in its matrices
    (those of text apart: self-attention's four, cross-attention's two, the feed-forward's two), and 4 D a pair.
    """
    return 1.0 / (3 * dim + ffn_dim)


def row_cost(tokens: Iterable[int], quadratic: float) -> float:
    """The cost of a row whose clips have so many tokens each: the sum of n + r n^2, in units of a token's matrices."""
    return float(sum(n + quadratic * n * n for n in tokens))


def imbalance(costs: Sequence[float], shards: int | None = None) -> float:
    """How far the slowest of `shards` equal slices of a step's rows is behind the mean: (max - mean) / mean, in
    [0, shards - 1]. Each row is a slice of its own by default; a step that costs nothing is balanced."""
    slices = np.asarray(costs, np.float64).reshape(shards or len(costs), -1).sum(axis=1)
    return float(slices.max() / slices.mean() - 1) if slices.any() else 0.0


def like_steps(
    rows: Sequence[T], cost: Callable[[T], float], *, size: int, rng: np.random.Generator
) -> list[list[T | None]]:
    """Deal rows into steps of `size` so that those of one step cost about the same; None fills up the last one.

    Rows go together by cost only as far as is needed: where many cost the same but for `LIKE`, they are mixed at
    random. Steps come in random order, lest training sees clips sorted by length, and within a step rows stand so that
    its halves, quarters, ... cost about the same as well (`balanced_order`), whatever the mesh cuts it into.
    """
    by_cost = sorted(rows, key=lambda row: -cost(row))  # stable, so equal costs stay as they came
    steps = [by_cost[start : start + size] for start in range(0, len(by_cost), size)]
    dealt: list[list[T | None]] = []
    for run in _runs_alike(steps, cost):
        together = [row for step in run for row in step]
        mixed = [together[i] for i in rng.permutation(len(together))] if len(run) > 1 else together
        for start in range(0, len(mixed), size):
            step: list[T | None] = [*mixed[start : start + size]]
            step += [None] * (size - len(step))
            costs = [0.0 if row is None else cost(row) for row in step]
            dealt.append([step[i] for i in balanced_order(costs)])
    return [dealt[i] for i in rng.permutation(len(dealt))]


def _runs_alike(steps: list[list[T]], cost: Callable[[T], float]) -> list[list[list[T]]]:
    """Steps in falling order of cost, cut into runs within which all rows are alike or which are one step long."""
    runs: list[list[list[T]]] = []
    for step in steps:
        if runs and cost(runs[-1][0][0]) <= (1 + LIKE) * cost(step[-1]):
            runs[-1].append(step)
        else:
            runs.append([step])
    return runs


def balanced_order(costs: Sequence[float]) -> list[int]:
    """An order of a step's rows in which equal contiguous slices cost about the same: a permutation of their indices.

    It does not depend on how many slices there will be, so a run sees the same batches on any mesh. The dearest half of
    the rows is paired with the cheapest, the dearest pairs with the cheapest pairs, and so on (in threes, fives, ...
    where the number of rows has such a factor).
    """
    groups = [[index] for index in range(len(costs))]
    while len(groups) > 1:
        factor = next(p for p in itertools.count(2) if len(groups) % p == 0)
        groups.sort(key=lambda group: -sum(costs[index] for index in group))
        each = len(groups) // factor
        blocks: list[Any] = [groups[start : start + each] for start in range(0, len(groups), each)]
        snake = [block[::-1] if turn % 2 else block for turn, block in enumerate(blocks)]
        groups = [list(itertools.chain(*together)) for together in zip(*snake, strict=True)]
    return groups[0] if groups else []
