"""A clip with cuts: are they where they were asked for, does each shot show its prompt, is the character the same?

verdict = judge_shots(frames, lengths=(9, 9), truths=(first, second), same=True)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import UInt8

from sora_jax.data.world.prompts import Truth
from sora_jax.evaluation.checkers import Verdict, judge
from sora_jax.evaluation.physics import match_tracks
from sora_jax.evaluation.tracking import Tracking, track

_CHANGE = 12.0  # levels by which a pixel has changed
_SHARE = 0.4  # of all pixels: more have changed at a cut, fewer at any motion of the world


@dataclass(frozen=True)
class ShotsVerdict:
    """What a clip with cuts got right."""

    cuts: bool  # as many as asked for, and where
    shots: tuple[Verdict, ...]  # each shot against its own prompt, in the order that was asked for
    same: bool | None  # the first object of every shot is one character; None where that was not asked

    @property
    def all(self) -> bool:
        return self.cuts and all(one.all for one in self.shots) and self.same is not False


def find_cuts(frames: UInt8[np.ndarray, "T H W 3"]) -> list[int]:
    """The frames with which a new shot begins: there most of the picture is another."""
    step = np.abs(np.diff(frames.astype(np.int16), axis=0)).max(-1)
    return [int(t) + 1 for t in np.flatnonzero((step > _CHANGE).mean((1, 2)) > _SHARE)]


def one_character(shots: Sequence[Tracking], truths: Sequence[Truth]) -> bool:
    """Whether the first object of every shot has the same colour, shape and size (within 12 %)."""
    found = [match_tracks(seen, truth)[0] for seen, truth in zip(shots, truths, strict=True)]
    if any(one is None or not one.seen.any() for one in found):
        return False
    there = [one for one in found if one is not None]
    radii = [float(np.median(one.radii[one.whole if one.whole.any() else one.seen])) for one in there]
    alike = len({(one.color, one.shape) for one in there}) == 1
    return alike and max(radii) < 1.12 * min(radii)


def judge_shots(
    frames: UInt8[np.ndarray, "T H W 3"], lengths: Sequence[int], truths: Sequence[Truth], same: bool
) -> ShotsVerdict:
    """Judges a clip against the lengths of its shots, a truth for each, and whether one character plays in all."""
    ends = np.cumsum(lengths)
    if ends[-1] != len(frames) or len(truths) != len(lengths):
        raise ValueError(f"{len(frames)} frames are not shots of {tuple(lengths)} frames with {len(truths)} truths")
    parts = [frames[start:end] for start, end in pairwise([0, *ends])]
    seen = [track(part) for part in parts]
    return ShotsVerdict(
        cuts=find_cuts(frames) == [int(end) for end in ends[:-1]],
        shots=tuple(judge(part, truth, one) for part, truth, one in zip(parts, truths, seen, strict=True)),
        same=one_character(seen, truths) if same else None,
    )
