"""The checkers are measured: nearly all true clips pass, hardly any corrupted one does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from sora_jax.data import world
from sora_jax.data.world import Mix, Scene, Truth
from sora_jax.data.world.scene import COLORS, MOTIONS, SHAPES
from sora_jax.errors import UserError
from sora_jax.evaluation.checkers import judge, judge_physics
from sora_jax.evaluation.intervals import wilson_interval
from sora_jax.evaluation.suite import evaluate
from sora_jax.evaluation.tracking import track

NONE = dict.fromkeys(("single", "pair", "collision", "occluder", "pan"), 0.0)
STILL = dict.fromkeys(MOTIONS, 0.0)
PASS, FAIL = 0.99, 0.05  # what the share of true clips must reach, and what that of corrupted ones may

Corruption = Callable[[Scene], np.ndarray]


def only(kind: str, *motions: str, **rest: float) -> Mix:
    chosen = {**STILL, **dict.fromkeys(motions, 1.0)} if motions else {}
    return Mix(**{**NONE, kind: 1.0, **chosen, **rest})


# ---- corruptions: each makes from a true scene the frames of a clip that breaks one law ----


def redrawn(scene: Scene, **changes: Callable[[world.WorldObject, int], object]) -> np.ndarray:
    """The scene with fields of its objects replaced by functions of (object, number)."""
    objects = tuple(
        dataclasses.replace(thing, **{name: make(thing, number) for name, make in changes.items()})
        for number, thing in enumerate(scene.objects)
    )
    return world.render([dataclasses.replace(scene, shots=(dataclasses.replace(scene.shot, objects=objects),))])[0]


def moved(scene: Scene, path: Callable[[world.WorldObject, int], np.ndarray]) -> np.ndarray:
    return redrawn(scene, centers=lambda thing, number: path(thing, number).astype(np.float32))


def spliced(first: np.ndarray, second: np.ndarray, at: int) -> np.ndarray:
    return np.concatenate([first[:at], second[at:]])


def true(scene: Scene) -> np.ndarray:
    return world.render([scene])[0]


def reversed_(scene: Scene) -> np.ndarray:
    return true(scene)[::-1].copy()


def frozen(scene: Scene) -> np.ndarray:
    return np.repeat(true(scene)[:1], scene.frames, axis=0)


def other_color(thing: world.WorldObject, scene: Scene) -> str:
    taken = {one.color for one in scene.objects} | {scene.background.wall, scene.background.floor}
    return next(name for name in (*list(COLORS)[scene.index % 8 :], *COLORS) if name not in taken)


def recolored(scene: Scene) -> np.ndarray:
    return redrawn(scene, color=lambda thing, _: other_color(thing, scene))


def recolored_midway(scene: Scene) -> np.ndarray:
    return spliced(true(scene), recolored(scene), scene.frames // 2)


def reshaped(scene: Scene) -> np.ndarray:
    return redrawn(scene, shape=lambda thing, _: SHAPES[(SHAPES.index(thing.shape) + 1 + scene.index % 3) % 4])


def without_first(scene: Scene) -> np.ndarray:
    away = np.float32(1000)
    return redrawn(scene, centers=lambda thing, number: thing.centers - (away if number == 0 else 0))


def vanished(scene: Scene) -> np.ndarray:
    return spliced(true(scene), without_first(scene), scene.frames // 2)


def with_another(scene: Scene) -> np.ndarray:
    """One more object of the first one's kind, as far from all others as there is room."""
    ys, xs = np.mgrid[10:55:5, 10:55:5]
    spots = np.stack([xs, ys], -1).reshape(-1, 1, 1, 2)
    paths = np.stack([thing.centers for thing in scene.objects])
    spot = spots[np.linalg.norm(spots - paths, axis=-1).min((1, 2)).argmax(), 0]
    extra = dataclasses.replace(
        scene.objects[0],
        centers=np.tile(spot.astype(np.float32), (scene.frames, 1)),
        radii=np.full(scene.frames, 6, np.float32),
    )
    shot = dataclasses.replace(scene.shot, objects=(*scene.objects, extra))
    return world.render([dataclasses.replace(scene, shots=(shot,))])[0]


def _teleported(thing: world.WorldObject, number: int) -> np.ndarray:
    """Half way through the clip it is suddenly 20 pixels away, towards where there is room."""
    centers = thing.centers.copy()
    half = len(centers) // 2
    if number == 0:
        centers[half:] += np.where(centers[half:].mean(0) > 32, -20, 20)
    return centers


def teleported(scene: Scene) -> np.ndarray:
    return moved(scene, _teleported)


def upside_down(scene: Scene) -> np.ndarray:
    def path(thing: world.WorldObject, number: int) -> np.ndarray:
        x, y = thing.centers.T
        return np.stack([x, y.max() + y.min() - y], -1)

    return moved(scene, path)


