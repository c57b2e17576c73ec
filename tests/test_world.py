"""The procedural world: what is drawn is what is said, to the pixel."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest

from sora_jax.data import world
from sora_jax.data.world import Mix
from sora_jax.data.world.motion import Stage, bounce_height, collide
from sora_jax.data.world.scene import COLORS, DIRECTIONS, GRAVITY, GROUNDS, MOTIONS, SHAPES
from sora_jax.errors import UserError

NONE = dict.fromkeys(("single", "pair", "collision", "occluder", "pan"), 0.0)
STILL = dict.fromkeys(MOTIONS, 0.0)


def only(kind: str, *motions: str, **rest: float) -> Mix:
    chosen = {**STILL, **dict.fromkeys(motions, 1.0)} if motions else {}
    return Mix(**{**NONE, kind: 1.0, **chosen, **rest})


def test_a_scene_depends_on_its_seed_and_number_alone():
    many = world.sample_scenes(3, 40)
    clips = world.render(many)
    picked = world.sample_scenes(3, [33, 7])
    np.testing.assert_array_equal(world.render(picked), clips[[33, 7]])
    np.testing.assert_array_equal(world.render([many[12]])[0], clips[12])
    assert (world.render(world.sample_scenes(4, 40)) != clips).any((1, 2, 3, 4)).all()


@pytest.mark.parametrize(("frames", "height", "width"), [(17, 64, 96), (9, 96, 64), (1, 64, 64), (5, 128, 128)])
def test_sizes(frames: int, height: int, width: int):
    clips = world.render(world.sample_scenes(0, 20, frames=frames, height=height, width=width))
    assert clips.shape == (20, frames, height, width, 3)
    assert clips.dtype == np.uint8


@pytest.mark.parametrize(
    ("shape", "area"),  # closed forms for radius r: r^2 times pi, pi, 3 sqrt(3) / 4 R^2, and ten triangles of a star
    [
        ("ball", np.pi),
        ("square", np.pi),
        ("triangle", 3 * np.sqrt(3) / 4 * 1.4**2),
        ("star", 10 * 0.5 * 1.35 * 0.675 * np.sin(np.pi / 5)),
    ],
)
def test_shapes_have_their_area_and_place(shape: str, area: float):
    # Large, so that counting pixels measures an area to a few per cent
    mix = only("single", "slide", floor=0, gradient=0, striped=0)
    scenes = world.sample_scenes(5, 60, split="all", mix=mix, frames=2, height=256, width=256)
    scenes = [scene for scene in scenes if scene.objects[0].shape == shape][:8]
    assert len(scenes) == 8
    ys, xs = np.mgrid[:256, :256] + 0.5
    for scene, clip in zip(scenes, world.render(scenes), strict=True):
        thing = scene.objects[0]
        gone = dataclasses.replace(thing, centers=thing.centers - np.float32(1000))
        empty = world.render([dataclasses.replace(scene, shots=(dataclasses.replace(scene.shot, objects=(gone,)),))])
        changed = np.abs(clip.astype(float) - empty[0]).sum(-1)
        inside = changed > 0.4 * np.median(changed[changed > 30])
        for t in np.flatnonzero(thing.visibility == 1):
            assert inside[t].sum() == pytest.approx(area * thing.radii[t] ** 2, rel=0.05)
            assert xs[inside[t]].mean() == pytest.approx(thing.centers[t, 0], abs=0.5)
            assert ys[inside[t]].mean() == pytest.approx(thing.centers[t, 1], abs=0.5)


def test_colors_are_where_the_truth_says():
    scenes = world.sample_scenes(6, 60, mix=only("single", "slide", "rest", "orbit"))
    for scene, clip in zip(scenes, world.render(scenes), strict=True):
        thing, ground = scene.objects[0], scene.background
        x, y = thing.centers[0]
        center = clip[0, round(float(y) - 0.5), round(float(x) - 0.5)].astype(float)
        nearest = min(
            COLORS, key=lambda name: np.abs(center / center.max() - np.array(COLORS[name]) / max(COLORS[name])).sum()
        )
        assert nearest == thing.color
        if not ground.striped and ground.kind != "gradient":
            corner = np.median(clip[:, 0].reshape(-1, 3), axis=0)
            assert min(GROUNDS, key=lambda name: np.abs(corner - GROUNDS[name]).sum()) == ground.wall
        if ground.kind == "floor":
            low = np.median(clip[:, -1].reshape(-1, 3), axis=0)
            assert min(GROUNDS, key=lambda name: np.abs(low - GROUNDS[name]).sum()) == ground.floor


def test_bounce_agrees_with_integration():
    start, gravity, restitution, step = 30.0, 2.4, 0.8, 1e-4
    times = np.arange(17.0)
    heights, hits = bounce_height(times, start, gravity, restitution)
    height, speed, seen, struck = start, 0.0, [], []
    for n in range(round(16 / step) + 1):
        if n % round(1 / step) == 0:
            seen.append(height)
        speed -= gravity * step
        height += speed * step
        if height < 0 and speed < 0:
            height, speed = -height * restitution, -speed * restitution
            struck.append(n * step)
    np.testing.assert_allclose(heights, seen, atol=0.02)
    np.testing.assert_allclose(hits, struck, atol=0.005)


def test_collisions_keep_momentum_and_energy():
    stage = Stage(17, 64, 64, None)
    for mass, other_mass in ((1.0, 1.0), (2.0, 1.0), (1.0, 2.5)):
        first, second, hit = collide(stage, 8.0, 3.0, 36.0, 13.0, mass, other_mass)
        v1, v2 = np.diff(first)[-1], np.diff(second)[-1]
        assert mass * v1 + other_mass * v2 == pytest.approx(mass * 3.0)
        assert mass * v1**2 + other_mass * v2**2 == pytest.approx(mass * 9.0)
        assert 8.0 + 3.0 * hit == pytest.approx(36.0 - 13.0)
        assert (second[: int(hit) + 1] == 36.0).all()


def test_bounces_in_scenes_obey_gravity_and_report_their_hits():
    for scene in world.sample_scenes(7, 60, mix=only("single", "bounce")):
        y = scene.objects[0].centers[:, 1].astype(float)
        hits = np.array([event.time for event in scene.events])
        assert len(hits) >= 1
        for t in range(1, 16):
            if not ((hits > t - 1) & (hits < t + 1)).any():
                assert y[t + 1] - 2 * y[t] + y[t - 1] == pytest.approx(GRAVITY, abs=1e-3)
        assert y.max() <= y[0] + 64
        assert y[0] < y[int(hits[0])]


def test_occluded_objects_go_on():
    scenes = world.sample_scenes(8, 30, mix=only("occluder"))
    for scene, clip in zip(scenes, world.render(scenes), strict=True):
        thing = scene.objects[0]
        assert thing.visibility[0] > 0.8
        assert thing.visibility[-1] > 0.8
        assert thing.visibility.min() == 0
        np.testing.assert_allclose(np.diff(thing.centers, n=2, axis=0), 0, atol=1e-4)
        hidden = clip[int(thing.visibility.argmin())].astype(float)
        chroma = hidden - hidden.mean(-1, keepdims=True)
        assert np.abs(chroma).max() < 60  # no saturated pixel is left


def test_pans_move_the_ground_as_far_as_the_object():
    scenes = world.sample_scenes(9, 20, mix=only("pan"))
    for scene, clip in zip(scenes, world.render(scenes), strict=True):
        thing, pan = scene.objects[0], scene.shot.pan
        np.testing.assert_allclose(thing.centers[:, 0] + pan, thing.centers[0, 0], atol=1e-3)
        assert abs(pan[-1]) > 10
        row = 0 if thing.centers[0, 1] > 32 else 63  # clear of the object
        first, last = (clip[t, row].astype(float).sum(-1) for t in (0, 16))
        shifted = np.interp(np.arange(64.0) + pan[-1], np.arange(64.0), first, left=np.nan, right=np.nan)
        good = ~np.isnan(shifted)
        assert np.abs(shifted - last)[good].mean() < 0.35 * np.abs(first - last)[good].mean() + 3


def test_splits_share_no_combination():
    share = np.mean([world.is_heldout((c, s, m)) for c in COLORS for s in SHAPES for m in every_motion()])
    assert 0.07 < share < 0.13
    seen: set[tuple[str, str, str]] = set()
    for scene in world.sample_scenes(10, 2500):
        for thing in scene.objects:
            seen.add(thing.combination)
    assert not any(world.is_heldout(combination) for combination in seen)
    for scene in world.sample_scenes(10, 100, split="heldout"):
        assert any(world.is_heldout(thing.combination) for thing in scene.objects)
    # Held out are combinations, not values: every value and every pair of colour and shape is trained on
    assert {motion for _, _, motion in seen} == set(every_motion())
    assert {(color, shape) for color, shape, _ in seen} == set(itertools.product(COLORS, SHAPES))
    assert not world.is_heldout(("red", "ball", "bounce"))


def every_motion() -> list[str]:
    return [m for m in MOTIONS if m != "slide"] + [f"slide {direction}" for direction in DIRECTIONS]


def test_the_mix_holds():
    kinds = [scene.shot.kind for scene in world.sample_scenes(11, 1500)]
    for kind, weight in (("single", 0.6), ("pair", 0.25), ("collision", 0.05), ("occluder", 0.05), ("pan", 0.05)):
        assert kinds.count(kind) / 1500 == pytest.approx(weight, abs=4 * np.sqrt(weight * (1 - weight) / 1500))


def test_pairs_never_touch():
    for scene in world.sample_scenes(12, 200, mix=only("pair")):
        first, second = scene.objects
        apart = np.linalg.norm(first.centers - second.centers, axis=-1)
        assert (apart > first.radii + second.radii).all()


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_captions_fit_and_tell_the_truth(split: str):
    for scene in world.sample_scenes(13, 800, split=split):
        said = world.captions(scene, np.random.default_rng(scene.index))
        assert len(said.short.encode("ascii")) <= 64
        assert len(said.dense.encode("ascii")) <= 150
        ground = scene.background
        mentioned = {thing.color for thing in scene.objects} | {ground.wall, ground.floor}
        for text in said:
            words = text.replace(",", "").replace("a small dot", "").split()
            for thing in scene.objects:
                assert thing.color in words
                assert {thing.shape, thing.shape + "s", "circle" if thing.shape == "ball" else "", "circles"} & set(
                    words
                )
            assert {word for word in words if word in COLORS or word in GROUNDS} <= mentioned
            alike = len({(o.color, o.shape, o.motion) for o in scene.objects}) < len(scene.objects)
            assert ("two" in words) == alike
            sizes = {thing.size for thing in scene.objects}
            assert not {"small", "little", "tiny"} & set(words) or "small" in sizes
            assert not {"large", "big"} & set(words) or "large" in sizes


def test_the_famous_prompt_is_typical():
    said = set()
    for scene in world.sample_scenes(14, 1200, mix=only("single", "bounce", small=0, large=0)):
        thing = scene.objects[0]
        if (thing.color, thing.shape, scene.background.floor) == ("red", "ball", "blue"):
            said |= {world.captions(scene, np.random.default_rng(n)).short for n in range(30)}
    assert "a red ball bounces on a blue floor" in said


def test_image_captions_say_what_one_frame_shows():
    verbs = {"slides", "bounces", "falls", "moves", "orbits", "grows", "shrinks", "rests", "pans", "enters", "leaves"}
    for scene in world.sample_scenes(15, 400):
        for frame in (0, 16):
            said = world.captions(scene, np.random.default_rng(1), image=True, frame=frame)
            assert len(said.short) <= 64
            for text in said:
                words = set(text.split())
                assert not verbs & words
                for thing in scene.objects:
                    if thing.visibility[frame] == 0 and thing.color not in scene.background:
                        assert thing.color not in words
    # An image of the world is a clip of one frame and has such captions by itself
    image = world.sample_scenes(15, 1, frames=1)[0]
    assert not verbs & set(world.captions(image, np.random.default_rng(0)).dense.split())


def test_cuts():
    source = world.WorldSource(seed=16, n=20, shots=(9, 9))
    for item in source.batch(range(20)):
        scene = item["scene"]
        assert item["frames"].shape == (18, 64, 64, 3)
        assert [length for length, _ in item["shots"]] == [9, 9]
        assert scene.shots[0].background.wall != scene.shots[1].background.wall
        step = np.abs(np.diff(item["frames"].astype(float), axis=0)).mean((1, 2, 3))
        assert step.argmax() == 8  # between frames 8 and 9
        with pytest.raises(ValueError, match="shots"):
            _ = scene.objects


def test_the_source_is_random_access():
    source = world.WorldSource(seed=17, n=50)
    assert len(source) == 50
    batch = source.batch([3, 49, 11])
    for index, item in zip((3, -1, 11), batch, strict=True):
        alone = source[index]
        np.testing.assert_array_equal(alone["frames"], item["frames"])
        assert alone["captions"] == item["captions"]
        assert alone["fps"] == 8
        assert len(alone["captions"]) == 2
    with pytest.raises(IndexError):
        source[50]


def test_prompts_say_no_more_than_their_truth():
    prompts = world.heldout_prompts(200, seed=18)
    assert len({prompt.text for prompt in prompts}) > 150
    assert world.heldout_prompts(200, seed=18) == prompts
    for prompt in prompts:
        words = prompt.text.replace(",", "").split()
        truth = prompt.truth
        assert ("background" in words) <= bool(truth.wall)
        assert ("floor" in words) == (bool(truth.floor) and "background" not in words)
        for thing in truth.objects:
            assert thing.color in words
            if thing.direction and thing.motion == "slide":
                assert set(thing.direction.split("-")) & {
                    word.removesuffix("wards") for w in words for word in w.split("-")
                }
            elif thing.motion == "slide":
                assert not {"left", "up", "down"} & set(words) or len(truth.objects) > 1


def test_mistakes_are_named():
    with pytest.raises(UserError, match='did you mean "heldout"'):
        world.sample_scenes(0, 1, split="held-out")
    with pytest.raises(UserError, match="16 pixels"):
        world.sample_scenes(0, 1, height=8)
    with pytest.raises(UserError, match="weight"):
        world.sample_scenes(0, 1, mix=Mix(**NONE))


def test_needs_no_jax():
    code = "import sys, sora_jax.data.world, sora_jax.evaluation.checkers as _; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
