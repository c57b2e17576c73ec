"""Laws of the world, held against what is seen: gravity, restitution, reflection, momentum, permanence, constancy.

Every law is a function `law(seen: Tracking, truth: Truth) -> bool` that speaks of the clips in its domain
(`LAWS[name].applies(truth)`); it looks at pixels only through the tracks.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from sora_jax.data.world.motion import heading
from sora_jax.data.world.prompts import ObjectTruth, Truth
from sora_jax.data.world.scene import GRAVITY, OUTLINES
from sora_jax.evaluation.encounters import exchange
from sora_jax.evaluation.motions import floats
from sora_jax.evaluation.tracking import Track, Tracking

_HIDING = ("occluder", "wall")  # kinds of clip in which one may be hidden for a moment
_SETTLED = 4.0  # units above the floor: bounces that stay lower hit it every three frames or oftener


def match_tracks(seen: Tracking, truth: Truth) -> list[Track | None]:
    """For each object of the truth the longest track of its colour that is left; of equal objects, any order."""
    left = list(seen.tracks)
    matched: list[Track | None] = []
    for thing in truth.objects:
        best = next((track for track in left if track.color == thing.color), None)
        matched.append(best)
        if best is not None:
            left.remove(best)
    return matched


def _moving(seen: Tracking, truth: Truth, *motions: str) -> list[tuple[ObjectTruth, Track | None]]:
    pairs = zip(truth.objects, match_tracks(seen, truth), strict=True)
    return [(thing, track) for thing, track in pairs if thing.motion in motions]


class Flight(NamedTuple):
    """A stretch between two hits: y = y0 + v t + g t^2 / 2, with t in frames of the clip."""

    start: int
    stop: int  # one past the last frame
    y: np.ndarray
    x: np.ndarray

    @property
    def times(self) -> np.ndarray:
        return np.arange(self.start, self.stop, dtype=np.float64)

    def gravity(self) -> tuple[float, float]:
        """The best acceleration [pixels / frame^2], and the largest distance from that parabola."""
        fit = np.polyfit(self.times, self.y, 2)
        return 2 * float(fit[0]), float(np.abs(np.polyval(fit, self.times) - self.y).max())

    def given(self, gravity: float) -> tuple[float, float, float]:
        """(y0, v, largest distance) of the best parabola with that acceleration."""
        fit = np.polyfit(self.times, self.y - gravity * self.times**2 / 2, 1)
        residual = self.y - gravity * self.times**2 / 2 - np.polyval(fit, self.times)
        return float(fit[1]), float(fit[0]), float(np.abs(residual).max())


def flights(track: Track, unit: float) -> list[Flight]:
    """Stretches of free flight. Frames at the end in which the object lies still, or has settled, belong to none.

    In flight each step is longer (downwards) than the one before by the acceleration. A hit takes away the speeds
    before and after it, all in all, from the two differences round the step in which it happens.
    """
    if not track.seen.all():
        return []
    x, y = track.centers.T
    last = len(y)
    while last > 2 and abs(y[last - 1] - y[last - 2]) < 0.35 * unit and abs(y[last - 1] - y[-1]) < 0.8 * unit:
        last -= 1
    if last < len(y):
        last -= 1  # the step onto the floor is cut short
    higher = np.flatnonzero(y < y.max() - _SETTLED * unit)
    if len(higher) and higher[-1] + 2 < len(y):
        last = min(last, int(higher[-1]) + 1)
    if last < 4:
        return []
    broken = np.diff(y[:last], n=2) - GRAVITY * unit
    loss = np.concatenate([[0], broken]) + np.concatenate([broken, [0]])  # per step
    # half of the evidence for the steps at either end lies outside the clip: less is asked, and ties are theirs
    loss[[0, -1]] -= 1.3 * unit
    limit = np.full(len(loss), -5.0)
    limit[[0, -1]] = -2.6
    hits: list[int] = []
    for step in np.argsort(loss):
        if loss[step] < limit[step] * unit and all(abs(step - other) > 2 for other in hits):
            hits.append(int(step))
    edges = [0, *sorted(step + 1 for step in hits), last]
    return [Flight(a, b, y[a:b], x[a:b]) for a, b in pairwise(edges) if b - a >= 2]


def gravity(seen: Tracking, truth: Truth) -> bool:
    """Free flight is a parabola with the world's acceleration, and no apex is higher than the one before."""
    pull = GRAVITY * seen.unit
    for _, track in _moving(seen, truth, "bounce", "fall"):
        if track is None:
            return False
        parts = flights(track, seen.unit)
        if not parts or parts[0].start != 0 or len(parts[0].y) < 4:
            return False
        for part in parts:
            _, _, off = part.given(pull)
            if off > 1.2 * seen.unit:
                return False
            if len(part.y) >= 5 and abs(part.gravity()[0] / pull - 1) > 0.25:
                return False
        # dropped from rest: the first flight starts at its apex, which no later one reaches
        _, speed, _ = parts[0].given(pull)
        if abs(speed) > 1.3 * seen.unit:
            return False
        tops = [part.y.min() for part in parts]
        if any(top < tops[0] - 1.5 * seen.unit for top in tops[1:]):
            return False
        lowest = track.centers[:, 1].max()
        if track.centers[-1, 1] < lowest - 1.5 * seen.unit and len(parts) == 1:
            return False
    return True


