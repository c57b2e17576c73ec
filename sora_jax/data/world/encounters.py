"""What happens to one or two objects: they meet, pass behind a wall, float without gravity, or the camera goes by."""

from __future__ import annotations

import numpy as np

from sora_jax.data.world import motion
from sora_jax.data.world.motion import Path, Stage
from sora_jax.data.world.plans import Plan, pick
from sora_jax.data.world.relations import Places, distinct, together
from sora_jax.data.world.scene import DIRECTIONS, OCCLUDERS, OUTLINES, Background, Event, Mix, Occluder

_OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


# ------------------------------------------------------------------------------------------------------------- plans


def draw_meeting(rng: np.random.Generator, floor: bool, mix: Mix, moving: bool) -> Plan:
    """Two that move and collide: head-on, or the faster one reaches the slower one from behind."""
    sizes = (
        ("small", "small") if floor or rng.random() < 0.5 else ("small", "medium")[:: 1 if rng.random() < 0.5 else -1]
    )
    way = pick(rng, ("left", "right"))
    first, second = (spec._replace(shape=pick(rng, ("ball", "square"))) for spec in distinct(rng, sizes, "slide", way))
    head_on = rng.random() < 0.6
    return Plan("meeting", floor, (first, second._replace(direction=_OPPOSITE[way] if head_on else way)))


def draw_wall(rng: np.random.Generator, floor: bool, mix: Mix, moving: bool) -> Plan:
    """One or two pass behind a wall; on a floor it is one, and the wall stands on the floor."""
    count = 1 if floor or rng.random() < 0.3 else 2
    specs = distinct(rng, ("small",) * count, "slide")
    return Plan("wall", floor, tuple(spec._replace(direction=pick(rng, ("left", "right"))) for spec in specs))


def draw_floating(rng: np.random.Generator, floor: bool, mix: Mix, moving: bool) -> Plan:
    """One or two that nothing pulls down."""
    count = 1 if rng.random() < 0.65 else 2
    sizes = [pick(rng, ("small", "medium") if count == 1 else ("small",)) for _ in range(count)]
    specs = distinct(rng, sizes, "float")
    return Plan("floating", floor, tuple(spec._replace(direction=pick(rng, tuple(DIRECTIONS))) for spec in specs))


def draw_travel(rng: np.random.Generator, floor: bool, mix: Mix, moving: bool) -> Plan:
    """The camera goes past one or two that rest."""
    camera = pick(rng, ("left", "right") if floor else ("left", "right", "up", "down"))
    count = 1 if rng.random() < 0.6 else 2
    sizes = [pick(rng, ("small", "medium", "large") if count == 1 else ("small",)) for _ in range(count)]
    return Plan("travel", floor, tuple(distinct(rng, sizes, "rest")), camera=camera)


# ------------------------------------------------------------------------------------------------------------ places


def radius_of(rng: np.random.Generator, stage: Stage, plan: Plan, number: int) -> float:
    """In pixels: what the plan asks for, or any of the size."""
    spec = plan.specs[number]
    return spec.radius * stage.unit if spec.radius else motion.draw_radius(rng, spec.size, stage)