def slowed(scene: Scene) -> np.ndarray:
    """Everything happens at two thirds of its speed: gravity is 4/9 of what it should be."""

    def path(thing: world.WorldObject, number: int) -> np.ndarray:
        times = np.arange(scene.frames) / 1.5
        return np.stack([np.interp(times, np.arange(scene.frames), axis) for axis in thing.centers.T], -1)

    return moved(scene, path)


def first_hit(scene: Scene, number: int) -> int:
    """The first frame after the first hit of an object."""
    return int(np.ceil(next(event.time for event in scene.events if number in event.objects)))


def stuck(scene: Scene) -> np.ndarray:
    """It stays on the floor where it first hits it."""

    def path(thing: world.WorldObject, number: int) -> np.ndarray:
        centers = thing.centers.copy()
        if thing.motion == "bounce":
            centers[first_hit(scene, number) :, 1] = centers[:, 1].max()
        return centers

    return moved(scene, path)


def sunk(scene: Scene) -> np.ndarray:
    """It goes on downwards through the floor."""

    def path(thing: world.WorldObject, number: int) -> np.ndarray:
        centers = thing.centers.copy()
        if thing.motion == "bounce":
            hit = first_hit(scene, number)
            centers[hit:, 1] = centers[hit - 1, 1] + 12 * np.arange(1, len(centers) - hit + 1)
        return centers

    return moved(scene, path)


def swerved(scene: Scene) -> np.ndarray:
    """Its sideways motion changes at the first hit."""

    def path(thing: world.WorldObject, number: int) -> np.ndarray:
        centers = thing.centers.copy()
        if thing.motion == "bounce":
            hit = first_hit(scene, number)
            way = -1 if centers[hit, 0] > 32 else 1
            centers[hit:, 0] += way * 1.8 * np.arange(1, len(centers) - hit + 1)
        return centers

    return moved(scene, path)


def hidden_frames(scene: Scene) -> np.ndarray:
    return np.flatnonzero(scene.objects[0].visibility < 0.05)


def lost_behind(scene: Scene) -> np.ndarray:
    return spliced(true(scene), without_first(scene), int(hidden_frames(scene)[0]))


def recolored_behind(scene: Scene) -> np.ndarray:
    return spliced(true(scene), recolored(scene), int(hidden_frames(scene)[0]))


def reshaped_behind(scene: Scene) -> np.ndarray:
    return spliced(true(scene), reshaped(scene), int(hidden_frames(scene)[0]))


def turned_back(scene: Scene) -> np.ndarray:
    def path(thing: world.WorldObject, number: int) -> np.ndarray:
        centers, turn = thing.centers.copy(), int(hidden_frames(scene).mean())
        back = centers[: turn + 1][::-1]
        centers[turn : turn + len(back)] = back[: len(centers) - turn]
        return centers

    return moved(scene, path)


def held_behind(scene: Scene) -> np.ndarray:
    """It comes out three frames late."""

    def path(thing: world.WorldObject, number: int) -> np.ndarray:
        centers, turn = thing.centers.copy(), int(hidden_frames(scene).mean())
        centers[turn + 3 :] = thing.centers[turn:-3]
        centers[turn : turn + 3] = thing.centers[turn]
        return centers

    return moved(scene, path)


def popped(scene: Scene) -> np.ndarray:
    """It comes into being, or ceases to be, well inside the frame."""
    thing, picture, empty = scene.objects[0], true(scene), without_first(scene)
    inside = np.flatnonzero(thing.visibility == 1)
    if thing.motion == "exit":
        return spliced(picture, empty, int(inside[-1]))
    return spliced(empty, picture, int(inside[1]))


def knocked(scene: Scene, how: str) -> np.ndarray:
    """A collision gone wrong; `hit` is the frame after contact."""
    hit = first_hit(scene, 1)
    first, second = (thing.centers.copy() for thing in scene.objects)
    speed = first[1] - first[0]
    steps = np.arange(1, scene.frames - hit + 1)[:, None]
    if how == "through":
        first[hit:], second[:] = first[hit - 1] + speed * steps, second[0]
    elif how == "early":
        second[:-4] = second[4:]
    elif how == "both rebound":
        first[hit:], second[:] = first[hit - 1] - speed * steps, second[0]
    elif how == "from nothing":
        first[hit:], second[hit:] = first[hit - 1] + 0.9 * speed * steps, second[0] + 1.6 * speed * steps
    return moved(scene, lambda _, number: (first, second)[number])


def through(scene: Scene) -> np.ndarray:
    return knocked(scene, "through")


def early(scene: Scene) -> np.ndarray:
    return knocked(scene, "early")


def both_rebound(scene: Scene) -> np.ndarray:
    return knocked(scene, "both rebound")


def from_nothing(scene: Scene) -> np.ndarray:
    return knocked(scene, "from nothing")