def _hits(track: Track, unit: float) -> list[tuple[Flight, Flight, float, float, float]]:
    """For each hit between two flights: both, its time, and the vertical speeds before (down) and after (up)."""
    pull = GRAVITY * unit
    found = []
    parts = flights(track, unit)
    for before, after in pairwise(parts):
        y0, v0, _ = before.given(pull)
        y1, v1, _ = after.given(pull)
        if abs(v0 - v1) < 1e-6:
            continue
        time = (y0 - y1) / (v1 - v0)
        found.append((before, after, time, v0 + pull * time, -(v1 + pull * time)))
    return found


def restitution(seen: Tracking, truth: Truth) -> bool:
    """At every hit the speed keeps a share of 0.6 to 0.97, so each apex is lower than the one before."""
    for _, track in _moving(seen, truth, "bounce"):
        if track is None:
            return False
        hits = _hits(track, seen.unit)
        if not hits:
            return False
        if any(down <= 0 or not 0.6 <= up / down <= 0.97 for _, _, _, down, up in hits):
            return False
    return True


def reflection(seen: Tracking, truth: Truth) -> bool:
    """At a hit the vertical velocity turns round and the horizontal one goes on as it was; all at one height."""
    for _, track in _moving(seen, truth, "bounce"):
        if track is None:
            return False
        hits = _hits(track, seen.unit)
        if not hits:
            return False
        levels = []
        for before, after, time, down, up in hits:
            y0, v0, _ = before.given(GRAVITY * seen.unit)
            levels.append(y0 + v0 * time + GRAVITY * seen.unit * time**2 / 2)
            if down <= 0 or up <= 0 or len(before.x) < 2:
                return False
            slope_before, slope_after = (np.polyfit(part.times, part.x, 1)[0] for part in (before, after))
            if abs(slope_before - slope_after) > 0.8 * seen.unit:
                return False
            # the hit lies between the last frame before it and the first one after it
            if not before.stop - 1.4 <= time <= after.start + 0.4:
                return False
        if max(levels) - min(levels) > 3 * seen.unit:
            return False
    return True


def color_constancy(seen: Tracking, truth: Truth) -> bool:
    """No colour comes or goes: in every frame that shows as many objects as at first, their colours are the first's."""
    colors = [sorted(seen.blobs.color[seen.blobs.frame == t].tolist()) for t in range(len(seen.counts))]
    shown = [names for names in colors if names]
    if not shown:
        return False
    allowed = max(shown, key=len)
    palette = set(allowed)
    odd = sum(not set(names) <= palette for names in shown)
    changed = len({tuple(names) for names in shown if len(names) == len(allowed)}) > 1
    return odd <= len(shown) // 17 and not changed


def continuity(seen: Tracking, truth: Truth) -> bool:
    """Objects neither vanish, nor appear, nor jump inside the frame: each is one unbroken track.

    A track may end only at the border (or, for a moment, behind what hides it), and an object that does not fall moves
    less than 7 units a frame (more in a short clip or a wide frame, which it crosses in the time it has).
    """
    frames, height, width = seen.labels.shape
    hurry = max(1.0, 16 / max(frames - 1, 1)) * max(height, width) / min(height, width)
    if len(seen.tracks) != len(truth.objects):
        return False
    for thing, track in zip(truth.objects, match_tracks(seen, truth), strict=True):
        if track is None:
            return False
        shown = np.flatnonzero(track.seen)
        gaps = np.diff(shown)
        if truth.kind not in _HIDING and (gaps > 1).any():
            return False
        cut = track.clipped & (track.areas < 0.6 * np.nanmax(track.areas))
        if shown[0] > 0 and not cut[shown[0]]:
            return False
        if shown[-1] < frames - 1 and not cut[shown[-1]]:
            return False
        limit = 15.5 if thing.motion in ("bounce", "fall") else 11.0 if thing.motion == "orbit" else 7.0 * hurry
        steps = np.hypot(*np.diff(track.centers[shown], axis=0).T) / gaps
        if (steps > limit * seen.unit).any():
            return False
    return True


