"""How the objects of a clip stand to one another, read from its pixels: beside, between, before, and passing by.

What is in front shows whole, and what is behind has lost a part of its outline, or of its area while it is passed.
"""

from __future__ import annotations

import numpy as np

from sora_jax.data.world.motion import heading
from sora_jax.data.world.outlines import shape_distance
from sora_jax.data.world.prompts import Truth
from sora_jax.data.world.scene import COLORS, SHAPES
from sora_jax.evaluation.physics import match_tracks
from sora_jax.evaluation.tracking import Track, Tracking

_MOVES = np.stack(np.meshgrid(*[[-1.0, 0.0, 1.0]] * 3), -1).reshape(-1, 3)  # steps of (x, y, radius)
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


def completed(seen: Tracking, track: Track, front: Track, t: int) -> tuple[str, float]:
    """(shape, radius in pixels) of an object of which `front` hides a part in frame t: what fits the rest of it best.

    Pixels of the one in front say nothing; on all others a drawing must be where the object is and nowhere else. For
    each shape its place and radius are searched for from coarse to fine.
    """
    names = list(COLORS)
    mine = seen.labels[t] == names.index(track.color)
    other = seen.labels[t] == names.index(front.color)
    for way in (0, 1):  # edges between the two belong to neither
        other = other | np.roll(other, 1, way) | np.roll(other, -1, way)
    height, width = mine.shape
    y, x = np.nonzero(mine)
    pad = int(6 * seen.unit) + 2
    top, left = max(0, y.min() - pad), max(0, x.min() - pad)
    window = np.s_[top : min(height, y.max() + pad), left : min(width, x.max() + pad)]
    target, known = mine[window], ~other[window] | mine[window]
    ys, xs = (np.arange(n, dtype=np.float32) + 0.5 for n in target.shape)
    best = ("", 0.0, np.inf)
    for shape in SHAPES:
        at = np.array([x.mean() - left + 0.5, y.mean() - top + 0.5, np.sqrt(mine.sum() / np.pi) * 1.08])

        lowest = np.inf
        for step in np.array([3.0, 1.5, 0.7, 0.35]) * seen.unit:
            for _ in range(8):
                tries = at + step * _MOVES
                dx, dy = xs - tries[:, :1, None], ys[:, None] - tries[:, 1:2, None]
                drawn = np.clip(0.5 - shape_distance(shape, dx, dy, tries[:, 2:, None]), 0, 1)
                costs = (np.abs(drawn - target) * known).sum((1, 2))
                if costs.min() >= lowest - 1e-9:
                    break
                lowest, at = float(costs.min()), tries[int(costs.argmin())]
        if lowest < best[2]:
            best = shape, float(at[2]), lowest
    return best[0], best[1]


def hidden_part(seen: Tracking, truth: Truth) -> tuple[int, str, float] | None:
    """Of a clip with depth: the number of the object behind, its shape, and its radius in pixels; from three frames."""
    tracks = match_tracks(seen, truth)
    back = 0 if truth.relation == "behind" else 1
    far, near = tracks[back], tracks[1 - back]
    if far is None or near is None:
        return None
    both = np.flatnonzero(far.seen & near.seen)
    if not len(both):
        return None
    found = [completed(seen, far, near, int(t)) for t in both[[0, len(both) // 2, -1]]]
    shapes = [shape for shape, _ in found]
    shape = max(SHAPES, key=shapes.count)
    return back, shape, float(np.median([radius for name, radius in found if name == shape]))


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
    line = _glide(first, unit)
    if line is None:
        return False
    way = np.arange(len(areas[0]))[:, None] * line[0] + line[1]  # where it is, seen or not
    near = np.hypot(*(way - middle).T) < 0.75 * np.sqrt(full[1] / np.pi) + 0.25 * np.sqrt(full[0] / np.pi)
    if not near.any() or (way[0, 0] < middle[0]) == (way[-1, 0] < middle[0]):
        return False
    lost = [float(1 - area[near].min() / whole) for area, whole in zip(areas, full, strict=True)]
    behind = lost[0] > 0.35 and lost[1] < 0.2
    before = lost[0] < 0.3 and lost[1] > 0.08
    return behind if relation == "behind" else before


def _glide(track: Track, unit: float) -> np.ndarray | None:
    """The line (slope [2], offset [2]) on which it is where nothing hides it; None where that is no even motion."""
    areas = np.nan_to_num(track.areas)
    if not areas.any():
        return None
    clear = np.flatnonzero(areas > 0.85 * np.median(np.sort(areas[areas > 0])[-5:]))
    if len(clear) < 4:
        return None
    line = np.polyfit(clear, track.centers[clear], 1)
    return line if np.abs(track.centers[clear] - (clear[:, None] * line[0] + line[1])).max() < 2.5 * unit else None


def passes_by(first: Track, direction: str, unit: float) -> bool:
    """The first one of a passing slides in a direction (any when "")."""
    line = _glide(first, unit)
    if line is None or np.hypot(*line[0]) * (len(first.areas) - 1) < 20 * unit:
        return False
    return not direction or bool(line[0] @ heading(direction) > np.cos(np.radians(22.5)) * np.hypot(*line[0]))
