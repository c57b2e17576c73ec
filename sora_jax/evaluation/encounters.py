"""What happens to one or two objects, read from their tracks: they meet, go behind a wall, or float without gravity;
and which way the camera goes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from sora_jax.data.world.motion import heading
from sora_jax.data.world.prompts import Truth
from sora_jax.data.world.scene import OUTLINES
from sora_jax.evaluation.motions import slides
from sora_jax.evaluation.tracking import Track, Tracking


class Meeting(NamedTuple):
    """Two lines before and after a hit: speeds along x in pixels a frame, and how far apart the centres were then."""

    before: tuple[float, float]
    after: tuple[float, float]
    gap: float
    residual: float  # the largest distance from the lines, pixels


def meeting(first: Track, second: Track) -> Meeting | None:
    """The hit that explains both tracks best; None where there is too little to see."""
    x = [np.where(one.whole, one.centers[:, 0], np.nan) for one in (first, second)]
    best: tuple[float, float, list[tuple[float, float, float]]] | None = None
    length = len(x[0])
    for hit in np.arange(3.0, length - 3.0, 0.25):
        fits, total, worst = [], 0.0, 0.0
        for values in x:
            times = np.flatnonzero(~np.isnan(values)).astype(np.float64)
            if (times < hit).sum() < 3 or (times > hit).sum() < 2:
                break
            # place at the hit, speed before and speed after: one broken line
            design = np.stack([np.ones(len(times)), np.minimum(times - hit, 0), np.maximum(times - hit, 0)], -1)
            seen = values[times.astype(int)]
            fit, *_ = np.linalg.lstsq(design, seen, rcond=None)
            off = np.abs(design @ fit - seen)
            total, worst = total + float((off**2).sum()), max(worst, float(off.max()))
            fits.append((float(fit[0]), float(fit[1]), float(fit[2])))
        if len(fits) == 2 and (best is None or total < best[0]):
            best = total, worst, fits
    if best is None:
        return None
    (x1, v1, w1), (x2, v2, w2) = best[2]
    return Meeting((v1, v2), (w1, w2), abs(x1 - x2), best[1])


def _touch(found: Meeting, tracks: tuple[Track, Track], truth: Truth, unit: float) -> bool:
    widths = [
        OUTLINES[thing.shape].half_width * float(np.nanmedian(one.radii[one.whole]))
        for thing, one in zip(truth.objects, tracks, strict=True)
    ]
    return abs(found.gap - sum(widths)) < 2.5 * unit and found.residual < 1.5 * unit


def meets(first: Track, second: Track, truth: Truth, unit: float) -> bool:
    """Both move, touch, and part again; head-on or from behind, in the directions that were said."""
    found = meeting(first, second)
    if found is None or not _touch(found, (first, second), truth, unit):
        return False
    (v1, v2), (w1, w2) = found.before, found.after
    if min(abs(v1), abs(v2)) < 0.15 * unit or (v1 * v2 < 0) != (truth.relation == "head-on"):
        return False
    for thing, speed in zip(truth.objects, found.before, strict=True):
        if thing.direction and speed * heading(thing.direction)[0] < 0:
            return False
    side = np.sign(float(np.nanmean(first.centers[:3, 0] - second.centers[:3, 0])))
    return bool((v1 - v2) * side < -0.5 * unit and (w1 - w2) * side > 0.3 * unit)


def exchange(first: Track, second: Track, truth: Truth, unit: float) -> bool:
    """Momentum and energy are after the hit what they were before (masses are areas): the elastic law on a line."""
    found = meeting(first, second)
    if found is None or not _touch(found, (first, second), truth, unit):
        return False
    m1, m2 = (float(np.median(one.areas[one.whole])) for one in (first, second))
    (v1, v2), (w1, w2) = found.before, found.after
    push = 2 * (v1 - v2) / (m1 + m2)
    limit = 0.15 * abs(v1 - v2) + 0.25 * unit
    return bool(
        abs(v1 - v2) > 0.5 * unit
        and min(abs(v1), abs(v2)) > 0.15 * unit
        and abs(w1 - (v1 - m2 * push)) < limit
        and abs(w2 - (v2 + m1 * push)) < limit
    )


def camera_shift(frames: np.ndarray, seen: Tracking, axis: int) -> float:
    """How far the ground has moved over the clip, in pixels to the right (axis 0) or down (1); nan where it is even.

    Neighbouring frames are compared, where no object is, over shifts of up to 3.4 units in steps of an eighth.
    """
    light = frames.astype(np.float32).mean(-1)
    clear = seen.labels < 0
    for _ in range(3):  # a margin for soft edges
        for way in (1, 2):
            clear = clear & np.roll(clear, 1, way) & np.roll(clear, -1, way)
    if axis:
        light, clear = light.swapaxes(1, 2), clear.swapaxes(1, 2)
    width, margin = light.shape[2], int(np.ceil(3.4 * seen.unit)) + 1
    edges = (np.abs(np.diff(light, axis=2)) > 1.2) & clear[:, :, 1:] & clear[:, :, :-1]
    if edges.mean() < 0.002:
        return float("nan")
    inner = slice(margin, width - margin)
    total = 0.0
    shifts = np.arange(-3.4, 3.41, 0.125) * seen.unit
    for (before, after), (free, open_) in zip(pairwise(light), pairwise(clear), strict=True):
        errors = []
        for shift in shifts:
            whole = int(np.floor(shift))
            part = np.float32(shift - whole)
            left, right = margin - whole, width - margin - whole
            moved = (1 - part) * before[:, left:right] + part * before[:, left - 1 : right - 1]
            use = free[:, left:right] & free[:, left - 1 : right - 1] & open_[:, inner]
            error = (moved - after[:, inner])[use]
            errors.append(float((error**2).mean()) if len(error) else np.inf)
        total += float(shifts[int(np.argmin(errors))])
    return total


def camera_goes(frames: np.ndarray, seen: Tracking, tracks: list[Track], way: str) -> bool:
    """The ground and all objects move against the camera, equally far."""
    axis = 0 if way in ("left", "right") else 1
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}[way]
    if not all(slides(one, opposite, seen.unit) for one in tracks):
        return False
    shift = camera_shift(frames, seen, axis)
    for one in tracks:
        times = np.flatnonzero(one.whole if one.whole.sum() > 1 else one.seen)
        moved = float(one.centers[times[-1], axis] - one.centers[times[0], axis])
        moved *= (len(frames) - 1) / max(times[-1] - times[0], 1)
        if not (np.isfinite(shift) and abs(shift - moved) < 0.25 * abs(moved) + 2 * seen.unit):
            return False
    return True
