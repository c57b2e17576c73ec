"""Where an object is in every frame: closed forms, so that the truth is exact and nothing is integrated.

Every function takes a `Stage` and returns a `Path`; lengths are pixels, times are frames.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sora_jax.data.world.scene import DIRECTIONS, GRAVITY, OUTLINES, SIZES, Event


class Stage(NamedTuple):
    """The room an object has: frame size, and the line it stands on (None where there is no floor)."""

    frames: int
    height: int
    width: int
    contact: float | None

    @property
    def unit(self) -> float:
        return min(self.height, self.width) / 64

    @property
    def times(self) -> np.ndarray:
        return np.arange(self.frames, dtype=np.float64)


class Path(NamedTuple):
    """centers [T, 2], radii [T], the events as (kind, time), and a direction in words ("" if none)."""

    centers: np.ndarray
    radii: np.ndarray
    events: tuple[Event, ...] = ()
    direction: str = ""
    pivot: tuple[float, float] | None = None


def heading(direction: str) -> np.ndarray:
    """The unit vector [2] of a direction's name."""
    vector = np.array(DIRECTIONS[direction], np.float64)
    return vector / np.linalg.norm(vector)


def bounce_height(
    times: np.ndarray, start: float, gravity: float, restitution: float
) -> tuple[np.ndarray, list[float]]:
    """Height above the floor of a thing dropped from `start` at time 0, and the times at which it hits the floor.

    Between hits n and n + 1 the height is v_n s - g s^2 / 2 with v_n = restitution^n sqrt(2 g start), s the time
    since hit n. Hits are listed while they are within `times` and the rebound is higher than 1 % of the start.
    """
    heights = start - gravity * times**2 / 2
    hits: list[float] = []
    hit, speed = float(np.sqrt(2 * start / gravity)), float(np.sqrt(2 * start * gravity))
    while hit <= times[-1]:
        hits.append(hit)
        speed *= restitution
        since = times - hit
        heights = np.where(since >= 0, speed * since - gravity * since**2 / 2, heights)
        if speed**2 < 0.02 * gravity * start:  # too low to see: it lies still from here on
            return np.where(since >= 0, 0.0, heights), hits
        hit += 2 * speed / gravity
    return heights, hits


def draw_radius(rng: np.random.Generator, size: str, stage: Stage) -> float:
    """A radius of a size, in pixels."""
    low, high = SIZES[size]
    return float(rng.uniform(low, high)) * stage.unit


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    """Uniform in [low, high], or the middle where the room is too small for a choice."""
    return float(rng.uniform(low, high)) if high > low else (low + high) / 2


def _still(stage: Stage, x: float, y: float, radius: float) -> Path:
    centers = np.tile(np.array([x, y], np.float64), (stage.frames, 1))
    return Path(centers, np.full(stage.frames, radius))


def rest(rng: np.random.Generator, stage: Stage, shape: str, radius: float) -> Path:
    """It stays where it is, on the floor if there is one."""
    outline = OUTLINES[shape]
    margin = outline.half_width * radius + stage.unit
    x = _between(rng, margin, stage.width - margin)
    if stage.contact is not None:
        return _still(stage, x, stage.contact - outline.bottom * radius, radius)
    low, high = outline.top * radius + stage.unit, stage.height - outline.bottom * radius - stage.unit
    return _still(stage, x, _between(rng, low, high), radius)


def slide(rng: np.random.Generator, stage: Stage, shape: str, radius: float, direction: str) -> Path:
    """Constant velocity of 1.6 to 2.6 units a frame, slower only where a long clip would leave the frame."""
    outline = OUTLINES[shape]
    vector = heading(direction)
    edge = 0.75 * radius  # how close a centre may come to the border: a slide may clip its tips off, never itself
    low = np.array([edge, edge])
    high = np.array([stage.width - edge, stage.height - edge])
    if stage.contact is not None:
        low[1] = high[1] = stage.contact - outline.bottom * radius
    room = np.where(np.abs(vector) > 1e-9, (high - low) / np.maximum(np.abs(vector), 1e-9), np.inf).min()
    steps = max(stage.frames - 1, 1)
    length = min(rng.uniform(1.6, 2.6) * stage.unit * steps, room)
    travel = vector * length
    first = np.maximum(low, low - travel)
    last = np.minimum(high, high - travel)
    start = np.array([_between(rng, first[0], last[0]), _between(rng, first[1], last[1])])
    return Path(start + stage.times[:, None] / steps * travel, np.full(stage.frames, radius), direction=direction)


def enter(rng: np.random.Generator, stage: Stage, shape: str, radius: float, direction: str) -> Path:
    """It comes in from outside the frame, moving in `direction`, and is well inside at the end."""
    outline = OUTLINES[shape]
    vector = heading(direction)
    horizontal = direction in ("left", "right")
    size = stage.width if horizontal else stage.height
    reach = outline.half_width if horizontal else max(outline.top, outline.bottom)
    outside = -(reach * radius) - rng.uniform(0, 4) * stage.unit
    inside = rng.uniform(0.45, 0.65) * size
    steps = max(stage.frames - 1, 1)
    along = outside + (inside - outside) * stage.times / steps  # distance from the border it comes from
    if stage.contact is not None:
        across = stage.contact - outline.bottom * radius
    else:
        margin = outline.reach * radius
        across = _between(rng, margin, (stage.height if horizontal else stage.width) - margin)
    along = along if vector.sum() > 0 else size - along
    level = np.full(stage.frames, across)
    centers = np.stack([along, level] if horizontal else [level, along], axis=-1)
    return Path(centers, np.full(stage.frames, radius), direction=direction)