def place_meeting(rng: np.random.Generator, stage: Stage, plan: Plan) -> Places | None:
    """Elastic, on a line; masses are areas: v1' = v1 - 2 m2 / (m1 + m2) (v1 - v2), and so for the other."""
    radii = [radius_of(rng, stage, plan, number) for number in range(2)]
    if plan.specs[0].size == plan.specs[1].size:
        radii[1] = radii[0]
    widths = [OUTLINES[spec.shape].half_width * radius for spec, radius in zip(plan.specs, radii, strict=True)]
    masses = [radius**2 for radius in radii]
    steps = max(stage.frames - 1, 1)
    hit = rng.uniform(0.4, 0.52) * steps
    head_on = plan.specs[0].direction != plan.specs[1].direction
    gap = sum(widths)
    start = widths[0] + rng.uniform(0, 1.5) * stage.unit
    # Along the way of the first; what the gap between them shrinks by until they touch is shared out
    if head_on:
        other = stage.width - widths[1] - rng.uniform(0, 1.5) * stage.unit
        closing = other - start - gap
        share = rng.uniform(0.35, 0.65)
        speeds = [share * closing / hit, -(1 - share) * closing / hit]
    else:
        other = start + gap + rng.uniform(0.125, 0.19) * stage.width
        slow = rng.uniform(0.25, 0.4) * (other - start - gap) / hit
        speeds = [slow + (other - start - gap) / hit, slow]
    if min(abs(speed) for speed in speeds) * hit < 2.5 * stage.unit:
        return None
    total = sum(masses)
    rebound = 2 * (speeds[0] - speeds[1]) / total
    after = [speeds[0] - masses[1] * rebound, speeds[1] + masses[0] * rebound]
    times = stage.times
    xs = [
        place + speed * np.minimum(times, hit) + then * np.maximum(times - hit, 0)
        for place, speed, then in zip((start, other), speeds, after, strict=True)
    ]
    middle = rng.uniform(max(radii), stage.height - max(radii))
    paths = []
    for spec, radius, x in zip(plan.specs, radii, xs, strict=True):
        y = middle if stage.contact is None else stage.contact - OUTLINES[spec.shape].bottom * radius
        along = x if plan.specs[0].direction == "right" else stage.width - x
        centers = np.stack([along, np.full_like(along, y)], axis=-1)
        paths.append(Path(centers, np.full(stage.frames, radius), direction=spec.direction))
    return Places([paths[0]._replace(events=(Event("collision", hit, (0, 1)),)), paths[1]])


def place_wall(rng: np.random.Generator, stage: Stage, plan: Plan, ground: Background) -> Places | None:
    """Each from one side to the other behind it, two of them one above the other."""
    radii = [radius_of(rng, stage, plan, number) for number in range(len(plan.specs))]
    outlines = [OUTLINES[spec.shape] for spec in plan.specs]
    widest = max(outline.half_width * radius for outline, radius in zip(outlines, radii, strict=True))
    bar = 2 * widest + rng.uniform(4, 6) * stage.unit
    left = stage.width / 2 - bar / 2 + rng.uniform(-2, 2) * stage.unit
    paths = []
    upper = int(rng.integers(2))
    for number, (spec, outline, radius) in enumerate(zip(plan.specs, outlines, radii, strict=True)):
        path = motion.rest(rng, stage, spec.shape, radius)
        if len(plan.specs) == 2:
            half = stage.height / 2
            low, high = (0.0, half) if number == upper else (half, float(stage.height))
            margin = outline.reach * radius + 1.25 * stage.unit
            if low + margin > high - margin:
                return None
            path.centers[:, 1] = rng.uniform(low + margin, high - margin)
        ends = outline.half_width * radius + rng.uniform(0.5, 2, 2) * stage.unit
        xs = np.linspace(ends[0], stage.width - ends[1], stage.frames)
        path.centers[:, 0] = xs if spec.direction == "right" else xs[::-1]
        paths.append(path._replace(direction=spec.direction))
    color = "pale" if ground.wall == "black" else pick(rng, tuple(OCCLUDERS)) if ground.wall != "white" else "dark"
    top, bottom = -np.inf, np.inf
    if stage.contact is not None:
        top = float((paths[0].centers[0, 1] - outlines[0].top * radii[0]) - rng.uniform(4, 16) * stage.unit)
        bottom = stage.contact + 3 * stage.unit
    return Places(paths, occluder=Occluder(left, left + bar, color, top, bottom))


