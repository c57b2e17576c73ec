"""How two or three objects stand to one another: beside, above, between, one before another, or three on their own.

Each kind has a plan (what is to be there) and places (where it goes). Objects that keep a relation move as one body,
so that it holds in every frame; what passes another has its depth in the order in which they are painted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sora_jax.data.world import motion
from sora_jax.data.world.motion import Path, Stage
from sora_jax.data.world.outlines import covered
from sora_jax.data.world.plans import Plan, Spec, choose, pick
from sora_jax.data.world.scene import COLORS, DIRECTIONS, OUTLINES, SHAPES, Mix, Occluder, Relation

DEPTHS = ("in front of", "behind")


class Places(NamedTuple):
    """Where everything of a plan is."""

    paths: list[Path]
    relation: Relation | None = None
    order: tuple[int, ...] = ()  # from back to front
    occluder: Occluder | None = None
    pan: np.ndarray | None = None
    tilt: np.ndarray | None = None


def distinct(rng: np.random.Generator, sizes: Sequence[str], name: str, direction: str = "") -> list[Spec]:
    """One spec for each size, no two of one colour."""
    colors = [list(COLORS)[n] for n in rng.permutation(len(COLORS))[: len(sizes)]]
    return [Spec(pick(rng, SHAPES), color, size, name, direction) for color, size in zip(colors, sizes, strict=True)]


def together(
    rng: np.random.Generator, stage: Stage, specs: Sequence[Spec], radii: Sequence[float], offsets: np.ndarray, way: str
) -> list[Path] | None:
    """Paths of objects that keep their `offsets` [n, 2] from one point, at rest or sliding `way`; None if too large.

    On a floor they stand on it, whatever their offsets say of heights.
    """
    outlines = [OUTLINES[spec.shape] for spec in specs]
    size = np.array(radii)
    offsets = np.array(offsets, np.float64)
    if stage.contact is not None:
        offsets[:, 1] = [stage.contact - outline.bottom * r for outline, r in zip(outlines, radii, strict=True)]
    wide = np.array([outline.half_width for outline in outlines]) * size
    low = np.array([(offsets[:, 0] - wide).min(), (offsets[:, 1] - [o.top for o in outlines] * size).min()])
    high = np.array([(offsets[:, 0] + wide).max(), (offsets[:, 1] + [o.bottom for o in outlines] * size).max()])
    room = np.array([stage.width, stage.height]) - (high - low) - 2 * stage.unit
    vector = motion.heading(way) if way else np.zeros(2)
    if stage.contact is not None:
        room[1] = 0.0 if low[1] > 0 else -1.0
    if (room < 0).any():
        return None
    steps = max(stage.frames - 1, 1)
    allowed = min((room[axis] / abs(vector[axis]) for axis in (0, 1) if abs(vector[axis]) > 1e-9), default=0.0)
    length = min(rng.uniform(1.6, 2.6) * stage.unit * steps, allowed)
    if way and length < 9 * stage.unit:
        return None
    travel = vector * length
    first = stage.unit - low + np.maximum(0, -travel)
    start = first + rng.random(2) * (room - np.abs(travel))
    if stage.contact is not None:
        start[1] = 0.0
    line = start + stage.times[:, None] / steps * travel
    return [
        Path(line + offset, np.full(stage.frames, radius), direction=way)
        for offset, radius in zip(offsets, radii, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------------- plans


def _way(rng: np.random.Generator, floor: bool, moving: bool) -> str:
    """A direction to slide in, or "" to rest, as often."""
    if not moving or rng.random() < 0.5:
        return ""
    return pick(rng, ("left", "right") if floor else tuple(DIRECTIONS))


def draw_trio(rng: np.random.Generator, floor: bool, mix: Mix, moving: bool) -> Plan:
    """Three of a kind, or three kinds that do the same."""
    name = choose(rng, ("rest", "slide", "bounce", "fall") if moving else ("rest",), mix)
    floor = name in ("bounce", "fall") or (floor and name == "rest")
    specs = distinct(rng, ("small",) * 3, name, pick(rng, tuple(DIRECTIONS)) if name == "slide" else "")
    return Plan("trio", floor, (specs[0],) * 3 if rng.random() < 0.5 else tuple(specs))


def draw_relation(rng: np.random.Generator, floor: bool, mix: Mix, moving: bool) -> Plan:
    """Two beside or above one another, or one between two others."""
    beside = ("left of", "right of", "between")
    name = pick(rng, beside if floor else (*beside, "above", "below"))
    way = _way(rng, floor, moving)
    sizes = ["small"] * 3 if name == "between" else [choose(rng, ("small", "medium"), mix) for _ in range(2)]
    return Plan("relation", floor, tuple(distinct(rng, sizes, "slide" if way else "rest", way)), relation=name)


def draw_depth(rng: np.random.Generator, floor: bool, mix: Mix, moving: bool) -> Plan:
    """Two of which the smaller one covers a part of the larger one."""
    name = pick(rng, DEPTHS)
    front, back = (("small", "medium"), ("small", "large"), ("medium", "large"))[int(rng.integers(3))]
    way = _way(rng, floor, moving)
    sizes = (front, back) if name == "in front of" else (back, front)
    return Plan("depth", floor, tuple(distinct(rng, sizes, "slide" if way else "rest", way)), relation=name)


def draw_passing(rng: np.random.Generator, floor: bool, mix: Mix, moving: bool) -> Plan:
    """A small one that passes a larger one at rest, in front of it or behind it."""
    first, second = distinct(rng, ("small", pick(rng, ("medium", "medium", "large"))), "rest")
    first = first._replace(motion="slide", direction=pick(rng, ("left", "right")))
    name = pick(rng, DEPTHS)
    if name == "in front of":  # what passes must not cut the other one in two
        second = second._replace(shape=pick(rng, ("ball", "square")))
        if first.shape in ("triangle", "star"):
            second = second._replace(size="large")
    return Plan("passing", floor, (first, second), relation=name)


# ------------------------------------------------------------------------------------------------------------ places


def _radii(rng: np.random.Generator, stage: Stage, plan: Plan) -> list[float]:
    """One radius for each object, the same for alike ones."""
    drawn = {spec: motion.draw_radius(rng, spec.size, stage) for spec in plan.specs}
    return [drawn[spec] for spec in plan.specs]


def place_trio(rng: np.random.Generator, stage: Stage, plan: Plan) -> Places | None:
    radii = _radii(rng, stage, plan)
    reach = np.array([OUTLINES[spec.shape].reach for spec in plan.specs]) * radii
    name = plan.specs[0].motion
    if stage.contact is None:
        box = np.array([stage.width, stage.height]) * (0.9 if name == "rest" else 0.72)
        for _ in range(40):
            offsets = rng.random((3, 2)) * (box - 2 * reach.max())
            gaps = [np.hypot(*(offsets[a] - offsets[b])) - reach[a] - reach[b] for a, b in ((0, 1), (0, 2), (1, 2))]
            if min(gaps) > 2.5 * stage.unit:
                paths = together(rng, stage, plan.specs, radii, offsets, plan.specs[0].direction)
                return None if paths is None else Places(paths)
        return None
    # a lane for each, so that they cannot meet
    lane = stage.width / 3
    if 2 * reach.max() + 2.5 * stage.unit > lane:
        return None
    paths = []
    move = {"rest": motion.rest, "fall": motion.fall}.get(name)
    for number, (spec, radius) in enumerate(zip(plan.specs, radii, strict=True)):
        path = (
            motion.bounce(rng, stage, spec.shape, radius, "") if move is None else move(rng, stage, spec.shape, radius)
        )
        slack = max(lane / 2 - reach[number] - 1.25 * stage.unit, 0)
        path.centers[:, 0] = (number + 0.5) * lane + rng.uniform(-1, 1) * slack
        paths.append(path)
    return Places([paths[number] for number in rng.permutation(3)])


def place_relation(rng: np.random.Generator, stage: Stage, plan: Plan) -> Places | None:
    radii = _radii(rng, stage, plan)
    reach = np.array([OUTLINES[spec.shape].reach for spec in plan.specs]) * radii
    if plan.relation == "between":
        axis = int(stage.contact is None and rng.random() < 0.3)  # side by side, or now and then one above another
        side = 1 if rng.random() < 0.5 else -1
        offsets = np.zeros((3, 2))
        for number, sign in ((1, side), (2, -side)):
            offsets[number, axis] = sign * (reach[0] + reach[number] + rng.uniform(2.5, 5) * stage.unit)
            offsets[number, 1 - axis] = rng.uniform(-0.15, 0.15) * abs(offsets[number, axis])
        others: tuple[int, ...] = (1, 2)
    else:
        axis = 0 if plan.relation in ("left of", "right of") else 1
        distance = reach.sum() + rng.uniform(2.5, 14) * stage.unit
        offsets = np.zeros((2, 2))
        offsets[1, axis] = distance if plan.relation in ("left of", "above") else -distance
        offsets[1, 1 - axis] = rng.uniform(-0.3, 0.3) * distance
        others = (1,)
    paths = together(rng, stage, plan.specs, radii, offsets, plan.specs[0].direction)
    return None if paths is None else Places(paths, Relation(plan.relation, 0, others))


def place_depth(rng: np.random.Generator, stage: Stage, plan: Plan) -> Places | None:
    radii = _radii(rng, stage, plan)
    front, back = (0, 1) if plan.relation == "in front of" else (1, 0)
    near, far = plan.specs[front], plan.specs[back]
    for _ in range(12):
        distance = rng.uniform(0.5, 1.15) * radii[back] + 0.35 * radii[front]
        angle = rng.uniform(0, 2 * np.pi) if stage.contact is None else np.pi * rng.integers(2)
        offset = distance * np.array([np.cos(angle), np.sin(angle)])
        if stage.contact is not None:  # both stand on it
            offset[1] = OUTLINES[far.shape].bottom * radii[back] - OUTLINES[near.shape].bottom * radii[front]
        share = covered(far.shape, radii[back], near.shape, radii[front], offset[None])[0]
        if 0.1 < share < 0.35:
            offsets = np.zeros((2, 2))
            offsets[front] = offset
            paths = together(rng, stage, plan.specs, radii, offsets, plan.specs[0].direction)
            return None if paths is None else Places(paths, Relation(plan.relation, 0, (1,)), (back, front))
    return None


def place_passing(rng: np.random.Generator, stage: Stage, plan: Plan) -> Places | None:
    radii = _radii(rng, stage, plan)
    mover, other = plan.specs
    middle = motion.rest(rng, stage, other.shape, radii[1])
    middle.centers[:, 0] = stage.width / 2 + rng.uniform(-3, 3) * stage.unit
    path = motion.rest(rng, stage, mover.shape, radii[0])
    ends = OUTLINES[mover.shape].half_width * radii[0] + rng.uniform(0.5, 2, 2) * stage.unit
    xs = np.linspace(ends[0], stage.width - ends[1], stage.frames)
    path.centers[:, 0] = xs if mover.direction == "right" else xs[::-1]
    if stage.contact is None:
        path.centers[:, 1] = middle.centers[:, 1] + rng.uniform(-0.35, 0.35) * radii[1]
    offsets = middle.centers - path.centers
    hidden = covered(mover.shape, radii[0], other.shape, radii[1], offsets)  # of the mover, were it behind
    if hidden.max() < 0.6 or hidden[:2].max() > 0 or hidden[-2:].max() > 0:
        return None
    order = (0, 1) if plan.relation == "behind" else (1, 0)
    return Places([path._replace(direction=mover.direction), middle], Relation(plan.relation, 0, (1,)), order)


PLANS = {"trio": draw_trio, "relation": draw_relation, "depth": draw_depth, "passing": draw_passing}
PLACES = {"trio": place_trio, "relation": place_relation, "depth": place_depth, "passing": place_passing}
