"""Does a track do what a prompt says? One predicate per motion of the world, each on a `Track`.

Tolerances are in units (1/64 of the frame's shorter side) and leave room for a generated clip's wobble; the laws of
physics are held more strictly by `checkers`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from sora_jax.data.world.motion import heading
from sora_jax.evaluation.tracking import Track


def _times(seen: np.ndarray) -> np.ndarray:
    return np.flatnonzero(seen).astype(np.float64)


def _line(times: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, float]:
    """Least-squares line through values [n, k] over times [n]: slope [k], and the root mean square distance to it."""
    centred = times - times.mean()
    slope = (centred[:, None] * (values - values.mean(0))).sum(0) / max(float((centred**2).sum()), 1e-9)
    residual = values - values.mean(0) - centred[:, None] * slope
    return slope, float(np.sqrt((residual**2).sum(1).mean()))


def _present(track: Track, share: float) -> bool:
    return bool(track.seen.mean() >= share)


def _size_steady(track: Track) -> bool:
    """Its size does not change by more than a quarter, as far as it can be seen whole."""
    radii = np.sqrt(track.areas[track.whole])
    return len(radii) < 2 or bool(radii.max() < 1.3 * radii.min())


def slides(track: Track, direction: str, unit: float, present: float = 0.7) -> bool:
    """Constant velocity in a direction (any when ""), for at least 7 units and a `present` share of the clip."""
    use = track.whole if track.whole.sum() >= 4 else track.seen
    if use.sum() < 4 or not _present(track, present) or not _size_steady(track):
        return False
    slope, residual = _line(_times(use), track.centers[use])
    speed = float(np.hypot(*slope))
    travel = speed * (_times(use)[-1] - _times(use)[0])
    if travel < 7 * unit or residual > 1.2 * unit + 0.05 * travel:
        return False
    return not direction or bool(slope @ heading(direction) > np.cos(np.radians(22.5)) * speed)


def rests(track: Track, direction: str, unit: float) -> bool:
    """It does not move or change."""
    if not _present(track, 0.85) or not _size_steady(track):
        return False
    centers = track.centers[track.seen]
    return bool(np.abs(centers - np.median(centers, axis=0)).max() < 2 * unit)


def bounces(track: Track, direction: str, unit: float) -> bool:
    """It falls, turns at the bottom, and comes up again, less high than it was; it may drift evenly."""
    if not _present(track, 0.8) or not _size_steady(track):
        return False
    x, y = track.centers[track.seen].T
    turns = np.flatnonzero((np.diff(y[:-1]) > 0) & (np.diff(y[1:]) < 0) & (y[1:-1] > (y.min() + y.max()) / 2))
    if not len(turns) or _line(np.arange(len(x), dtype=np.float64), x[:, None])[1] > 1.5 * unit:
        return False
    low = int(turns[0]) + 1  # the first hit
    fallen, risen = y[low] - y[: low + 1].min(), y[low] - y[low:].min()
    if fallen < 9 * unit or risen < 4 * unit or risen > 1.05 * fallen:
        return False
    if (np.diff(y[: low + 1]) < -1.5 * unit).any():  # on the way down it only goes down
        return False
    if not direction:
        return True
    return bool((x[-1] - x[0]) * heading(direction)[0] > 6 * unit)


def falls(track: Track, direction: str, unit: float) -> bool:
    """It goes straight down, faster and faster, and then lies still."""
    if not _present(track, 0.8) or not _size_steady(track):
        return False
    x, y = track.centers[track.seen].T
    if y[-1] - y[0] < 10 * unit or np.ptp(x) > 4 * unit or (np.diff(y) < -1.5 * unit).any():
        return False
    tail = y[-max(2, len(y) // 4) :]
    landed = int(np.flatnonzero(y > y[-1] - 1.5 * unit)[0])
    half = max(1, landed // 2)
    steps = np.diff(y[: landed + 1])
    return bool(np.ptp(tail) < 2 * unit and (landed < 3 or steps[half:].mean() > 1.2 * steps[:half].mean()))


def orbits(track: Track, direction: str, unit: float) -> bool:
    """It goes round on a circle, at least two thirds of a turn per 16 frames, always the same way round."""
    if not _present(track, 0.85) or not _size_steady(track):
        return False
    points = track.centers[track.seen]
    # circle through the points by least squares (Kasa 1976): x^2 + y^2 = 2 a x + 2 b y + c
    matrix = np.column_stack([2 * points, np.ones(len(points))])
    (a, b, _), *_ = np.linalg.lstsq(matrix, (points**2).sum(1), rcond=None)
    away = points - (a, b)
    distance = np.hypot(*away.T)
    ring = float(distance.mean())
    if not 7 * unit < ring < 34 * unit or float(np.std(distance)) > 1.5 * unit + 0.05 * ring:
        return False
    angles = np.unwrap(np.arctan2(away[:, 1], away[:, 0]))
    turned = float(angles[-1] - angles[0])
    steps = np.diff(angles) * np.sign(turned)
    if abs(turned) < np.pi * 4 / 3 * (len(track.areas) - 1) / 16 or (steps < -0.1).any():
        return False
    if direction:  # y points down: growing angles are clockwise
        return bool((turned > 0) == (direction == "clockwise"))
    return True


def _swells(track: Track, ratio: float, unit: float) -> bool:
    """The radius grows steadily by at least `ratio` (use the reversed track for shrinking) in one place."""
    if not _present(track, 0.8):
        return False
    radii = np.sqrt(track.areas[track.seen])
    centers = track.centers[track.seen]
    if np.abs(centers - np.median(centers, axis=0)).max() > 3.5 * unit:
        return False
    ends = max(1, len(radii) // 6)
    first, last = radii[:ends].mean(), radii[-ends:].mean()
    return bool(last > ratio * first and (np.diff(radii) > -0.12 * last).all())


def grows(track: Track, direction: str, unit: float) -> bool:
    return _swells(track, 1.45, unit)


def _backwards(track: Track) -> Track:
    return Track(track.color, track.centers[::-1], track.areas[::-1], track.clipped[::-1], track.misfit[::-1])


def shrinks(track: Track, direction: str, unit: float) -> bool:
    return _swells(_backwards(track), 1.45, unit)


def enters(track: Track, direction: str, unit: float) -> bool:
    """Not there, or cut by the border, at first; whole at the end, moving in `direction`."""
    areas = np.nan_to_num(track.areas)
    if track.seen.sum() < 4 or not track.seen[-2:].all() or track.clipped[-1]:
        return False
    if areas[0] > 0.5 * areas.max() or not track.clipped[np.flatnonzero(track.seen)[0]]:
        return False
    gone = np.flatnonzero(~track.seen)
    if len(gone) and gone[-1] >= np.flatnonzero(track.seen)[0]:
        return False
    points = track.centers[track.whole]
    if len(points) < 2:
        return False
    slope, residual = _line(_times(track.whole), points)
    along = float(slope @ heading(direction)) if direction else float(np.hypot(*slope))
    return along > 0.9 * float(np.hypot(*slope)) and along > 0.5 * unit and residual < 2 * unit


_OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up", "": ""}


def exits(track: Track, direction: str, unit: float) -> bool:
    """An entry played backwards."""
    return enters(_backwards(track), _OPPOSITE[direction], unit)


def _straight(places: np.ndarray, unit: float) -> tuple[float, int] | None:
    """(speed, turns) of places [T] along one axis that change evenly but for turning round; None if they do not.

    The lines between the turns have one slope but for its sign, and no place is far from its line.
    """
    steps = np.diff(places)
    speed = float(np.median(np.abs(steps)))
    if speed < 0.4 * unit:
        return (speed, 0) if np.ptp(places) < 0.4 * unit * len(places) else None
    sure = np.flatnonzero(np.abs(steps) > 0.7 * speed)
    turns = [(int(k), int(n)) for k, n in pairwise(sure) if steps[k] * steps[n] < 0]
    # it turns round at once, if need be in the first step or the last
    if any(n - k > 3 for k, n in turns) or sure[0] > 1 or sure[-1] < len(steps) - 2:
        return None
    edges = [sure[0], *(edge for k, n in turns for edge in (k + 2, n)), sure[-1] + 2]
    slopes = []
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        times = np.arange(start, stop, dtype=np.float64)
        if len(times) < 3:
            continue
        slope, offset = np.polyfit(times, places[start:stop], 1)
        if np.abs(places[start:stop] - slope * times - offset).max() > 0.8 * unit:
            return None
        slopes.append(abs(float(slope)))
    even = slopes and max(slopes) - min(slopes) < 0.15 * max(slopes) + 0.25 * unit
    return (max(slopes), len(turns)) if even else None


def floats(track: Track, direction: str, unit: float) -> bool:
    """Straight lines at one speed, thrown back by what it meets: nothing speeds it up or slows it down."""
    if track.seen.mean() < 0.9 or track.seen.sum() < 6 or not _size_steady(track):
        return False
    places = track.centers[track.seen]
    axes = [_straight(places[:, axis], unit) for axis in (0, 1)]
    if axes[0] is None or axes[1] is None:
        return False
    if np.hypot(axes[0][0], axes[1][0]) < 1.2 * unit or axes[0][1] + axes[1][1] < 1:
        return False
    if not direction:
        return True
    start = places[3] - places[0]
    return bool(start @ heading(direction) > np.cos(np.radians(26)) * np.hypot(*start))


MOTION_CHECKS: dict[str, Callable[[Track, str, float], bool]] = {
    "slide": slides,
    "rest": rests,
    "bounce": bounces,
    "fall": falls,
    "orbit": orbits,
    "grow": grows,
    "shrink": shrinks,
    "enter": enters,
    "exit": exits,
    "float": floats,
}