def folded(start: float, speed: float, low: float, high: float, times: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Where a thing is that flies evenly between two walls that throw it back, and when it hits them.

    Unfolded it goes straight on; the walls are mirrors: p = low + |u - 2 L round(u / 2 L)|, u = start - low + v t.
    """
    length = high - low
    way = start - low + speed * times
    place = low + np.abs(way - 2 * length * np.round(way / (2 * length)))
    if speed == 0:
        return place, []
    first, last = sorted(((start - low) / length, (start - low + speed * times[-1]) / length))
    hits = [(n * length - (start - low)) / speed for n in range(int(np.ceil(first)), int(np.floor(last)) + 1)]
    return place, sorted(float(hit) for hit in hits)


def _float(rng: np.random.Generator, stage: Stage, plan: Plan, number: int) -> Path | None:
    """A straight line with elastic bounces, at least one of them, well before the end."""
    spec = plan.specs[number]
    radius = radius_of(rng, stage, plan, number)
    outline = OUTLINES[spec.shape]
    low = np.array([outline.half_width, outline.top]) * radius
    bottom = stage.height if stage.contact is None else stage.contact
    high = np.array([stage.width - outline.half_width * radius, bottom - outline.bottom * radius])
    if (high - low < 6 * stage.unit).any():
        return None
    turn = rng.uniform(-0.2, 0.2)  # radians: no two fly quite alike
    cos, sin = np.cos(turn), np.sin(turn)
    vector = np.array([[cos, -sin], [sin, cos]]) @ motion.heading(spec.direction)
    velocity = vector * rng.uniform(2.0, 3.0) * stage.unit
    start = rng.uniform(low, high)
    axes, hits = zip(*(folded(start[a], velocity[a], low[a], high[a], stage.times) for a in (0, 1)), strict=True)
    times = sorted([time for each in hits for time in each])
    seen = [time for a in (0, 1) for time in hits[a] if abs(velocity[a]) > 0.8 * stage.unit]  # others hardly show
    if stage.frames >= 9 and (not seen or times[0] < 3 or min(seen) > stage.frames - 4):
        return None
    events = tuple(Event("wall", time, (0,)) for time in times)
    return Path(np.stack(axes, -1), np.full(stage.frames, radius), events, spec.direction)


def place_floating(rng: np.random.Generator, stage: Stage, plan: Plan) -> Places | None:
    for _ in range(60):
        paths = [path for number in range(len(plan.specs)) if (path := _float(rng, stage, plan, number))]
        if len(paths) < len(plan.specs):
            continue
        if len(paths) == 2:
            apart = np.hypot(*(paths[0].centers - paths[1].centers).T)
            reach = sum(OUTLINES[s.shape].reach * p.radii[0] for s, p in zip(plan.specs, paths, strict=True))
            if apart.min() < reach + 2.5 * stage.unit:
                continue
        return Places(paths)
    return None


def place_travel(rng: np.random.Generator, stage: Stage, plan: Plan) -> Places | None:
    radii = [radius_of(rng, stage, plan, number) for number in range(len(plan.specs))]
    reach = [OUTLINES[spec.shape].reach * radius for spec, radius in zip(plan.specs, radii, strict=True)]
    offsets = np.zeros((len(radii), 2))
    if len(radii) == 2:
        # across the way of the camera, or along it on a floor, where there is no other room
        along = 0 if stage.contact is not None or plan.camera in ("up", "down") else 1
        offsets[1, along] = (sum(reach) + rng.uniform(2.5, 6) * stage.unit) * (1 if rng.random() < 0.5 else -1)
        offsets[1, 1 - along] = rng.uniform(-4, 4) * stage.unit
    paths = together(rng, stage, plan.specs, radii, offsets, _OPPOSITE[plan.camera])
    if paths is None:
        return None
    moved = paths[0].centers[0] - paths[0].centers
    sideways = plan.camera in ("left", "right")
    pan, tilt = (moved[:, 0], None) if sideways else (np.zeros(stage.frames), moved[:, 1].astype(np.float32))
    return Places([path._replace(direction="") for path in paths], pan=pan.astype(np.float32), tilt=tilt)


PLANS = {"meeting": draw_meeting, "wall": draw_wall, "floating": draw_floating, "travel": draw_travel}
PLACES = {"meeting": place_meeting, "floating": place_floating, "travel": place_travel}  # a wall must see its ground
