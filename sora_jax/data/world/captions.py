"""One grammar that says what happens in a shot, in few words or in many, with paraphrases.

    sentence = subject verb [how] [where]        "a small red ball bounces to the left on a blue floor"

A caption only says what is true of the shot; what it leaves out is recorded in `Said`, so that a checker never asks
for something the prompt did not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sora_jax.data.world.clauses import CLAUSES, clause, clause_detail, still_clause, unsaid_direction
from sora_jax.data.world.phrases import (
    article,
    join,
    light_phrase,
    noun,
    pan_direction,
    place_phrase,
    predicate,
    subject,
    wall_phrase,
)
from sora_jax.data.world.plans import pick
from sora_jax.data.world.scene import Scene, Shot, WorldObject

SHORT_BYTES, DENSE_BYTES = 64, 150
MORE_SHORT_BYTES, MORE_DENSE_BYTES = 96, 220  # where there is something of the second world to be said


class Captions(NamedTuple):
    """What is said of a shot, briefly and at length, in ASCII."""

    short: str  # at most 64 bytes, in the second world 96
    dense: str  # at most 150 bytes, in the second world 220


class Said(NamedTuple):
    """A caption, and which optional parts of the truth it speaks of."""

    text: str
    place: bool  # the floor, or the background where there is no floor
    wall: bool  # the wall behind the floor
    direction: bool  # the directions of objects that have one
    size: bool  # the sizes of objects, where medium is what goes unsaid
    light: bool = False  # how it is lit; always said with the place
    same: bool = False  # that the first object is that of the shot before


def _limits(shot: Shot) -> tuple[int, int]:
    """Bytes of its short and of its dense caption."""
    return (SHORT_BYTES, DENSE_BYTES) if shot.plain else (MORE_SHORT_BYTES, MORE_DENSE_BYTES)


def _event_core(rng: np.random.Generator, shot: Shot, form: str, direction: bool, terse: bool = False) -> str:
    """Who does what, without the place; `terse` in the fewest words."""
    objects, floor = shot.objects, shot.background.kind == "floor"
    first = objects[0]
    if shot.kind in CLAUSES:
        return clause(rng, shot, direction, terse)
    if shot.kind == "pan":
        way = f"to the {pan_direction(shot)}" if rng.random() < 0.5 else pan_direction(shot)
        return f"the camera pans {way} {pick(rng, ('past', 'over', 'across'))} {article(noun(rng, first))}"
    if shot.kind == "collision":
        one, other = article(noun(rng, first)), article(noun(rng, objects[1]))
        if direction:
            verb = "rolls" if floor and first.shape == "ball" and rng.random() < 0.4 else pick(rng, ("slides", "moves"))
            return f"{one} {verb} {first.direction} {pick(rng, ('into', 'and hits'))} {other}"
        return f"{one} {pick(rng, ('hits', 'bumps into', 'knocks into'))} {other}"
    if shot.kind == "occluder":
        bar = pick(rng, ("wall", "wall", "bar"))
        verb = pick(rng, ("passes", "slides", "moves"))
        if direction:
            return f"{article(noun(rng, first))} {verb} to the {first.direction} behind a {bar}"
        return f"{article(noun(rng, first))} {verb} behind a {bar}"
    if len(objects) == 2 and first.motion == "orbit" and objects[1].motion == "rest":
        verb = pick(rng, ("orbits", "orbits", "circles", "moves around"))
        return f"{article(noun(rng, first))} {verb} {article(noun(rng, objects[1]))}" + (
            f" {first.direction}" if direction else ""
        )
    if len({(thing.motion, thing.direction) for thing in objects}) == 1:
        plural = len(objects) > 1
        return join(subject(rng, objects, terse), predicate(rng, first, plural, floor, direction, form, terse))
    link = " and " if terse else pick(rng, (" and ", " while "))
    return link.join(
        join(article(noun(rng, thing, terse)), predicate(rng, thing, False, floor, direction, "plain", terse))
        for thing in objects
    )


def _assemble(rng: np.random.Generator, core: str, place: str) -> str:
    """The place at the end, or now and then in front."""
    if place and place.startswith("on ") and rng.random() < 0.1:
        return f"{place}, {core}"
    return join(core, place)


def _form(rng: np.random.Generator) -> str:
    return pick(rng, ("plain",) * 6 + ("ing", "is"))


def short_caption(shot: Shot, rng: np.random.Generator) -> Said:
    """One short sentence (<= 64 bytes, in the second world 96), and what it says."""
    limit, _ = _limits(shot)
    floor = shot.background.kind == "floor"
    place = bool(rng.random() < (0.85 if floor else 0.6))
    # Slides in one of eight directions always say which, unless there is no room; drifts and turns only sometimes
    slides = shot.kind in ("single", "pair") and any(thing.motion == "slide" for thing in shot.objects)
    direction = bool(rng.random() < 0.5) or slides
    light = bool(shot.light) and (place or bool(rng.random() < 0.4))
    same = shot.same and bool(rng.random() < 0.5)
    for attempt in range(24):  # each third of the tries gives up a little more
        place, terse = place and attempt < 8, attempt >= 16
        light = light and (place or attempt < 8)
        direction = direction and attempt < 23
        core = _event_core(rng, shot, "plain" if terse else _form(rng), direction, terse)
        where = place_phrase(rng, shot, onto=shot.objects[0].motion == "fall") if place else ""
        text = join(_assemble(rng, _again(core) if same else core, where), light_phrase(rng, shot) if light else "")
        if len(text) <= limit:
            return Said(text, place, False, direction and not unsaid_direction(shot), not terse, light, same)
    raise AssertionError(f"no caption of {limit} bytes for {core}")


def _again(core: str) -> str:
    """The first thing that is named is the one of the shot before: "the same red ball bounces"."""
    return re.sub(r"\ban? ", "the same ", core, count=1)


def _detail(rng: np.random.Generator, shot: Shot) -> str:
    """A clause that a dense caption adds, true by construction."""
    objects = shot.objects
    first = objects[0]
    if shot.kind in CLAUSES:
        return clause_detail(rng, shot)
    if shot.kind == "collision":
        stops = objects[0].radii[0] == objects[1].radii[0]
        shape = objects[1].shape
        if stops:
            return f"it stops and the {objects[1].color} {shape} moves off to the {first.direction}"
        return f"the {objects[1].color} {shape} is knocked to the {first.direction}"
    if shot.kind == "occluder":
        return pick(rng, (f"it is hidden for a moment and comes out on the {first.direction}",
                          f"it disappears and then reappears on the {first.direction}"))  # fmt: skip
    if shot.kind == "pan":
        return pick(rng, (f"the {first.shape} does not move by itself", f"the {first.shape} stays in its place"))
    if len(objects) > 1:
        return ""
    details: dict[str, tuple[str, ...]] = {
        "slide": ("at a steady speed", "in a straight line", ""),
        "bounce": ("lower each time", "losing height with every bounce", ""),
        "fall": ("and stays there", "and comes to rest", "faster and faster"),
        "orbit": ("around a small dot", "on a round path", ""),
        "grow": ("steadily", "slowly", "in one place"),
        "shrink": ("steadily", "slowly", "in one place"),
        "rest": ("the whole time", ""),
        "enter": ("and moves across the frame", ""),
        "exit": ("until it is gone", ""),
    }
    return pick(rng, details[first.motion])


def dense_caption(shot: Shot, rng: np.random.Generator) -> Said:
    """All that is worth saying (<= 150 bytes, in the second world 220), and what it says."""
    _, limit = _limits(shot)
    same = shot.same and bool(rng.random() < 0.5)
    for attempt in range(20):
        core = _event_core(rng, shot, pick(rng, ("plain", "plain", "is")), True)
        core = _again(core) if same else core
        place = place_phrase(rng, shot, onto=shot.objects[0].motion == "fall")
        wall = join(wall_phrase(rng, shot) if attempt < 10 else "", light_phrase(rng, shot))
        detail = _detail(rng, shot) if attempt < 5 else ""
        comma = ", " if shot.kind != "single" or rng.random() < 0.5 else " "
        if detail.startswith("and "):
            comma = " "
        if shot.kind in CLAUSES:  # what is added speaks of objects, not of the place
            text = join(core, place, wall) + (f"{comma}{detail}" if detail else "")
        elif detail and comma == " ":
            text = join(core, place, detail, wall) if detail.startswith("and ") else join(core, detail, place, wall)
        else:
            text = join(core, place, wall) + (f", {detail}" if detail else "")
        if len(text) <= limit:
            walled = shot.background.kind == "floor" and attempt < 10
            return Said(text, True, walled, not unsaid_direction(shot), True, bool(shot.light), same)
    raise AssertionError(f"no caption of {limit} bytes for {core}")


def _still(rng: np.random.Generator, shot: Shot, seen: Sequence[WorldObject], dense: bool, attempt: int) -> str:
    where = place_phrase(rng, shot) if dense or attempt < 8 else ""
    behind = wall_phrase(rng, shot) if dense else ""
    if shot.kind in ("relation", "depth") and len(seen) == len(shot.objects):
        what = still_clause(rng, shot, terse=attempt >= 16)
    else:
        what = subject(rng, seen, terse=attempt >= 16) if seen else "nothing"
    if dense and shot.occluder is not None:
        what = f"{what} and a {shot.occluder.color} wall"
    if dense and rng.random() < 0.3:
        what = pick(rng, ("a picture of ", "an image of ")) + what
    return join(what, where, behind, light_phrase(rng, shot) if where else "")


def _image_captions(shot: Shot, rng: np.random.Generator, frame: int) -> Captions:
    """What can be seen in one frame: which things, how many, on what."""
    seen = [thing for thing in shot.objects if thing.visibility[frame] >= 0.4]
    tries = range(24)
    brief, long = _limits(shot)
    short = next(text for n in tries if len(text := _still(rng, shot, seen, False, n)) <= brief)
    dense = next(text for n in tries if len(text := _still(rng, shot, seen, True, n)) <= long)
    return Captions(short, dense)


def shot_captions(shot: Shot, rng: np.random.Generator, *, image: bool = False, frame: int = 0) -> Captions:
    """Captions of one shot. A still (`image`, or a shot of one frame) gets static attributes only, those of `frame`."""
    if image or shot.frames == 1:
        return _image_captions(shot, rng, frame)
    return Captions(short_caption(shot, rng).text, dense_caption(shot, rng).text)


def captions(scene: Scene, rng: np.random.Generator, *, image: bool = False, frame: int = 0) -> Captions:
    """Captions of an uncut scene: `short` of at most 64 bytes (second world: 96), `dense` of at most 150 (220).

    With `image`, they speak of what one frame shows. A scene with cuts has captions for each of its shots:
    `[shot_captions(shot, rng) for shot in scene.shots]`.
    """
    return shot_captions(scene.shot, rng, image=image, frame=frame)
