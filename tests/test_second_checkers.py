"""The checkers of the second world are measured: nearly all true clips pass, hardly any corrupted one does.

Shares over 300 clips of each kind are in docs/world.md; the samples here are small, and so are allowed one clip more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from sora_jax.data import world
from sora_jax.data.world import Mix, Scene, Shot
from sora_jax.data.world.encounters import folded
from sora_jax.data.world.motion import bounce_height
from sora_jax.data.world.scene import COLORS, GRAVITY, KINDS, OUTLINES, SHAPES
from sora_jax.evaluation.checkers import judge, judge_physics
from sora_jax.evaluation.shots import ShotsVerdict, find_cuts, judge_shots
from sora_jax.evaluation.tracking import track

NONE = dict.fromkeys(KINDS, 0.0)
CLIPS = 24
SPARE = 1  # clips of a small sample that may be judged wrongly: at 1 % one in 24 is wrong in a fifth of samples

Corruption = Callable[[Scene], np.ndarray | None]  # None: nothing to corrupt in this scene


def only(kind: str, **rest: float) -> Mix:
    return Mix(**{**NONE, kind: 1.0, "lit": 0.3, "textured": 0.35, **rest})


def with_shot(scene: Scene, **changes: object) -> np.ndarray:
    return world.render([dataclasses.replace(scene, shots=(dataclasses.replace(scene.shot, **changes),))])[0]


def moved(scene: Scene, paths: list[np.ndarray]) -> np.ndarray:
    objects = [
        dataclasses.replace(thing, centers=path.astype(np.float32))
        for thing, path in zip(scene.objects, paths, strict=True)
    ]
    return with_shot(scene, objects=tuple(objects))


def centers(scene: Scene) -> list[np.ndarray]:
    return [thing.centers.astype(float) for thing in scene.objects]


# ---- corruptions ----


def exchanged(scene: Scene) -> np.ndarray:
    """The first two objects have changed places."""
    first, second, *others = centers(scene)
    feet = [OUTLINES[thing.shape].bottom * thing.radii[0] for thing in scene.objects[:2]]
    down = np.array([0.0, feet[1] - feet[0]]) if scene.background.kind == "floor" else np.zeros(2)
    return moved(scene, [second + down, first - down, *others])


def mirrored(scene: Scene) -> np.ndarray | None:
    if scene.shot.relation is None or scene.shot.relation.name not in ("left of", "right of"):
        return None
    return world.render([scene])[0][:, :, ::-1].copy()


def swapped_depth(scene: Scene) -> np.ndarray:
    return with_shot(scene, order=scene.shot.order[::-1])


def apart(scene: Scene) -> np.ndarray:
    """The one in front has been pushed aside."""
    paths = centers(scene)
    front = scene.shot.order[-1]
    paths[front][:, 1] -= sum(float(thing.radii[0]) for thing in scene.objects) * 1.5
    return moved(scene, paths)


def _after(scene: Scene, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Other speeds after the hit, as a function of those before it."""
    hit = int(np.ceil(scene.events[0].time))
    paths = centers(scene)
    speeds = change(*(path[1] - path[0] for path in paths))
    steps = np.arange(1, scene.frames - hit + 1)[:, None]
    for path, speed in zip(paths, speeds, strict=True):
        path[hit:] = path[hit - 1] + steps * speed
    return moved(scene, paths)


def through(scene: Scene) -> np.ndarray:
    return _after(scene, lambda first, second: (first, second))


def stuck_together(scene: Scene) -> np.ndarray:
    m1, m2 = (float(thing.radii[0]) ** 2 for thing in scene.objects)
    return _after(scene, lambda first, second: ((m1 * first + m2 * second) / (m1 + m2),) * 2)


