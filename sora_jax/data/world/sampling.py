"""Drawing scenes: what is in them, and where everything goes. Scene i depends on (seed, i) and the settings only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from sora_jax.data.world import encounters, motion, relations
from sora_jax.data.world.motion import Path, Stage, draw_radius
from sora_jax.data.world.outlines import covered
from sora_jax.data.world.plans import Plan, Spec, allowed, choose, draw_plan, pick
from sora_jax.data.world.relations import Places
from sora_jax.data.world.scene import (
    FLOORS,
    KINDS,
    LIGHTS,
    MORE_KINDS,
    OUTLINES,
    TEXTURES,
    WALLS,
    Background,
    Event,
    Mix,
    Occluder,
    Scene,
    Shot,
    WorldObject,
    is_heldout,
)
from sora_jax.data.world.shots import character_kinds, differs, draw_character, played, recognisable
from sora_jax.errors import UserError, nearest

SPLITS = ("train", "heldout", "all")
STILL_KINDS = ("single", "pair", "trio", "relation", "depth")  # kinds that one frame can show
_STREAM = 0x50524F43  # keeps the world's random streams apart from others made of (seed, index)


def _background(rng: np.random.Generator, plan: Plan, stage: Stage, mix: Mix, avoid: str) -> Background:
    """Colours whose names differ from those of the objects; `avoid` is the wall of the shot before."""
    colors = {spec.color for spec in plan.specs}
    walls = [name for name in WALLS if name not in colors and name != avoid]
    phase = float(rng.uniform(0, 64)) * stage.unit
    if stage.contact is not None:
        floor = pick(rng, [name for name in FLOORS if name not in colors])
        wall = pick(rng, [name for name in walls if name != floor])
        horizon = stage.contact - float(rng.uniform(5, 8)) * stage.unit
        striped = not plan.camera and bool(rng.random() < mix.striped)
        texture = ""
        if plan.camera or (mix.textured and rng.random() < mix.textured):  # a camera's way must be seen
            texture = pick(rng, TEXTURES)
            floor = "wooden" if texture == "wooden" else floor
        return Background("floor", wall, floor, horizon, stage.contact, striped, phase, texture)
    edge = float(stage.height)
    if plan.camera:
        wall = pick(rng, walls)
        return Background("plain", wall, "", edge, edge, True, phase, level=plan.camera in ("up", "down"))
    striped = plan.kind == "pan" or bool(rng.random() < mix.striped)
    if not striped and rng.random() < mix.gradient:
        wall, floor = (str(name) for name in rng.permutation([name for name in walls if name != "black"])[:2])
        return Background("gradient", wall, floor, edge, edge, False, phase)
    return Background("plain", pick(rng, walls), "", edge, edge, striped, phase)


def _path(rng: np.random.Generator, stage: Stage, spec: Spec, radius: float) -> Path:
    """A path for one object on its own."""
    match spec.motion:
        case "slide":
            return motion.slide(rng, stage, spec.shape, radius, spec.direction)
        case "bounce":
            return motion.bounce(rng, stage, spec.shape, radius, spec.direction)
        case "fall":
            return motion.fall(rng, stage, spec.shape, radius)
        case "orbit":
            return motion.orbit(rng, stage, radius, spec.direction)
        case "enter":
            return motion.enter(rng, stage, spec.shape, radius, spec.direction)
        case "exit":
            return motion.exit_(rng, stage, spec.shape, radius, spec.direction)
        case "grow" | "shrink":
            # From less than half to the full size, so that growth is plain to see whatever the size
            large = max(radius, 9.5 * stage.unit)
            return motion.swell(rng, stage, spec.shape, 0.42 * large, large, spec.motion == "grow")
        case "rest":
            return motion.rest(rng, stage, spec.shape, radius)
    raise ValueError(spec.motion)


def _apart(stage: Stage, plan: Plan, first: Path, second: Path) -> bool:
    """Whether two objects never touch."""
    reach = OUTLINES[plan.specs[0].shape].reach * first.radii + OUTLINES[plan.specs[1].shape].reach * second.radii
    distance = np.linalg.norm(first.centers - second.centers, axis=-1)
    return bool((distance > reach + 2.5 * stage.unit).all())


def _pair(rng: np.random.Generator, stage: Stage, plan: Plan) -> list[Path] | None:
    """Two paths that never touch, or None when luck runs out."""
    radii = [draw_radius(rng, spec.size, stage) for spec in plan.specs]
    if plan.specs[0].size == plan.specs[1].size:
        radii[1] = radii[0]
    if plan.orbit_pair == "around":
        reach = OUTLINES[plan.specs[1].shape].reach * radii[1]
        first = motion.orbit(rng, stage, radii[0], plan.specs[0].direction, around=reach)
        assert first.pivot is not None
        second = Path(np.tile(np.array(first.pivot), (stage.frames, 1)), np.full(stage.frames, radii[1]))
        return [first, second] if _apart(stage, plan, first, second) else None
    if plan.orbit_pair == "opposite":
        angle = rng.uniform(0, 2 * np.pi)
        state = rng.bit_generator.state  # the same circle at the same rate for both
        first = motion.orbit(rng, stage, max(radii), plan.specs[0].direction, angle=angle)
        rng.bit_generator.state = state
        second = motion.orbit(rng, stage, max(radii), plan.specs[0].direction, angle=angle + np.pi)
        pair = [first._replace(radii=first.radii * 0 + radii[0]), second._replace(radii=second.radii * 0 + radii[1])]
        return pair if _apart(stage, plan, *pair) else None
    first = _path(rng, stage, plan.specs[0], radii[0])
    for attempt in range(24):
        second = _path(rng, stage, plan.specs[1], radii[1])
        if _apart(stage, plan, first, second):
            return [first, second]
        if attempt % 4 == 3:
            first = _path(rng, stage, plan.specs[0], radii[0])
    return None


def _collision(rng: np.random.Generator, stage: Stage, plan: Plan) -> list[Path]:
    """The first slides into the second, which rests; equal areas mean equal masses."""
    radii = [draw_radius(rng, spec.size, stage) for spec in plan.specs]
    if stage.contact is not None or plan.specs[0].size == plan.specs[1].size:
        radii[1] = radii[0]
    widths = [OUTLINES[spec.shape].half_width * radius for spec, radius in zip(plan.specs, radii, strict=True)]
    masses = [radius**2 for radius in radii]
    sign = motion.heading(plan.specs[0].direction)[0]
    start = widths[0] + rng.uniform(-2, 2) * stage.unit
    other = rng.uniform(0.54, 0.6) * stage.width
    if sign < 0:
        start, other = stage.width - start, stage.width - other
    gap = sum(widths)
    hit = rng.uniform(0.3, 0.42) * max(stage.frames - 1, 1)
    speed = (other - sign * gap - start) / hit
    xs = motion.collide(stage, start, speed, other, gap, *masses)
    middle = rng.uniform(max(radii), stage.height - max(radii))
    paths = []
    for spec, radius, x in zip(plan.specs, radii, xs[:2], strict=True):
        y = middle if stage.contact is None else stage.contact - OUTLINES[spec.shape].bottom * radius
        paths.append(Path(np.stack([x, np.full_like(x, y)], axis=-1), np.full(stage.frames, radius)))
    return [paths[0]._replace(events=(Event("collision", xs[2], (0, 1)),)), paths[1]]


def _occlusion(rng: np.random.Generator, stage: Stage, plan: Plan, ground: Background) -> tuple[Path, Occluder]:
    """An object slides from one side of a bar, behind it, to the other side."""
    spec = plan.specs[0]
    radius = draw_radius(rng, spec.size, stage)
    width = OUTLINES[spec.shape].half_width * radius
    path = motion.rest(rng, stage, spec.shape, radius)
    ends = width + rng.uniform(0, 2, 2) * stage.unit
    xs = np.linspace(ends[0], stage.width - ends[1], stage.frames)
    path.centers[:, 0] = xs if spec.direction == "right" else xs[::-1]
    bar = 2 * width + rng.uniform(4, 6) * stage.unit
    left = stage.width / 2 - bar / 2 + rng.uniform(-3, 3) * stage.unit
    color = "pale" if ground.wall == "black" else "dark"
    return path._replace(direction=spec.direction), Occluder(left, left + bar, color)


def _overlap(low: np.ndarray, high: np.ndarray, start: float, end: float) -> np.ndarray:
    """Length of [low, high] within [start, end]."""
    return np.maximum(np.minimum(high, end) - np.maximum(low, start), 0)


def _finish(spec: Spec, path: Path, stage: Stage, occluder: Occluder | None, hidden: np.ndarray | float) -> WorldObject:
    """Adds the visible share to what the path says; `hidden` is the share that objects before it cover."""
    outline = OUTLINES[spec.shape]
    x, y, radii = path.centers[:, 0], path.centers[:, 1], path.radii
    left, right = x - outline.half_width * radii, x + outline.half_width * radii
    top, bottom = y - outline.top * radii, y + outline.bottom * radii
    seen = _overlap(left, right, 0, stage.width)
    if occluder is not None:
        behind = _overlap(left, right, max(occluder.left, 0), min(occluder.right, stage.width))
        if occluder.top > -np.inf:
            behind = behind * _overlap(top, bottom, occluder.top, occluder.bottom) / (bottom - top)
        seen = seen - behind
    share = seen / (right - left) * _overlap(top, bottom, 0, stage.height) / (bottom - top) * (1 - hidden)
    return WorldObject(
        spec.shape,
        spec.color,
        spec.size,
        spec.motion,
        spec.direction,
        centers=path.centers.astype(np.float32),
        radii=radii.astype(np.float32),
        visibility=np.clip(share, 0, 1).astype(np.float32),
    )


def _shot(
    rng: np.random.Generator, plan: Plan, frames: int, height: int, width: int, mix: Mix, avoid: str
) -> Shot | None:
    """Gives a plan its places; None when its objects could not be kept apart."""
    unit = min(height, width) / 64
    contact = height - float(rng.uniform(6, 9)) * unit if plan.floor else None
    stage = Stage(frames, height, width, contact)
    ground = _background(rng, plan, stage, mix, avoid)
    places = _places(rng, stage, plan, ground)
    if places is None:
        return None
    paths = places.paths
    events = tuple(
        event if event.kind == "collision" else event._replace(objects=(number,))
        for number, path in enumerate(paths)
        for event in path.events
    )
    hidden: list[np.ndarray | float] = [0.0] * len(paths)
    if places.order:  # two of which one is before the other
        back, front = places.order
        far, near = paths[back], paths[front]
        hidden[back] = covered(
            plan.specs[back].shape,
            far.radii[0],
            plan.specs[front].shape,
            near.radii[0],
            near.centers - far.centers,
        )
    objects = tuple(
        _finish(spec, path, stage, places.occluder, share)
        for spec, path, share in zip(plan.specs, paths, hidden, strict=True)
    )
    return Shot(
        plan.kind,
        objects,
        ground,
        np.zeros(frames, np.float32) if places.pan is None else places.pan,
        places.occluder,
        None if plan.orbit_pair == "around" else paths[0].pivot,
        events,
        places.tilt,
        places.relation,
        places.order,
        gravity=plan.kind != "floating",
        light=pick(rng, LIGHTS) if mix.lit and rng.random() < mix.lit else "",
    )


_MORE_PLANS = relations.PLANS | encounters.PLANS
_MORE_PLACES = relations.PLACES | encounters.PLACES


def _places(rng: np.random.Generator, stage: Stage, plan: Plan, ground: Background) -> Places | None:
    """Where everything of a plan goes; None when its objects could not be kept apart."""
    first = plan.specs[0]
    match plan.kind:
        case "single":
            radius = encounters.radius_of(rng, stage, plan, 0)
            return Places([_path(rng, stage, first, radius)])
        case "pair":
            pair = _pair(rng, stage, plan)
            return None if pair is None else Places(pair)
        case "collision":
            return Places(_collision(rng, stage, plan))
        case "occluder":
            path, occluder = _occlusion(rng, stage, plan, ground)
            return Places([path], occluder=occluder)
        case "pan":  # the object slides across the screen, as the world does
            direction = pick(rng, ("left", "right"))
            path = motion.slide(rng, stage, first.shape, encounters.radius_of(rng, stage, plan, 0), direction)
            pan = (path.centers[0, 0] - path.centers[:, 0]).astype(np.float32)
            return Places([path._replace(direction="")], pan=pan)
        case "wall":
            return encounters.place_wall(rng, stage, plan, ground)
    return _MORE_PLACES[plan.kind](rng, stage, plan)


def _kinds(frames: int, mix: Mix) -> list[str]:
    """The kinds of shot that are possible; of those that came later only what the mix has."""
    known = list(KINDS if frames > 1 else STILL_KINDS[:2])
    return known + [kind for kind in (MORE_KINDS if frames > 1 else STILL_KINDS[2:]) if getattr(mix, kind) > 0]


def _draw_shot(
    rng: np.random.Generator,
    frames: int,
    height: int,
    width: int,
    split: str,
    mix: Mix,
    before: Shot | None,
    character: Spec | None = None,
    tries: int = 10_000,
) -> Shot:
    """One shot; after `before` on another background, and with a `character` who does something new."""
    moving = frames > 1
    kinds = character_kinds(mix, before, moving) if character else _kinds(frames, mix)
    kind = choose(rng, kinds, mix)  # once, so that the mix holds exactly
    avoid = before.background.wall if before else ""
    for _ in range(tries):
        if kind in MORE_KINDS:
            plan = _MORE_PLANS[kind](rng, bool(rng.random() < mix.floor), mix, moving)
        else:
            plan = draw_plan(rng, kind, mix, moving)
        if character is not None:
            plan = played(plan, character)
            if not recognisable(plan) or not differs(plan, before):
                continue
        if not allowed(plan, split):
            continue
        shot = _shot(rng, plan, frames, height, width, mix, avoid)
        if shot is not None:
            return shot
    raise UserError(
        f"no {kind} shot of this mix fits in {frames} frames of {height}x{width} pixels: give more frames, a larger "
        f"size or a mix with {kind}=0"
    )


def _draw_story(
    rng: np.random.Generator, lengths: Sequence[int], height: int, width: int, split: str, mix: Mix
) -> list[Shot]:
    """Shots of one character. What is held out need not be in each of them: few characters have it in all."""
    for _ in range(200):
        character = draw_character(rng, mix)
        made: list[Shot] = []
        for length in lengths:
            before = made[-1] if made else None
            within = "train" if split == "train" else "all"
            try:
                shot = _draw_shot(rng, length, height, width, within, mix, before, character, tries=100)
            except UserError:  # it is held out from all that this kind of shot shows
                break
            made.append(replace(shot, same=before is not None))
        shown = [thing.combination for shot in made for thing in shot.objects]
        if len(made) == len(lengths) and (split != "heldout" or any(map(is_heldout, shown))):
            return made
    raise UserError(f"no character of this mix fits in {height}x{width} pixels: give a larger size or another mix")


def sample_scene(
    seed: int,
    index: int,
    *,
    split: str = "train",
    frames: int = 17,
    height: int = 64,
    width: int = 64,
    mix: Mix | None = None,
    shots: Sequence[int] | None = None,
) -> Scene:
    """Scene `index` of the endless list that `seed` and the settings make; see `sample_scenes`."""
    if split not in SPLITS:
        raise UserError(f'unknown split "{split}"; {nearest(split, SPLITS)}')
    lengths = tuple(shots) if shots else (frames,)
    if min(lengths) < 1 or min(height, width) < 16:
        raise UserError(
            f"a scene of {lengths} frames at {height}x{width} cannot be made: at least 1 frame and 16 pixels"
        )
    rng = np.random.default_rng((_STREAM, seed, index))
    mix = mix or Mix()
    if len(lengths) > 1 and mix.same and rng.random() < mix.same:
        return Scene(seed, index, height, width, tuple(_draw_story(rng, lengths, height, width, split, mix)))
    made: list[Shot] = []
    for length in lengths:
        made.append(_draw_shot(rng, length, height, width, split, mix, made[-1] if made else None))
    return Scene(seed, index, height, width, tuple(made))


def sample_scenes(
    seed: int,
    n: int | Iterable[int],
    *,
    split: str = "train",
    frames: int = 17,
    height: int = 64,
    width: int = 64,
    mix: Mix | None = None,
    shots: Sequence[int] | None = None,
) -> list[Scene]:
    """The first `n` scenes of a seed (or those with the given indices).

    Args:
      seed, n: scene i depends on (seed, i) and the settings below, so any process can make any scene.
      split: "train" has no held-out combination of colour, shape and motion, "heldout" only scenes that have one.
      frames, height, width: any size of at least 1 frame and 16 pixels; one frame is an image.
      mix: how often each thing happens.
      shots: lengths in frames of several shots with hard cuts between them, in place of `frames`.

    Raises:
      UserError: for an unknown split, or a size or mix that no scene fits.
    """
    indices = range(n) if isinstance(n, int) else n
    return [
        sample_scene(seed, i, split=split, frames=frames, height=height, width=width, mix=mix, shots=shots)
        for i in indices
    ]