def ground_fixed(scene: Scene) -> np.ndarray:
    shot = dataclasses.replace(scene.shot, pan=np.zeros_like(scene.shot.pan))
    return world.render([dataclasses.replace(scene, shots=(shot,))])[0]


def generated(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blurred by a binomial filter and noisy: PSNR of 24 to 28 dB, worse than a decoder's."""
    video = frames.astype(np.float32)
    for axis in (1, 2):
        edged = np.concatenate([video.take([0], axis), video, video.take([-1], axis)], axis)
        n = edged.shape[axis]
        before, here, after = (edged.take(np.arange(k, n - 2 + k), axis) for k in range(3))
        video = (before + 2 * here + after) / 4
    return np.clip(video + rng.normal(0, 9, video.shape) + 0.5, 0, 255).astype(np.uint8)


# ---- the verdict ----


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return world.sample_scenes(101, 300, split="all")


def passing(clips: Sequence[np.ndarray], scenes: Sequence[Scene], *names: str) -> dict[str, float]:
    """The share of clips of which the verdict holds, per attribute."""
    verdicts = [judge(clip, world.truth_of(scene.shot)) for clip, scene in zip(clips, scenes, strict=True)]
    return {name: float(np.mean([getattr(verdict, name) is not False for verdict in verdicts])) for name in names}


ATTRIBUTES = ("color", "shape", "count", "motion", "all", "background", "size")


def test_true_clips_are_judged_right(scenes: list[Scene]):
    for name, share in passing(world.render(scenes), scenes, *ATTRIBUTES).items():
        assert share >= PASS, name


def test_blur_and_noise_do_not_matter(scenes: list[Scene]):
    rng = np.random.default_rng(0)
    clips = [generated(clip, rng) for clip in world.render(scenes)]
    for name, share in passing(clips, scenes, *ATTRIBUTES).items():
        assert share >= 0.97, name


@pytest.mark.parametrize(
    ("name", "corrupt"),
    [
        ("color", recolored),
        ("color", recolored_midway),
        ("shape", reshaped),
        ("count", with_another),
        ("count", without_first),
    ],
)
def test_wrong_attributes_are_seen(name: str, corrupt: Corruption, scenes: list[Scene]):
    chosen = scenes[:100]
    assert passing([corrupt(scene) for scene in chosen], chosen, name)[name] <= FAIL


@pytest.mark.parametrize("corrupt", [reversed_, frozen, vanished, teleported, recolored_midway])
def test_corrupted_clips_are_rejected(corrupt: Corruption, scenes: list[Scene]):
    chosen = [scene for scene in scenes if makes_a_difference(scene, corrupt)][:100]
    assert passing([corrupt(scene) for scene in chosen], chosen, "all")["all"] <= FAIL


def makes_a_difference(scene: Scene, corrupt: Corruption) -> bool:
    """Rest looks the same backwards and frozen; what is hidden or has left cannot be seen to go."""
    moving = scene.shot.kind == "pan" or any(thing.motion != "rest" for thing in scene.objects)
    if corrupt in (reversed_, frozen):
        return moving
    if corrupt in (vanished, teleported):
        return bool((scene.objects[0].visibility[6:12] > 0.5).all())
    return True


def test_no_motion_passes_for_another():
    chosen = world.sample_scenes(102, 120, split="all", mix=only("single", *MOTIONS))
    for scene, clip in zip(chosen, world.render(chosen), strict=True):
        seen, thing = track(clip), scene.objects[0]
        for motion in MOTIONS:
            truth = world.truth_of(scene.shot)
            asked = dataclasses.replace(truth.objects[0], motion=motion, direction="")
            right = motion == thing.motion or (motion == "slide" and thing.motion in ("enter", "exit"))
            assert judge(clip, dataclasses.replace(truth, objects=(asked,)), seen).motion == right, (thing, motion)


def test_pans_need_a_moving_ground():
    chosen = world.sample_scenes(103, 60, split="all", mix=only("pan"))
    assert passing([true(scene) for scene in chosen], chosen, "motion")["motion"] >= PASS
    assert passing([ground_fixed(scene) for scene in chosen], chosen, "motion")["motion"] <= FAIL


def test_what_was_not_said_is_not_asked():
    scene = world.sample_scenes(104, 1)[0]
    truth = world.truth_of(scene.shot)
    verdict = judge(
        true(scene),
        Truth(tuple(dataclasses.replace(one, size="") for one in truth.objects), truth.kind, truth.pan),
    )
    assert verdict.background is None
    assert verdict.size is None
    assert verdict.all


def test_an_empty_clip_shows_nothing():
    truth = world.truth_of(world.sample_scenes(105, 1)[0].shot)
    for clip in (
        np.full((17, 64, 64, 3), 128, np.uint8),
        np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), np.uint8),
    ):
        verdict = judge(clip, truth)
        assert not any((verdict.color, verdict.shape, verdict.motion))
        assert not any(judge_physics(clip, truth).values())


