"""Does a clip show what its prompt says? Judged from the pixels alone, against the truth that comes with a prompt.

    verdict = judge(frames, prompt.truth)     # Verdict(color=True, shape=True, count=True, motion=False, ...)
    laws = judge_physics(frames, prompt.truth)  # {"gravity": True, "restitution": True, ...}: those that apply

Motions can be told from 9 frames on; one frame can only rest. numpy only. The checkers are themselves tested: nearly
all true clips pass and hardly any corrupted one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import UInt8

from sora_jax.data.world.lighting import gain
from sora_jax.data.world.motion import heading
from sora_jax.data.world.prompts import Truth
from sora_jax.data.world.scene import COLORS, FLOOR_COLORS, GROUNDS, SIZES
from sora_jax.evaluation.encounters import camera_goes, meets
from sora_jax.evaluation.motions import MOTION_CHECKS, slides
from sora_jax.evaluation.physics import LAWS, ground_shift, match_tracks
from sora_jax.evaluation.relations import check_relation, hidden_part, passes_by
from sora_jax.evaluation.tracking import Track, Tracking, track

_HIDING = ("occluder", "collision", "wall", "passing", "meeting")  # kinds of clip in which one may be out of sight
_PARTIAL = ("enter", "exit")  # motions during which an object is out of sight for a good part of the clip


@dataclass(frozen=True)
class Verdict:
    """What a clip got right. What the prompt does not speak of is None."""

    color: bool
    shape: bool
    count: bool
    motion: bool
    background: bool | None = None
    size: bool | None = None
    relation: bool | None = None

    @property
    def all(self) -> bool:
        """Colour, shape, count and motion, and the relation where there is one."""
        return self.color and self.shape and self.count and self.motion and self.relation is not False


def check_color(seen: Tracking, truth: Truth) -> bool:
    """The colours said are there for at least a third of the clip, and no other for more than an eighth."""
    names = list(COLORS)
    frames = len(seen.counts)
    shown = {name: len(np.unique(seen.blobs.frame[seen.blobs.color == number])) for number, name in enumerate(names)}
    wanted = {thing.color for thing in truth.objects}
    enough = all(shown[name] >= max(1, frames / 3) for name in wanted)
    return enough and all(shown[name] <= frames / 8 for name in names if name not in wanted)


def check_shape(seen: Tracking, truth: Truth) -> bool:
    """Every object that was named has its shape, one of which a part is hidden by what is left of it."""
    tracks = match_tracks(seen, truth)
    shapes = ["" if one is None else one.shape for one in tracks]
    if truth.kind == "depth" and (found := hidden_part(seen, truth)):
        shapes[found[0]] = found[1]
    return shapes == [thing.shape for thing in truth.objects]


def check_count(seen: Tracking, truth: Truth) -> bool:
    """As many objects as said, and hardly ever more."""
    wanted = len(truth.objects)
    more = 0.3 if truth.kind == "passing" else 0.12  # what is behind may show on both sides
    partly = truth.kind in _HIDING or any(thing.motion in _PARTIAL for thing in truth.objects)
    return bool((seen.counts == wanted).mean() >= (0.4 if partly else 0.8) and (seen.counts > wanted).mean() <= more)


def check_size(seen: Tracking, truth: Truth) -> bool | None:
    """Small, medium or large, as said; None where no size was said. Borders lie midway between the sizes."""
    order = list(SIZES)
    borders = [(SIZES[a][1] + SIZES[b][0]) / 2 for a, b in pairwise(order)]
    answers = []
    hidden = hidden_part(seen, truth) if truth.kind == "depth" else None
    for number, (thing, one) in enumerate(zip(truth.objects, match_tracks(seen, truth), strict=True)):
        if thing.size:
            if one is None or not one.whole.any():
                return False
            part = hidden if hidden and hidden[0] == number else None
            radius = (part[2] if part else float(np.median(one.radii[one.whole]))) / seen.unit
            answers.append(order[int(np.searchsorted(borders, radius))] == thing.size)
    return all(answers) if answers else None


def _ground_color(frames: np.ndarray, clear: np.ndarray, texture: str = "") -> str:
    """The nearest of the world's muted colours to the median over clear pixels; "" where there are none.

    Over a textured floor it is the mean, and one of the colours is that of wood.
    """
    if not clear.any():
        return ""
    known = FLOOR_COLORS if texture else GROUNDS
    palette = np.array(list(known.values()), np.float64)
    color = frames[clear].mean(0) if texture else np.median(frames[clear], axis=0)
    return list(known)[int(((palette - color) ** 2).sum(1).argmin())]


def check_background(frames: np.ndarray, seen: Tracking, truth: Truth) -> bool | None:
    """The colours of wall and floor, as far as they were said (None: not at all), at the top and at the bottom."""
    if not truth.wall and not truth.floor:
        return None
    strip = max(2, frames.shape[1] // 16)
    clear = seen.labels < 0
    if truth.light:
        frames = frames / gain(truth.light, frames.shape[2])
    if truth.wall and _ground_color(frames[:, :strip], clear[:, :strip]) != truth.wall:
        return False
    low = -strip if truth.texture else -strip // 2
    return not truth.floor or _ground_color(frames[:, low:], clear[:, low:], truth.texture) == truth.floor


def _pan(frames: np.ndarray, seen: Tracking, thing: Track, truth: Truth) -> bool:
    """The camera moves: background and object go the other way, equally far."""
    opposite = "left" if truth.pan == "right" else "right"
    if not slides(thing, opposite, seen.unit):
        return False
    shift = ground_shift(frames, seen)
    x = thing.centers[thing.whole, 0] if thing.whole.sum() > 1 else thing.centers[thing.seen, 0]
    steps = np.flatnonzero(thing.whole if thing.whole.sum() > 1 else thing.seen)
    moved = float(x[-1] - x[0]) / max(steps[-1] - steps[0], 1) * (len(frames) - 1)
    return bool(np.isfinite(shift) and abs(shift - moved) < 0.25 * abs(moved) + 2 * seen.unit)


def _passes_behind(thing: Track, direction: str, unit: float) -> bool:
    """Seen, then gone in the middle of the frame, then seen again further on."""
    hidden = np.flatnonzero(~thing.seen)
    shown = np.flatnonzero(thing.seen)
    if not len(hidden) or not slides(thing, direction, unit, present=0.4):
        return False
    return bool((shown < hidden[0]).sum() >= 2 and (shown > hidden[-1]).sum() >= 2)


def _collides(first: Track, second: Track, direction: str, unit: float) -> bool:
    """The first comes in, and the second rests until it is reached and then moves off the same way."""
    if not second.seen[:3].any():
        return False
    both = [np.where(one.seen, one.centers[:, 0], np.nan) for one in (first, second)]
    start = np.nanmedian(both[1][:3])
    moved = np.flatnonzero(np.abs(both[1] - start) > 1.5 * unit)
    if not len(moved) or moved[0] < 2 or first.seen.mean() < 0.85:
        return False
    gone = np.flatnonzero(second.seen)[-1]
    if gone < len(second.seen) - 1 and not second.clipped[gone]:
        return False
    k = int(moved[0])
    approach = both[0][k - 1] - both[0][0]
    away = both[1][gone] - start
    if direction and approach * heading(direction)[0] < 0:
        return False
    gap = abs(both[1][k - 1] - both[0][k - 1]) - np.nanmedian(first.radii) - np.nanmedian(second.radii)
    return bool(abs(approach) > 4 * unit and approach * away > 0 and abs(away) > 5 * unit and gap < 6 * unit)


def check_motion(frames: np.ndarray, seen: Tracking, truth: Truth) -> bool:
    """Every object does what was said of it, in the direction that was said."""
    tracks = match_tracks(seen, truth)
    if any(one is None for one in tracks):
        return False
    found = [one for one in tracks if one is not None]
    if truth.kind == "pan":
        return _pan(frames, seen, found[0], truth)
    if truth.kind == "occluder":
        return _passes_behind(found[0], truth.objects[0].direction, seen.unit)
    if truth.kind == "wall":
        pairs = zip(truth.objects, found, strict=True)
        return all(_passes_behind(one, thing.direction, seen.unit) for thing, one in pairs)
    if truth.kind == "passing":  # what passes what, and how, is the relation
        return passes_by(found[0], truth.objects[0].direction, seen.unit)
    if truth.kind == "meeting":
        return meets(found[0], found[1], truth, seen.unit)
    if truth.kind == "travel":
        return camera_goes(frames, seen, found, truth.pan)
    if truth.kind == "collision":
        return _collides(found[0], found[1], truth.objects[0].direction, seen.unit)
    if len(frames) == 1:
        return all(thing.motion in ("rest", "") for thing in truth.objects)
    return all(
        not thing.motion or MOTION_CHECKS[thing.motion](one, thing.direction, seen.unit)
        for thing, one in zip(truth.objects, found, strict=True)
    )


def judge(frames: UInt8[np.ndarray, "T H W 3"], truth: Truth, seen: Tracking | None = None) -> Verdict:
    """Judges a clip (uint8 [T, H, W, 3]) against what its prompt says; `seen` saves tracking it twice."""
    seen = track(frames) if seen is None else seen
    return Verdict(
        color=check_color(seen, truth),
        shape=check_shape(seen, truth),
        count=check_count(seen, truth),
        motion=check_motion(frames, seen, truth),
        background=check_background(frames, seen, truth),
        size=check_size(seen, truth),
        relation=check_relation(seen, truth),
    )


def judge_physics(frames: UInt8[np.ndarray, "T H W 3"], truth: Truth, seen: Tracking | None = None) -> dict[str, bool]:
    """The laws that apply to a prompt, and whether a clip (uint8 [T, H, W, 3]) keeps them."""
    seen = track(frames) if seen is None else seen
    return {name: law.check(seen, truth) for name, law in LAWS.items() if law.applies(truth)}
