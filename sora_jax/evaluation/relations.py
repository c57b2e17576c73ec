"""How the objects of a clip stand to one another, read from its pixels: beside, between, before, and passing by.

What is in front shows whole, and what is behind has lost a part of its outline, or of its area while it is passed.
"""

from __future__ import annotations

import numpy as np

from sora_jax.data.world.prompts import Truth
from sora_jax.data.world.scene import SHAPES
from sora_jax.evaluation.motions import slides
from sora_jax.evaluation.physics import match_tracks
from sora_jax.evaluation.tracking import Track, Tracking

_BESIDE = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}  # axis, sign of other - subject


def check_relation(seen: Tracking, truth: Truth) -> bool | None:
    """Whether the objects stand as was said; None where nothing was, or where it is a motion (`check_motion`)."""
    if not truth.relation or truth.kind not in ("relation", "depth", "passing"):
        return None
    tracks = match_tracks(seen, truth)
    if any(one is None for one in tracks):
        return False
    found = [one for one in tracks if one is not None]
    if truth.kind == "passing":
        return passes(found[0], found[1], truth.relation, seen.unit)
    both = np.logical_and.reduce([one.seen for one in found])
    if both.mean() < 0.5:
        return False
    places = [one.centers[both] for one in found]
    if truth.relation == "between":
        return _between(*places)
    if truth.relation in _BESIDE:
        axis, sign = _BESIDE[truth.relation]
        apart = places[1] - places[0]
        return bool((sign * apart[:, axis] > np.abs(apart[:, 1 - axis])).mean() >= 0.9)
    return _covers(found, truth, both)


def _between(middle: np.ndarray, first: np.ndarray, second: np.ndarray) -> bool:
    """Whether `middle` [T, 2] lies near the line from first to second, in its inner six tenths."""
    line = second - first
    length = np.maximum((line**2).sum(1), 1e-9)
    away = middle - first
    along = (away * line).sum(1) / length
    across = np.abs(away[:, 0] * line[:, 1] - away[:, 1] * line[:, 0]) / length
    return bool(((along > 0.2) & (along < 0.8) & (across < 0.3)).mean() >= 0.9)


def bite(track: Track, shape: str, frames: np.ndarray) -> float:
    """Median share of its area by which a track differs from a whole `shape`; about 0.05 where nothing covers it."""
    return float(np.median(track.misfit[frames, SHAPES.index(shape)]))


def _covers(found: list[Track], truth: Truth, both: np.ndarray) -> bool:
    """The one in front is whole; the other one is not, and they are near enough for that."""
    front, back = (0, 1) if truth.relation == "in front of" else (1, 0)
    whole, lost = (bite(found[n], truth.objects[n].shape, both) for n in (front, back))
    apart = np.median(np.hypot(*(found[0].centers[both] - found[1].centers[both]).T))
    reach = sum(float(np.sqrt(np.median(one.areas[both]) / np.pi)) for one in found)
    return bool(lost > whole + 0.03 and lost > 0.08 and apart < 1.4 * reach)


def passes(first: Track, second: Track, relation: str, unit: float) -> bool:
    """The first one slides past the second, which rests; while they overlap, the one behind loses area."""
    areas = [np.nan_to_num(one.areas) for one in (first, second)]
    full = [float(np.median(np.sort(area[area > 0])[-5:])) if (area > 0).any() else 0.0 for area in areas]
    if min(full) <= 0 or second.seen.mean() < 0.85:
        return False
    rests = areas[1] > 0.94 * full[1]
    places = second.centers[rests]
    if len(places) < 3 or np.abs(places - np.median(places, axis=0)).max() > 2 * unit:
        return False
    middle = np.median(places, axis=0)
    clear = first.seen & (areas[0] > 0.85 * full[0])
    if clear.sum() < 4:
        return False
    times = np.flatnonzero(clear)
    line = np.polyfit(times, first.centers[times], 1)
    off = first.centers[times] - (times[:, None] * line[0] + line[1])
    if np.abs(off).max() > 2.5 * unit or np.hypot(*line[0]) * (times[-1] - times[0]) < 12 * unit:
        return False
    way = np.arange(len(areas[0]))[:, None] * line[0] + line[1]  # where it is, seen or not
    near = np.hypot(*(way - middle).T) < 0.75 * np.sqrt(full[1] / np.pi) + 0.25 * np.sqrt(full[0] / np.pi)
    if not near.any() or way[0, 0] < middle[0] == (way[-1, 0] < middle[0]):
        return False
    lost = [float(1 - area[near].min() / whole) for area, whole in zip(areas, full, strict=True)]
    behind = lost[0] > 0.35 and lost[1] < 0.2
    before = lost[0] < 0.3 and lost[1] > 0.08
    return behind if relation == "behind" else before


def passes_by(first: Track, direction: str, unit: float) -> bool:
    """The first one of a passing slides in a direction, seen for at least four tenths of the clip."""
    return slides(first, direction, unit, present=0.4)