def test_any_clip_gets_a_verdict_against_any_prompt():
    chosen = [scene for kind in NONE for scene in world.sample_scenes(107, 8, split="all", mix=only(kind))]
    truths = [world.truth_of(scene.shot) for scene in chosen]
    rng = np.random.default_rng(0)
    clips = world.render(chosen)
    for k, clip in enumerate(clips):
        mixed = generated(np.maximum(clip, clips[(k + 7) % len(clips)]), rng)
        for odd in (mixed, np.roll(clip, 21, axis=2), clip[::2], clip[:1]):
            seen = track(odd)
            for n in rng.integers(len(truths), size=3):
                verdict = judge(odd, truths[n], seen)
                laws = judge_physics(odd, truths[n], seen)
                assert {type(answer) for answer in (verdict.all, *laws.values())} == {bool}


# ---- the laws ----

LAW_CASES: dict[str, tuple[Mix, list[Corruption]]] = {
    "gravity": (only("single", "bounce", "fall"), [reversed_, upside_down, slowed, teleported, vanished]),
    "restitution": (only("single", "bounce"), [reversed_, stuck, vanished]),
    "reflection": (only("single", "bounce"), [swerved, stuck, sunk, vanished, teleported]),
    "color_constancy": (Mix(), [recolored_midway]),
    "continuity": (only("single", *(m for m in MOTIONS if m not in ("enter", "exit"))), [vanished, teleported]),
    "permanence": (only("occluder"), [lost_behind, recolored_behind, reshaped_behind, turned_back, held_behind]),
    "crossing": (only("single", "enter", "exit"), [reversed_, popped, teleported]),
    "momentum": (only("collision"), [reversed_, through, early, both_rebound, from_nothing]),
}


@pytest.mark.parametrize("law", LAW_CASES)
def test_laws(law: str):
    mix, corruptions = LAW_CASES[law]
    chosen = world.sample_scenes(106, 110, split="all", mix=mix)
    truths = [world.truth_of(scene.shot) for scene in chosen]
    clips = list(world.render(chosen))
    rng = np.random.default_rng(0)

    def share(clips: Sequence[np.ndarray], truths: Sequence[Truth]) -> float:
        return float(np.mean([judge_physics(clip, truth)[law] for clip, truth in zip(clips, truths, strict=True)]))

    assert share(clips, truths) >= PASS
    assert share([generated(clip, rng) for clip in clips[:50]], truths[:50]) >= 0.97
    for corrupt in corruptions:
        assert share([corrupt(scene) for scene in chosen[:50]], truths[:50]) <= FAIL, corrupt.__name__


# ---- the suite ----


def test_wilson_intervals():
    # Newcombe 1998, table I: 81 of 263, and the edges
    low, high = wilson_interval(81, 263)
    assert (low, high) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)


def painter(n: int, seed: int, change: Corruption | None = None) -> Callable[[list[str], list[int]], np.ndarray]:
    """A perfect model of the suite's prompts (or a corrupted one): it knows which scenes they were taken from."""
    scenes = world.sample_scenes(seed, n, split="heldout")

    def sample(prompts: list[str], seeds: list[int]) -> np.ndarray:
        chosen = [scenes[s - seed] for s in seeds]
        return np.stack([(change or true)(scene) for scene in chosen])

    return sample


def test_the_suite_knows_right_from_wrong():
    calls = []
    report = evaluate(painter(50, 7), n=50, seed=7, batch_size=16, progress=lambda done, n: calls.append((done, n)))
    assert calls == [(16, 50), (32, 50), (48, 50), (50, 50)]
    assert (report["suite"], report["n"]) == ("world", 50)
    for name in ATTRIBUTES:
        metric = report["metrics"][name]
        assert metric["value"] >= 0.98
        assert metric["low"] <= metric["value"] <= metric["high"]
    assert all(metric["value"] >= 0.95 for metric in report["metrics"].values())

    wrong = evaluate(painter(30, 7, reshaped), n=30, seed=7)["metrics"]
    assert wrong["shape"]["value"] <= 0.1
    assert wrong["all"]["value"] <= 0.1
    assert wrong["color"]["value"] >= 0.95
    faded = evaluate(painter(30, 7, recolored), n=30, seed=7)["metrics"]
    assert faded["color"]["value"] <= 0.1


def test_the_suite_refuses_what_it_cannot_do():
    with pytest.raises(UserError, match="at least one prompt"):
        evaluate(painter(1, 0), n=0)
    with pytest.raises(ValueError, match="sample_fn gave"):
        evaluate(lambda prompts, seeds: np.zeros((17, 64, 64, 3), np.uint8), n=2)
