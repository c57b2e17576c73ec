"""The second world: relations, depth, meetings, walls, weightlessness, cameras, lights, floors and characters.

What is said and what is drawn is held against the scene's numbers, and those against the laws they should obey.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from sora_jax.config import load_config
from sora_jax.data import world
from sora_jax.data.world import Mix, Scene
from sora_jax.data.world.captions import MORE_DENSE_BYTES, MORE_SHORT_BYTES
from sora_jax.data.world.encounters import folded
from sora_jax.data.world.outlines import shape_distance
from sora_jax.data.world.scene import (
    COLORS,
    FLOOR_COLORS,
    GROUNDS,
    KINDS,
    LIGHTS,
    MORE_KINDS,
    OUTLINES,
    RELATIONS,
    SHAPES,
    TEXTURES,
)
from sora_jax.errors import UserError

NONE = dict.fromkeys(KINDS, 0.0)


def only(kind: str, **rest: float) -> Mix:
    return Mix(**{**NONE, kind: 1.0, **rest})


def sample(kind: str, n: int, seed: int = 301, size: tuple[int, int, int] = (17, 64, 64), **rest: float) -> list[Scene]:
    frames, height, width = size
    return world.sample_scenes(seed, n, split="all", mix=only(kind, **rest), frames=frames, height=height, width=width)


def world_2() -> Mix:
    return load_config("world_2").data.mix


def with_shot(scene: Scene, **changes: object) -> np.ndarray:
    return world.render([dataclasses.replace(scene, shots=(dataclasses.replace(scene.shot, **changes),))])[0]


def test_the_first_world_has_nothing_of_it():
    for scene in world.sample_scenes(300, 200):
        shot = scene.shot
        assert shot.plain
        assert shot.gravity
        assert shot.tilt is shot.relation is None
    assert not set(Mix().identity) & {*MORE_KINDS, "lit", "textured", "same"}
    assert Mix(trio=0.5).identity["trio"] == 0.5


def test_shares_are_shares():
    with pytest.raises(UserError, match="lit as a share in \\[0, 1\\]: it cannot be 1.5"):
        Mix(lit=1.5)


def test_what_fits_in_no_shot_says_what_would():
    mix = {"single": 0, "pair": 0, "collision": 0, "occluder": 0, "pan": 0, "passing": 1, "trio": 1}
    with pytest.raises(UserError, match="passing shot .* 3 frames of 64x64 .* passing=0"):
        world.sample_scenes(0, 20, frames=3, mix=Mix(**mix))
    scenes = world.sample_scenes(0, 20, frames=3, mix=Mix(**mix | {"passing": 0}))
    assert {scene.shot.kind for scene in scenes} == {"trio"}


@pytest.mark.parametrize(
    "size", [(17, 128, 128), (17, 96, 96), (17, 96, 144), (17, 144, 96), (49, 72, 128), (1, 96, 96)], ids=str
)
def test_every_kind_in_every_size(size: tuple[int, int, int]):
    frames, height, width = size
    kinds = MORE_KINDS if frames > 1 else ("trio", "relation", "depth")
    for kind in kinds:
        scenes = sample(kind, 4, size=size, lit=0.5, textured=0.5)
        clips = world.render(scenes)
        assert clips.shape == (4, frames, height, width, 3)
        for scene in scenes:
            assert scene.shot.kind == kind
            for thing in scene.objects:
                assert thing.centers.shape == (frames, 2)
                assert thing.visibility.max() > 0.6


def test_scenes_are_random_access():
    many = world.sample_scenes(302, 30, mix=world_2())
    alone = world.sample_scenes(302, [17], mix=world_2())
    np.testing.assert_array_equal(world.render(alone)[0], world.render(many)[17])


def test_relations_hold_in_every_frame():
    seen = set()
    for scene in sample("relation", 150):
        name, subject, others = scene.shot.relation
        seen.add(name)
        at = scene.objects[subject].centers
        away = [scene.objects[other].centers - at for other in others]
        if name == "between":
            # one on either side, along the longer axis of the two
            axis = int(np.abs(away[0] - away[1]).max(0).argmax())
            assert (away[0][:, axis] * away[1][:, axis] < 0).all()
            continue
        ((x, y),) = (one.T for one in away)
        along, across = {"left of": (x, y), "right of": (-x, y), "above": (y, x), "below": (-y, x)}[name]
        assert (along > np.abs(across)).all()
    assert seen == set(RELATIONS) - {"in front of", "behind"}


@pytest.mark.parametrize("kind", ["depth", "passing"])
def test_what_is_in_front_is_drawn_over_what_is_behind(kind: str):
    shared = 0
    ys, xs = (np.mgrid[:96, :96] + 0.5).astype(np.float32)
    for scene in sample(kind, 40, size=(17, 96, 96)):
        front, back = (0, 1) if scene.shot.relation.name == "in front of" else (1, 0)
        clip = world.render([scene])[0].astype(float)
        for t in (4, 8, 12):
            inside = []
            for thing in scene.objects:
                dx, dy = xs - thing.centers[t, 0], ys - thing.centers[t, 1]
                inside.append(shape_distance(thing.shape, dx, dy, thing.radii[t : t + 1]) < -2)
            both = inside[0] & inside[1]
            if both.sum() < 6:
                continue
            shared += 1
            chroma = clip[t][both] - clip[t][both].mean(-1, keepdims=True)
            hues = [np.array(COLORS[scene.objects[n].color]) - np.mean(COLORS[scene.objects[n].color]) for n in (0, 1)]
            likeness = [np.median(chroma @ hue) / np.linalg.norm(hue) for hue in hues]
            assert likeness[front] > likeness[back]
    assert shared > 20


def test_visibility_is_what_can_be_seen():
    for scene in sample("depth", 12, size=(2, 128, 128)) + sample("passing", 12, size=(9, 128, 128)):
        order = scene.shot.order
        back = scene.objects[order[0]]
        hue = np.array(COLORS[back.color], float) - np.mean(COLORS[back.color])
        hue /= np.linalg.norm(hue)

        def seen(clip: np.ndarray, hue: np.ndarray = hue) -> np.ndarray:
            chroma = clip.astype(float) - clip.mean(-1, keepdims=True)
            return ((chroma @ hue > 40) & (np.linalg.norm(chroma, axis=-1) < 1.06 * (chroma @ hue))).sum((1, 2))

        # the same clip with the one in front taken away
        alone = with_shot(scene, objects=(back,), order=())
        share = seen(world.render([scene])[0]) / np.maximum(seen(alone), 1)
        np.testing.assert_allclose(share, back.visibility, atol=0.09)


def test_meetings_keep_momentum_and_energy():
    ways = set()
    for scene in sample("meeting", 60):
        hit = scene.events[0].time
        k = int(hit)
        (x1, y1), (x2, y2) = (thing.centers.astype(float).T for thing in scene.objects)
        m1, m2 = (float(thing.radii[0]) ** 2 for thing in scene.objects)
        v1, v2, w1, w2 = x1[1] - x1[0], x2[1] - x2[0], x1[-1] - x1[-2], x2[-1] - x2[-2]
        assert m1 * v1 + m2 * v2 == pytest.approx(m1 * w1 + m2 * w2, abs=1e-3 * m1)
        assert m1 * v1**2 + m2 * v2**2 == pytest.approx(m1 * w1**2 + m2 * w2**2, rel=1e-3)
        assert min(abs(v1), abs(v2)) > 0.1  # both move
        apart = abs((x1[k] + (hit - k) * v1) - (x2[k] + (hit - k) * v2))
        widths = [OUTLINES[thing.shape].half_width * thing.radii[0] for thing in scene.objects]
        assert apart == pytest.approx(sum(widths), abs=1e-3)
        if scene.background.kind != "floor":
            np.testing.assert_allclose(y1, y2, atol=1e-3)
        for thing, speed in zip(scene.objects, (v1, v2), strict=True):
            assert (speed > 0) == (thing.direction == "right")
        ways.add(scene.objects[0].direction == scene.objects[1].direction)
    assert ways == {True, False}


def test_folding_agrees_with_stepping():
    place, speed, low, high, step = 7.3, -2.7, 4.0, 21.0, 1e-3
    places, hits = folded(place, speed, low, high, np.arange(30.0))
    now, way, seen, struck = place, speed, [], []
    for n in range(round(29 / step) + 1):
        if n % round(1 / step) == 0:
            seen.append(now)
        now += way * step
        if not low < now < high:
            way = -way
            now = 2 * (low if now < low else high) - now
            struck.append(n * step)
    np.testing.assert_allclose(places, seen, atol=0.01)
    np.testing.assert_allclose(hits, struck, atol=0.01)


def test_what_floats_goes_on_at_one_speed_inside_the_room():
    for scene in sample("floating", 60):
        assert not scene.shot.gravity
        ground = scene.background
        bottom = ground.contact if ground.kind == "floor" else scene.height
        for number, thing in enumerate(scene.objects):
            outline, radius = OUTLINES[thing.shape], thing.radii[0]
            x, y = thing.centers.T
            assert (x - outline.half_width * radius).min() > -1e-3
            assert (x + outline.half_width * radius).max() < scene.width + 1e-3
            assert (y - outline.top * radius).min() > -1e-3
            assert (y + outline.bottom * radius).max() < bottom + 1e-3
            hits = [event.time for event in scene.events if number in event.objects]
            assert hits
            steps = np.diff(thing.centers, axis=0)
            free = [t for t in range(16) if not any(t < hit < t + 1 for hit in hits)]
            speeds = np.hypot(*steps[free].T)
            np.testing.assert_allclose(speeds, speeds[0], rtol=1e-3)


def test_walls_hide_what_is_behind_them():
    counts = set()
    for scene in sample("wall", 40):
        clip = world.render([scene])[0]
        bar = scene.shot.occluder
        counts.add((len(scene.objects), bar.top > 0))
        for thing in scene.objects:
            assert thing.visibility.min() < 1e-6
            assert min(thing.visibility[0], thing.visibility[-1]) > 0.8
        gone = np.flatnonzero(np.max([thing.visibility for thing in scene.objects], axis=0) < 1e-6)
        for t in gone:
            chroma = clip[t].astype(float) - clip[t].mean(-1, keepdims=True)
            assert np.abs(chroma).max() < 60  # no saturated pixel is left
        if bar.top > 0:  # above a standing wall the ground goes on
            column = clip[0, : int(bar.top) - 2, int((bar.left + bar.right) / 2)].astype(int)
            beside = clip[0, : int(bar.top) - 2, 1].astype(int)
            assert np.abs(column - beside).max() <= 25  # stripes
    assert counts == {(1, False), (1, True), (2, False)}


def test_the_ground_moves_as_far_as_the_camera():
    ways = set()
    for scene in sample("travel", 60):
        shot, clip = scene.shot, world.render([scene])[0].astype(float).sum(-1)
        moved = np.stack([shot.pan, np.zeros(17) if shot.tilt is None else shot.tilt], -1)
        for thing in scene.objects:
            np.testing.assert_allclose(thing.centers + moved, thing.centers[0][None].repeat(17, 0), atol=1e-3)
        axis = int(shot.tilt is not None)
        way = ("right", "down")[axis] if moved[-1, axis] > 0 else ("left", "up")[axis]
        assert world.truth_of(shot).pan == way
        ways.add((way, scene.background.kind == "floor"))
        # a line of the ground that no object crosses: the border with the most room
        if scene.background.kind == "floor":
            first, last = clip[0, -1], clip[8, -1]
        else:
            lines = [np.s_[:, 0], np.s_[:, -1]] if axis else [np.s_[0], np.s_[-1]]
            room = [min(abs(thing.centers[:, 1 - axis] - edge).min() for thing in scene.objects) for edge in (0, 64)]
            line = lines[int(np.argmax(room))]
            if max(room) < 20:
                continue
            first, last = clip[0][line], clip[8][line]
        places = np.arange(64.0)
        if axis:  # the wall's light from above stays where it is on the screen
            first, last = (line - np.polyval(np.polyfit(places, line, 1), places) for line in (first, last))
        shifted = np.interp(places + moved[8, axis], places, first, left=np.nan, right=np.nan)
        good = ~np.isnan(shifted)
        assert np.abs(shifted - last)[good].mean() < 0.35 * np.abs(first - last)[good].mean() + 6
    assert ways == {("left", True), ("right", True), ("left", False), ("right", False), ("up", False), ("down", False)}


def test_light_changes_what_it_should():
    found = set()
    for scene in sample("relation", 60, lit=1.0):
        lit, plain = world.render([scene])[0][0].astype(float), with_shot(scene, light="")[0].astype(float)
        red, green, blue = (lit.mean((0, 1)) / plain.mean((0, 1))).tolist()
        left, right = (lit[:, part].mean() / plain[:, part].mean() for part in (np.s_[:16], np.s_[-16:]))
        name = scene.shot.light
        found.add(name)
        assert {
            "dim": red < 0.75 and blue < 0.75,
            "warm": red > green > blue + 0.04,
            "cool": blue > green > red,
            "left": left > right + 0.15,
            "right": right > left + 0.15,
        }[name]
    assert found == set(LIGHTS)


def test_textured_floors_keep_their_color():
    found = set()
    for scene in sample("single", 120, textured=1.0, floor=1.0, orbit=0, grow=0, shrink=0):
        ground = scene.background
        if ground.kind != "floor":
            continue
        empty = with_shot(scene, objects=tuple(dataclasses.replace(o, centers=o.centers - 1000) for o in scene.objects))
        floor = empty[0, int(ground.contact) :].reshape(-1, 3).astype(float)
        nearest = min(FLOOR_COLORS, key=lambda name: np.abs(floor.mean(0) - FLOOR_COLORS[name]).sum())
        assert nearest == ground.floor
        assert floor.std(0).mean() > 3  # the pattern shows
        assert (ground.texture == "wooden") == (ground.floor == "wooden")
        found.add(ground.texture)
    assert found == set(TEXTURES)


def test_a_character_stays_over_the_cuts():
    mix = Mix(**{**dataclasses.asdict(world_2()), "same": 1.0})
    texts = []
    for scene in world.sample_scenes(303, 60, mix=mix, shots=(9, 9, 9)):
        who = {(shot.objects[0].shape, shot.objects[0].color, shot.objects[0].size) for shot in scene.shots}
        assert len(who) == 1
        radii = np.concatenate([shot.objects[0].radii for shot in scene.shots])
        np.testing.assert_allclose(radii, radii[0])
        assert [shot.same for shot in scene.shots] == [False, True, True]
        for before, after in zip(scene.shots[:-1], scene.shots[1:], strict=True):
            assert before.background.wall != after.background.wall
            doing = [(s.kind, s.objects[0].motion, s.objects[0].direction) for s in (before, after)]
            assert doing[0] != doing[1]
            assert len([o for o in after.objects if o.color == after.objects[0].color]) == 1
        rng = np.random.default_rng(scene.index)
        texts += [world.shot_captions(shot, rng).short for shot in scene.shots[1:]]
    assert 0.3 < np.mean(["the same" in text for text in texts]) < 0.7
    # and nobody stays where that was not asked for
    assert not any(shot.same for scene in world.sample_scenes(303, 20, shots=(9, 9)) for shot in scene.shots)


# ---- what is said ----

A_THING = f"an? (small |little |tiny |large |big )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)}|circle)"
SAYS = {
    "left of": f"(to the |on the )?left of {A_THING}",
    "right of": f"(to the |on the )?right of {A_THING}",
    "above": f"(above|over) {A_THING}",
    "below": f"(below|under) {A_THING}",
    "between": f"between {A_THING}",
    "behind": f"behind {A_THING}",
    "in front of": f"in front of {A_THING}",
}


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_captions_fit_and_tell_the_truth(split: str):
    shapes = {shape: {shape, shape + "s"} for shape in SHAPES}
    shapes["ball"] |= {"circle", "circles"}
    for scene in world.sample_scenes(304, 500, split=split, mix=world_2()):
        said = world.captions(scene, np.random.default_rng(scene.index))
        assert len(said.short.encode("ascii")) <= MORE_SHORT_BYTES
        assert len(said.dense.encode("ascii")) <= MORE_DENSE_BYTES
        shot, ground = scene.shot, scene.background
        for text in said:
            text = re.sub("pans (to the )?(left|right|up|down) (over|past|across)", "pans past", text)  # not a relation
            words = set(text.replace(",", "").split())
            for thing in scene.objects:
                assert thing.color in words
                assert shapes[thing.shape] & words
            alike = len({(o.color, o.shape, o.motion) for o in scene.objects}) < len(scene.objects)
            assert bool({"two", "three"} & words) == alike
            assert "three" not in words or len(scene.objects) == 3
            mentioned = {thing.color for thing in scene.objects} | {ground.wall, ground.floor}
            assert words & {*COLORS, *GROUNDS} <= mentioned
            assert bool({"gravity", "weightlessly"} & words) == (not shot.gravity)
            name = shot.relation.name if shot.relation else ""
            for relation, pattern in SAYS.items():
                assert bool(re.search(pattern, text)) == (relation == name), (relation, text)
            for light, phrase in (("dim", "dim|half-dark"), ("warm", "warm|golden"), ("cool", "cool|cold")):
                assert not re.search(phrase, text) or shot.light == light
            for side in ("left", "right"):
                assert not re.search(f"(lit|light) from the {side}", text) or shot.light == side
            for texture in TEXTURES:
                assert texture not in words or ground.texture == texture
        if shot.light:
            assert "light" in said.dense or "lit" in said.dense or "darkness" in said.dense


def test_stills_of_relations_say_them():
    for scene in sample("relation", 40) + sample("depth", 40):
        said = world.captions(scene, np.random.default_rng(0), image=True, frame=5)
        for text in said:
            assert re.search(SAYS[scene.shot.relation.name], text)
            assert not re.search("sliding|moving", text)


def test_heldout_prompts_speak_of_all_of_it():
    prompts = world.heldout_prompts(400, seed=305, mix=world_2())
    truths = [prompt.truth for prompt in prompts]
    assert {truth.relation for truth in truths} == {"", *RELATIONS, "head-on", "from behind"}
    assert {truth.kind for truth in truths} == {*KINDS, *MORE_KINDS}
    assert {truth.light for truth in truths} == {"", *LIGHTS}
    assert {truth.texture for truth in truths} == {"", *TEXTURES}
    assert {truth.pan for truth in truths} >= {"left", "right", "up", "down"}
    for prompt in prompts:
        truth = prompt.truth
        assert truth.gravity == (not re.search("gravity|weightless", prompt.text))
        assert any(world.is_heldout(spec) for spec in _combinations(prompt)) or not _complete(prompt)
        if truth.wall and truth.light == "":
            assert not re.search("light|darkness|lit ", prompt.text)
        for thing in truth.objects:
            if thing.direction and truth.kind in ("relation", "depth", "passing", "meeting"):
                assert thing.direction.split("-")[0] in prompt.text


def _complete(prompt: world.Prompt) -> bool:
    return all(thing.direction or thing.motion != "slide" for thing in prompt.truth.objects)


def _combinations(prompt: world.Prompt) -> list[tuple[str, str, str]]:
    return [
        (o.color, o.shape, f"{o.motion} {o.direction}" if o.motion == "slide" else o.motion)
        for o in prompt.truth.objects
    ]


def test_stories_have_a_prompt_for_each_shot():
    found = world.stories(60, seed=306, mix=world_2())
    assert world.stories(60, seed=306, mix=world_2()) == found
    assert 0.5 < np.mean([story.same for story in found]) < 0.9  # of 0.7
    for story in found:
        assert story.lengths == (9, 9)
        first, second = (prompt.truth for prompt in story.prompts)
        if story.same:
            who = [(t.objects[0].color, t.objects[0].shape) for t in (first, second)]
            assert who[0] == who[1]
        assert ("the same" in story.prompts[1].text) <= story.same
        assert "the same" not in story.prompts[0].text