def permanence(seen: Tracking, truth: Truth) -> bool:
    """Behind an occluder an object goes on: same colour, shape and size on the other side, on the line it was on."""
    tracks = match_tracks(seen, truth)
    if len(seen.tracks) != len(truth.objects):
        return False
    return all(track is not None and _reappears(track, seen.unit) for track in tracks)


def _reappears(track: Track, unit: float) -> bool:
    """Whether one track goes on after it was hidden as if it had not been."""
    hidden = ~track.seen
    if not hidden.any() or not track.whole.any():
        return False
    # a tip behind the bar already moves the centre
    whole = track.whole & (track.areas > 0.94 * np.median(track.areas[track.whole]))
    before = whole & (np.arange(len(whole)) < np.flatnonzero(hidden)[0])
    after = whole & (np.arange(len(whole)) > np.flatnonzero(hidden)[-1])
    if before.sum() < 2 or after.sum() < 2:
        return False
    sizes = [np.median(np.sqrt(track.areas[part])) for part in (before, after)]
    if not 0.85 < sizes[0] / sizes[1] < 1.18 or track.shape_in(before)[0] != track.shape_in(after)[0]:
        return False
    # one velocity for both sides, and how far the second side is off the line of the first
    both = before | after
    design = np.column_stack([np.ones(both.sum()), np.flatnonzero(both), after[both]])
    fit, *_ = np.linalg.lstsq(design, track.centers[both], rcond=None)
    off = track.centers[both] - design @ fit
    return bool(np.abs(off).max() < 1.8 * unit and np.abs(fit[2]).max() < 4 * unit and abs(fit[1][0]) > 0.5 * unit)


def crossing(seen: Tracking, truth: Truth) -> bool:
    """What enters or leaves does so through the border, at a constant speed, in the direction that was said."""
    for thing, track in _moving(seen, truth, "enter", "exit"):
        if track is None or len(seen.tracks) != len(truth.objects) or track.whole.sum() < 3:
            return False
        shown = np.flatnonzero(track.seen)
        if (np.diff(shown) > 1).any():
            return False
        inner, outer = (shown[-1], shown[0]) if thing.motion == "enter" else (shown[0], shown[-1])
        if inner != (len(track.seen) - 1 if thing.motion == "enter" else 0):
            return False
        if not track.clipped[outer] or not track.whole[inner]:
            return False
        times = np.flatnonzero(track.whole)
        fit = np.polyfit(times, track.centers[times], 1)
        off = track.centers[times] - (times[:, None] * fit[0] + fit[1])
        speed = float(np.hypot(*fit[0]))
        if np.abs(off).max() > 1.5 * seen.unit or fit[0] @ heading(thing.direction) < 0.9 * speed:
            return False
    return True


def momentum(seen: Tracking, truth: Truth) -> bool:
    """One moves and one rests, or both move, until they touch; then momentum and energy are as before.

    Masses are areas.
    """
    first, second = match_tracks(seen, truth)
    if first is None or second is None:
        return False
    if truth.kind == "meeting":
        return exchange(first, second, truth, seen.unit)
    if not first.seen.all():
        return False
    time, speeds = _knock(first, second, truth, seen.unit)
    if time is None:
        return False
    before, after, knocked = speeds
    masses = [float(np.median(track.areas[track.whole])) for track in (first, second)]
    total = sum(masses)
    scale = abs(before)
    expected_after = (masses[0] - masses[1]) / total * before
    expected_knocked = 2 * masses[0] / total * before
    return bool(
        scale > 0.8 * seen.unit
        and abs(after - expected_after) < 0.15 * scale + 0.25 * seen.unit
        and abs(knocked - expected_knocked) < 0.15 * scale + 0.25 * seen.unit
    )