def exit_(rng: np.random.Generator, stage: Stage, shape: str, radius: float, direction: str) -> Path:
    """It starts well inside and leaves the frame in `direction`: an entry played backwards."""
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}[direction]
    path = enter(rng, stage, shape, radius, opposite)
    return path._replace(centers=path.centers[::-1].copy(), direction=direction)


def _drop(rng: np.random.Generator, stage: Stage, floor: float, top: float) -> float:
    """The y from which to drop what comes to rest at `floor`: 25 to 40 units higher, and within the frame."""
    return _between(rng, max(0.8 * top, floor - 40 * stage.unit), floor - 25 * stage.unit)


def fall(rng: np.random.Generator, stage: Stage, shape: str, radius: float) -> Path:
    """Dropped from near the top: accelerates, lands on the floor, and stays there."""
    path = rest(rng, stage, shape, radius)
    gravity = GRAVITY * stage.unit
    floor = path.centers[0, 1]
    start = _drop(rng, stage, floor, OUTLINES[shape].top * radius)
    heights, hits = bounce_height(stage.times, floor - start, gravity, restitution=0.0)
    path.centers[:, 1] = floor - heights
    return path._replace(events=tuple(Event("land", hit, (0,)) for hit in hits[:1]))


def bounce(rng: np.random.Generator, stage: Stage, shape: str, radius: float, drift: str) -> Path:
    """Dropped from near the top, it keeps restitution^2 of its height at a hit; `drift` is "", "left" or "right"."""
    outline = OUTLINES[shape]
    path = rest(rng, stage, shape, radius)
    gravity = GRAVITY * stage.unit
    floor = path.centers[0, 1]
    start = _drop(rng, stage, floor, outline.top * radius)
    heights, hits = bounce_height(stage.times, floor - start, gravity, restitution=rng.uniform(0.72, 0.86))
    path.centers[:, 1] = floor - heights
    if drift:
        travel = heading(drift)[0] * min(
            rng.uniform(1.2, 1.8) * stage.unit * max(stage.frames - 1, 1), stage.width - 2 * radius
        )
        first, last = max(radius, radius - travel), min(stage.width - radius, stage.width - radius - travel)
        path.centers[:, 0] = _between(rng, first, last) + travel * stage.times / max(stage.frames - 1, 1)
    return path._replace(events=tuple(Event("bounce", hit, (0,)) for hit in hits), direction=drift)


def orbit(
    rng: np.random.Generator, stage: Stage, radius: float, turn: str, around: float = 0.0, angle: float | None = None
) -> Path:
    """Uniform motion on a circle round the middle of the frame, one turn in 14 to 20 frames.

    `turn` is "clockwise" or "counterclockwise" as seen on the screen; `around` is the reach of what stands in the
    middle, which the circle clears; `angle` is the starting angle in radians, clockwise from the right.
    """
    unit = stage.unit
    ring = max(rng.uniform(15, 18) * unit, radius * 1.4 + around + 2 * unit)
    ring = min(ring, min(stage.height, stage.width) / 2 - 0.9 * radius)
    slack = max(0.0, min(stage.height, stage.width) / 2 - ring - radius)
    middle = np.array([stage.width, stage.height]) / 2 + rng.uniform(-1, 1, 2) * min(slack, 4 * unit)
    angle = rng.uniform(0, 2 * np.pi) if angle is None else angle
    rate = 2 * np.pi / rng.uniform(14, 20) * (1 if turn == "clockwise" else -1)
    angles = angle + rate * stage.times
    centers = middle + ring * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    pivot = (float(middle[0]), float(middle[1]))
    return Path(centers, np.full(stage.frames, radius), direction=turn, pivot=pivot)


def swell(rng: np.random.Generator, stage: Stage, shape: str, small: float, large: float, growing: bool) -> Path:
    """The radius changes at a constant rate from `small` to `large` (or back) around a fixed centre."""
    path = rest(rng, stage, shape, large)
    radii = np.linspace(small, large, stage.frames)
    return path._replace(radii=radii if growing else radii[::-1].copy())


def collide(
    stage: Stage, x: float, speed: float, other: float, gap: float, mass: float, other_mass: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Head-on elastic collision on a line: a thing at `x` moving at `speed` meets one that rests at `other`.

    They touch when their centres are `gap` apart. Momentum and energy are kept: v1 = (m1 - m2) / (m1 + m2) v,
    v2 = 2 m1 / (m1 + m2) v. Returns both x [T] and the time of contact.
    """
    times = stage.times
    sign = np.sign(speed)
    hit = (other - sign * gap - x) / speed
    total = mass + other_mass
    after = np.maximum(times - hit, 0)
    first = x + speed * np.minimum(times, hit) + (mass - other_mass) / total * speed * after
    second = other + 2 * mass / total * speed * after
    return first, second, float(hit)