def faster(scene: Scene) -> np.ndarray:
    """They part twice as fast as they met."""
    m1, m2 = (float(thing.radii[0]) ** 2 for thing in scene.objects)

    def change(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        middle = (m1 * first + m2 * second) / (m1 + m2)
        return middle - 2 * (first - middle), middle - 2 * (second - middle)

    return _after(scene, change)


def without_wall(scene: Scene) -> np.ndarray:
    return with_shot(scene, occluder=None)


def _behind(scene: Scene, other: np.ndarray) -> np.ndarray:
    """The clip, from when the last one was hidden on, is another."""
    hidden = [int(np.flatnonzero(thing.visibility < 0.05)[0]) for thing in scene.objects]
    clip = world.render([scene])[0]
    return np.concatenate([clip[: max(hidden)], other[max(hidden) :]])


def recolored_behind(scene: Scene) -> np.ndarray:
    objects = [dataclasses.replace(thing, color=other_color(scene.shot)) for thing in scene.objects[-1:]]
    return _behind(scene, with_shot(scene, objects=(*scene.objects[:-1], *objects)))


def lost_behind(scene: Scene) -> np.ndarray:
    return _behind(scene, with_shot(scene, objects=scene.objects[:-1]))


def turned_back(scene: Scene) -> np.ndarray:
    paths = centers(scene)
    for path, thing in zip(paths, scene.objects, strict=True):
        turn = int(np.flatnonzero(thing.visibility < 0.05).mean())
        back = path[: turn + 1][::-1]
        path[turn : turn + len(back)] = back[: len(path) - turn]
    return moved(scene, paths)


def gravity_on(scene: Scene) -> np.ndarray:
    """What floated is dropped from where it was, and bounces."""
    paths = centers(scene)
    times = np.arange(scene.frames, dtype=float)
    for path, thing in zip(paths, scene.objects, strict=True):
        bottom = scene.background.contact if scene.background.kind == "floor" else scene.height
        floor = bottom - OUTLINES[thing.shape].bottom * float(thing.radii[0])
        start = max(floor - path[0, 1], 12.0 * scene.unit)
        path[:, 1] = floor - bounce_height(times, start, GRAVITY * scene.unit, 0.8)[0]
    return moved(scene, paths)


def gravity_off(scene: Scene) -> np.ndarray:
    """What bounced flies evenly between the ceiling and the floor."""
    paths = centers(scene)
    times = np.arange(scene.frames, dtype=float)
    for path in paths:
        low, high = path[:, 1].min(), path[:, 1].max()
        path[:, 1] = folded(float(path[0, 1]), 2.6 * scene.unit, low, high, times)[0]
    return moved(scene, paths)


def stuck_to_wall(scene: Scene) -> np.ndarray:
    paths = centers(scene)
    for number, path in enumerate(paths):
        times = [event.time for event in scene.events if number in event.objects]
        hit = int(np.ceil(min(times))) if times else scene.frames
        path[hit:] = path[hit - 1]
    return moved(scene, paths)


def camera_fixed(scene: Scene) -> np.ndarray:
    return with_shot(scene, pan=np.zeros(scene.frames, np.float32), tilt=None)


def backwards(scene: Scene) -> np.ndarray:
    return world.render([scene])[0][::-1].copy()


def objects_fixed(scene: Scene) -> np.ndarray:
    return moved(scene, [np.repeat(path[:1], len(path), 0) for path in centers(scene)])


def other_color(shot: Shot) -> str:
    taken = {thing.color for thing in shot.objects} | {shot.background.wall, shot.background.floor}
    return next(name for name in COLORS if name not in taken)


# ---- kinds of clip, what is asked of each, and what must not pass ----

CASES: dict[str, tuple[Mix, str, list[Corruption]]] = {
    "relation": (only("relation"), "relation", [exchanged, mirrored]),
    "depth": (only("depth"), "relation", [swapped_depth, apart]),
    "passing": (only("passing"), "relation", [swapped_depth]),
    "meeting": (only("meeting"), "motion", [through, stuck_together]),
    "momentum": (only("meeting"), "physics.momentum", [through, stuck_together, faster]),
    "wall": (only("wall"), "motion", [without_wall, lost_behind, recolored_behind, turned_back]),
    "permanence": (only("wall"), "physics.permanence", [without_wall, lost_behind, recolored_behind, turned_back]),
    "floating": (only("floating"), "motion", [gravity_on, stuck_to_wall]),
    "weightlessness": (only("floating"), "physics.weightlessness", [gravity_on, stuck_to_wall]),
    "gravity": (Mix(**{**NONE, "trio": 1.0, "rest": 0, "slide": 0, "fall": 0}), "physics.gravity", [gravity_off]),
    "camera": (only("travel"), "motion", [camera_fixed, backwards, objects_fixed]),
}


def answers(name: str, clip: np.ndarray, scene: Scene) -> bool:
    truth = world.truth_of(scene.shot)
    if name.startswith("physics."):
        return judge_physics(clip, truth)[name.removeprefix("physics.")]
    return getattr(judge(clip, truth), name)


def rates(case: str, n: int, seed: int = 201, frames: int = 17, height: int = 64, width: int = 64) -> dict[str, float]:
    """The share of true clips that pass, and of clips corrupted in each way."""
    mix, name, corruptions = CASES[case]
    scenes = world.sample_scenes(seed, n, split="all", mix=mix, frames=frames, height=height, width=width)
    found = {"true": float(np.mean([answers(name, world.render([scene])[0], scene) for scene in scenes]))}
    for corrupt in corruptions:
        clips = [(corrupt(scene), scene) for scene in scenes]
        found[corrupt.__name__] = float(np.mean([answers(name, c, s) for c, s in clips if c is not None]))
    return found


def assert_tells_apart(found: dict[str, float]) -> None:
    assert found.pop("true") >= 1 - SPARE / CLIPS
    assert max(found.values()) <= 2 * SPARE / CLIPS, found


@pytest.mark.parametrize("case", CASES)
def test_true_clips_pass_and_corrupted_ones_do_not(case: str):
    assert_tells_apart(rates(case, CLIPS))


def test_bounces_too_low_to_follow_are_no_breach_of_gravity():
    """In a long clip they go on until they hit the floor in every frame."""
    assert_tells_apart(rates("gravity", 8, frames=49))


# ---- shots ----


def stories(n: int, seed: int = 202, same: float = 1.0, height: int = 64, width: int = 64) -> list[Scene]:
    mix = Mix(floating=0.2, travel=0.2, lit=0.2, textured=0.3, same=same)
    return world.sample_scenes(seed, n, split="all", mix=mix, shots=(9, 9), height=height, width=width)


def shown(scene: Scene, **second: object) -> np.ndarray:
    """The scene with its second shot's first object changed."""
    first, then = scene.shots
    thing = dataclasses.replace(then.objects[0], **second)
    shot = dataclasses.replace(then, objects=(thing, *then.objects[1:]))
    return world.render([dataclasses.replace(scene, shots=(first, shot))])[0]


def verdict(clip: np.ndarray, scene: Scene) -> ShotsVerdict:
    return judge_shots(clip, (9, 9), [world.truth_of(shot) for shot in scene.shots], same=True)


def no_cut(scene: Scene) -> np.ndarray:
    clip = world.render([scene])[0]
    return np.concatenate([clip[:9], clip[8:9].repeat(9, 0)])


def late_cut(scene: Scene) -> np.ndarray:
    clip = world.render([scene])[0]
    return np.concatenate([clip[:9], clip[8:9].repeat(3, 0), clip[12:]])


def other_order(scene: Scene) -> np.ndarray:
    clip = world.render([scene])[0]
    return np.concatenate([clip[9:], clip[:9]])


def recolored(scene: Scene) -> np.ndarray:
    return shown(scene, color=other_color(scene.shots[1]))


def reshaped(scene: Scene) -> np.ndarray:
    thing = scene.shots[1].objects[0]
    return shown(scene, shape=SHAPES[(SHAPES.index(thing.shape) + 1 + scene.index % 3) % 4])


def resized(scene: Scene) -> np.ndarray:
    return shown(scene, radii=scene.shots[1].objects[0].radii * np.float32(1.35))


SHOT_CASES: dict[str, tuple[Callable[[ShotsVerdict], bool], list[Corruption]]] = {
    "cuts": (lambda found: found.cuts, [no_cut, late_cut]),
    "order": (lambda found: all(shot.all for shot in found.shots), [other_order]),
    "same": (lambda found: found.same is True, [recolored, reshaped, resized]),
}


def shot_rates(case: str, n: int, height: int = 64, width: int = 64) -> dict[str, float]:
    ask, corruptions = SHOT_CASES[case]
    scenes = stories(n, height=height, width=width)
    found = {"true": float(np.mean([ask(verdict(world.render([scene])[0], scene)) for scene in scenes]))}
    for corrupt in corruptions:
        found[corrupt.__name__] = float(np.mean([ask(verdict(corrupt(scene), scene)) for scene in scenes]))
    return found


@pytest.mark.parametrize("case", SHOT_CASES)
def test_cuts_order_and_character(case: str):
    assert_tells_apart(shot_rates(case, CLIPS))


def test_no_uncut_clip_of_the_world_has_a_cut():
    mix = Mix(trio=0.2, passing=0.2, meeting=0.2, wall=0.2, floating=0.2, travel=0.4, lit=0.3, textured=0.5)
    for clip in world.render(world.sample_scenes(203, 80, mix=mix)):
        assert find_cuts(clip) == []


def test_shots_must_fill_the_clip():
    scene = stories(1)[0]
    with pytest.raises(ValueError, match="18 frames are not shots of"):
        judge_shots(world.render([scene])[0], (9, 8), [world.truth_of(shot) for shot in scene.shots], same=False)


def test_any_clip_gets_a_verdict():
    """Clips that show something else, or nothing, are judged against every kind without a mistake of ours."""
    truths = [world.truth_of(world.sample_scenes(204, 1, mix=mix)[0].shot) for mix, _, _ in CASES.values()]
    noise = np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), np.uint8)
    for clip in (noise, np.full_like(noise, 128), world.render(world.sample_scenes(204, 1))[0]):
        seen = track(clip)
        for truth in truths:
            found = judge(clip, truth, seen)
            assert isinstance(found.all, bool)
            assert not found.all
            assert set(map(type, judge_physics(clip, truth, seen).values())) <= {bool}