def _knock(first: Track, second: Track, truth: Truth, unit: float) -> tuple[float | None, tuple[float, float, float]]:
    """When the second was set in motion (None if not by a touch), and the speeds (x) of the first before and after
    and of the second after.
    """
    none = (None, (0.0, 0.0, 0.0))
    x = [np.where(track.whole, track.centers[:, 0], np.nan) for track in (first, second)]
    if not second.whole[:3].any():
        return none
    start = np.nanmedian(x[1][:3])
    moved = np.flatnonzero(np.abs(x[1] - start) > 0.8 * unit)
    if not len(moved) or moved[0] < 3:
        return none
    k = int(moved[0])
    early, late = np.arange(k - 1), np.arange(k, len(x[0]))
    early = early[~np.isnan(x[0][early])]
    later = [late[~np.isnan(one[late])] for one in x]
    if len(early) < 2 or min(len(part) for part in later) < 2:
        return none
    if np.nan_to_num(np.abs(x[1][: k - 1] - start)).max() > unit:
        return none
    before = np.polyfit(early, x[0][early], 1)
    after = np.polyfit(later[0], x[0][later[0]], 1)
    knocked = np.polyfit(later[1], x[1][later[1]], 1)
    if abs(knocked[0]) < 0.3 * unit:
        return none
    time = (start - knocked[1]) / knocked[0]
    widths = [
        OUTLINES[thing.shape].half_width * np.nanmedian(track.radii[track.whole])
        for thing, track in zip(truth.objects, (first, second), strict=True)
    ]
    gap = abs(start - np.polyval(before, time))
    if abs(gap - sum(widths)) > 2 * unit or before[0] * (start - x[0][early[0]]) <= 0:
        return none
    return float(time), (float(before[0]), float(after[0]), float(knocked[0]))


def weightlessness(seen: Tracking, truth: Truth) -> bool:
    """Without gravity everything flies in straight lines at one speed, and walls throw it back as fast as it came."""
    return all(track is not None and floats(track, "", seen.unit) for track in match_tracks(seen, truth))


def ground_shift(frames: np.ndarray, seen: Tracking) -> float:
    """How far the background has moved to the right over the clip, in pixels, by its vertical stripes; nan if plain.

    Row-averaged profiles of neighbouring frames are compared over shifts of up to 5 units in steps of a quarter.
    """
    clear = seen.labels < 0
    # objects are masked with a margin, for their soft edges
    for axis in (1, 2):
        clear = (
            clear
            & np.roll(clear, 2, axis)
            & np.roll(clear, -2, axis)
            & np.roll(clear, 1, axis)
            & np.roll(clear, -1, axis)
        )
    light = frames.astype(np.float32).mean(-1)
    weight = clear.sum(1)
    profile = (light * clear).sum(1) / np.maximum(weight, 1)
    columns = np.arange(profile.shape[1], dtype=np.float64)
    for t in range(len(profile)):  # columns that an object fills entirely are bridged
        good = weight[t] > 0
        if good.sum() < 8:
            return float("nan")
        profile[t] = np.interp(columns, columns[good], profile[t][good])
    profile = profile - profile.mean(1, keepdims=True)
    if profile.std(1).mean() < 1.5:
        return float("nan")
    shifts = np.arange(-5, 5.01, 0.25) * seen.unit
    margin = int(np.ceil(5 * seen.unit))
    inner = columns[margin:-margin]
    total = 0.0
    for before, after in pairwise(profile):
        moved = np.stack([np.interp(inner - shift, columns, before) for shift in shifts])
        total += float(shifts[((moved - after[margin:-margin]) ** 2).mean(1).argmin()])
    return total


class Law(NamedTuple):
    """A law and the prompts it can be held against."""

    check: Callable[[Tracking, Truth], bool]
    applies: Callable[[Truth], bool]


def _has(*motions: str) -> Callable[[Truth], bool]:
    return lambda truth: truth.kind in ("single", "pair", "trio") and any(o.motion in motions for o in truth.objects)


LAWS: dict[str, Law] = {
    "gravity": Law(gravity, _has("bounce", "fall")),
    "restitution": Law(restitution, _has("bounce")),
    "reflection": Law(reflection, _has("bounce")),
    "color_constancy": Law(color_constancy, lambda truth: True),
    "continuity": Law(continuity, lambda truth: truth.kind != "passing"),  # where half of a thing is seen, it jumps
    "permanence": Law(permanence, lambda truth: truth.kind in ("occluder", "wall")),
    "crossing": Law(crossing, _has("enter", "exit")),
    "momentum": Law(momentum, lambda truth: truth.kind in ("collision", "meeting")),
    "weightlessness": Law(weightlessness, lambda truth: not truth.gravity),
}
