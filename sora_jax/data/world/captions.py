"""One grammar that says what happens in a shot, in few words or in many, with paraphrases.

    sentence = subject verb [how] [where]        "a small red ball bounces to the left on a blue floor"

A caption only says what is true of the shot; what it leaves out is recorded in `Said`, so that a checker never asks
for something the prompt did not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sora_jax.data.world.scene import Scene, Shot, WorldObject

SHORT_BYTES = 64
DENSE_BYTES = 150


class Captions(NamedTuple):
    """What is said of a shot, briefly and at length."""

    short: str  # at most 64 bytes of ASCII
    dense: str  # at most 150 bytes of ASCII


class Said(NamedTuple):
    """A caption, and which optional parts of the truth it speaks of."""

    text: str
    place: bool  # the floor, or the background where there is no floor
    wall: bool  # the wall behind the floor
    direction: bool  # the directions of objects that have one
    size: bool  # the sizes of objects, where medium is what goes unsaid


class Verb(NamedTuple):
    """Third person singular, plural, participle."""

    one: str
    many: str
    ing: str


_SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "medium": ("",), "large": ("large", "large", "big")}
_SHAPE_WORDS = {
    "ball": ("ball", "ball", "ball", "circle"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star",),
}
_TOWARDS = {
    "right": ("right", "to the right", "to the right", "from left to right"),
    "left": ("left", "to the left", "to the left", "from right to left"),
    "up": ("up", "upwards", "straight up"),
    "down": ("down", "downwards", "straight down"),
    "up-right": ("up and to the right", "up and right", "diagonally up and right", "up-right"),
    "up-left": ("up and to the left", "up and left", "diagonally up and left", "up-left"),
    "down-right": ("down and to the right", "down and right", "diagonally down and right", "down-right"),
    "down-left": ("down and to the left", "down and left", "diagonally down and left", "down-left"),
}
_OPPOSITE = {"left": "right", "right": "left", "up": "bottom", "down": "top"}  # where a thing that enters comes from
_SIDE = {"left": "left", "right": "right", "up": "top", "down": "bottom"}
_SLIDE = (
    Verb("slides", "slide", "sliding"),
    Verb("slides", "slide", "sliding"),
    Verb("moves", "move", "moving"),
    Verb("glides", "glide", "gliding"),
)
_VERBS: dict[str, tuple[Verb, ...]] = {
    "slide": _SLIDE,
    "bounce": (
        Verb("bounces", "bounce", "bouncing"),
        Verb("bounces", "bounce", "bouncing"),
        Verb("bounces", "bounce", "bouncing"),
        Verb("bounces up and down", "bounce up and down", "bouncing up and down"),
        Verb("hops", "hop", "hopping"),
    ),
    "fall": (
        Verb("falls", "fall", "falling"),
        Verb("falls", "fall", "falling"),
        Verb("drops", "drop", "dropping"),
        Verb("falls down", "fall down", "falling down"),
    ),
    "orbit": (
        Verb("orbits", "orbit", "orbiting"),
        Verb("orbits", "orbit", "orbiting"),
        Verb("moves in a circle", "move in a circle", "moving in a circle"),
        Verb("goes around in a circle", "go around in a circle", "going around in a circle"),
    ),
    "grow": (
        Verb("grows", "grow", "growing"),
        Verb("grows", "grow", "growing"),
        Verb("gets bigger", "get bigger", "getting bigger"),
        Verb("grows larger", "grow larger", "growing larger"),
    ),
    "shrink": (
        Verb("shrinks", "shrink", "shrinking"),
        Verb("shrinks", "shrink", "shrinking"),
        Verb("gets smaller", "get smaller", "getting smaller"),
    ),
    "rest": (
        Verb("rests", "rest", "resting"),
        Verb("stays still", "stay still", "staying still"),
        Verb("sits still", "sit still", "sitting still"),
        Verb("does not move", "do not move", "not moving"),
    ),
    "enter": (
        Verb("enters", "enter", "entering"),
        Verb("slides in", "slide in", "sliding in"),
        Verb("comes in", "come in", "coming in"),
    ),
    "exit": (
        Verb("leaves", "leave", "leaving"),
        Verb("slides out", "slide out", "sliding out"),
        Verb("exits", "exit", "exiting"),
    ),
}
_ROLL = Verb("rolls", "roll", "rolling")


def _one(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _noun(rng: np.random.Generator, thing: WorldObject, terse: bool = False) -> str:
    """The words "small red ball", without an article; `terse` leaves the size out, as does a size that changes."""
    changes = thing.motion in ("grow", "shrink")
    word = "" if changes or terse else _one(rng, _SIZE_WORDS[thing.size])
    return _join(word, thing.color, _one(rng, _SHAPE_WORDS[thing.shape]))


def _twins(objects: Sequence[WorldObject]) -> bool:
    """Whether two objects are alike in all that a caption says."""
    return len(objects) == 2 and len({(o.shape, o.color, o.size, o.motion) for o in objects}) == 1


def _subject(rng: np.random.Generator, objects: Sequence[WorldObject], terse: bool = False) -> str:
    if _twins(objects):
        return f"two {_noun(rng, objects[0], terse)}s"
    return " and ".join(_article(_noun(rng, thing, terse)) for thing in objects)


def _predicate(
    rng: np.random.Generator,
    thing: WorldObject,
    plural: bool,
    floor: bool,
    direction: bool,
    form: str,
    terse: bool = False,
) -> str:
    """The words "slides to the right"; `form` is "plain", "ing" or "is" (is sliding)."""
    verbs = _VERBS[thing.motion]
    verb = verbs[0 if terse else int(rng.integers(len(verbs)))]
    if thing.motion == "slide" and not terse and floor and thing.shape == "ball" and rng.random() < 0.4:
        verb = _ROLL
    said = {
        "plain": verb.many if plural else verb.one,
        "ing": verb.ing,
        "is": ("are " if plural else "is ") + verb.ing,
    }[form]
    how = ""
    if thing.motion in ("slide", "bounce") and direction and thing.direction:
        ways = _TOWARDS[thing.direction]
        how = thing.direction if terse else _one(rng, ways if thing.motion == "slide" else ways[:3])
    elif thing.motion == "orbit" and direction:
        how = thing.direction
    elif thing.motion == "enter":
        how = f"from the {_OPPOSITE[thing.direction]}"
    elif thing.motion == "exit":
        side = _SIDE[thing.direction]
        on = "to" if side in ("left", "right") and verb.one != "exits" else "at"
        how = f"{on} the {side}"
    return _join(said, how)


def _place(rng: np.random.Generator, shot: Shot, onto: bool = False) -> str:
    ground = shot.background
    if ground.kind == "floor":
        return f"{'onto' if onto and rng.random() < 0.5 else 'on'} {_article(ground.floor)} floor"
    preposition = _one(rng, ("on", "on", "over", "against"))
    stripes = "striped " if ground.striped else ""
    if ground.kind == "gradient":
        return _one(
            rng,
            (
                f"{preposition} a {ground.wall} to {ground.floor} background",
                f"{preposition} a background fading from {ground.wall} to {ground.floor}",
            ),
        )
    return f"{preposition} {_article(stripes + ground.wall)} background"


def _wall(rng: np.random.Generator, shot: Shot) -> str:
    """The wall behind a floor, for dense captions."""
    if shot.background.kind != "floor":
        return ""
    stripes = "striped " if shot.background.striped else ""
    wall = _article(stripes + shot.background.wall) + " wall"
    return _one(rng, (f"in front of {wall}", f"in front of {wall}", f"with {wall} behind"))


def _event_core(rng: np.random.Generator, shot: Shot, form: str, direction: bool, terse: bool = False) -> str:
    """Who does what, without the place; `terse` in the fewest words."""
    objects, floor = shot.objects, shot.background.kind == "floor"
    first = objects[0]
    if shot.kind == "pan":
        way = f"to the {pan_direction(shot)}" if rng.random() < 0.5 else pan_direction(shot)
        return f"the camera pans {way} {_one(rng, ('past', 'over', 'across'))} {_article(_noun(rng, first))}"
    if shot.kind == "collision":
        one, other = _article(_noun(rng, first)), _article(_noun(rng, objects[1]))
        if direction:
            verb = "rolls" if floor and first.shape == "ball" and rng.random() < 0.4 else _one(rng, ("slides", "moves"))
            return f"{one} {verb} {first.direction} {_one(rng, ('into', 'and hits'))} {other}"
        return f"{one} {_one(rng, ('hits', 'bumps into', 'knocks into'))} {other}"
    if shot.kind == "occluder":
        bar = _one(rng, ("wall", "wall", "bar"))
        verb = _one(rng, ("passes", "slides", "moves"))
        if direction:
            return f"{_article(_noun(rng, first))} {verb} to the {first.direction} behind a {bar}"
        return f"{_article(_noun(rng, first))} {verb} behind a {bar}"
    if len(objects) == 2 and first.motion == "orbit" and objects[1].motion == "rest":
        verb = _one(rng, ("orbits", "orbits", "circles", "moves around"))
        return f"{_article(_noun(rng, first))} {verb} {_article(_noun(rng, objects[1]))}" + (
            f" {first.direction}" if direction else ""
        )
    if len({(thing.motion, thing.direction) for thing in objects}) == 1:
        plural = len(objects) > 1
        return _join(_subject(rng, objects, terse), _predicate(rng, first, plural, floor, direction, form, terse))
    link = " and " if terse else _one(rng, (" and ", " while "))
    return link.join(
        _join(_article(_noun(rng, thing, terse)), _predicate(rng, thing, False, floor, direction, "plain", terse))
        for thing in objects
    )


def pan_direction(shot: Shot) -> str:
    """Which way the camera goes: "left" or "right"."""
    return "right" if shot.pan[-1] > shot.pan[0] else "left"


def _assemble(rng: np.random.Generator, core: str, place: str) -> str:
    """The place at the end, or now and then in front."""
    if place and place.startswith("on ") and rng.random() < 0.1:
        return f"{place}, {core}"
    return _join(core, place)


def _form(rng: np.random.Generator) -> str:
    return _one(rng, ("plain",) * 6 + ("ing", "is"))


def short_caption(shot: Shot, rng: np.random.Generator) -> Said:
    """One short sentence (<= 64 bytes), and what it says."""
    floor = shot.background.kind == "floor"
    place = bool(rng.random() < (0.85 if floor else 0.6))
    # Slides in one of eight directions always say which, unless there is no room; drifts and turns only sometimes
    slides = shot.kind in ("single", "pair") and any(thing.motion == "slide" for thing in shot.objects)
    direction = bool(rng.random() < 0.5) or slides
    for attempt in range(24):  # each third of the tries gives up a little more
        place, terse = place and attempt < 8, attempt >= 16
        direction = direction and attempt < 23
        core = _event_core(rng, shot, "plain" if terse else _form(rng), direction, terse)
        where = _place(rng, shot, onto=shot.objects[0].motion == "fall") if place else ""
        text = _assemble(rng, core, where)
        if len(text) <= SHORT_BYTES:
            return Said(text, place, False, direction, not terse)
    raise AssertionError(f"no caption of {SHORT_BYTES} bytes for {core}")


def _detail(rng: np.random.Generator, shot: Shot) -> str:
    """A clause that a dense caption adds, true by construction."""
    objects = shot.objects
    first = objects[0]
    if shot.kind == "collision":
        stops = objects[0].radii[0] == objects[1].radii[0]
        shape = objects[1].shape
        if stops:
            return f"it stops and the {objects[1].color} {shape} moves off to the {first.direction}"
        return f"the {objects[1].color} {shape} is knocked to the {first.direction}"
    if shot.kind == "occluder":
        return _one(rng, (f"it is hidden for a moment and comes out on the {first.direction}",
                          f"it disappears and then reappears on the {first.direction}"))  # fmt: skip
    if shot.kind == "pan":
        return _one(rng, (f"the {first.shape} does not move by itself", f"the {first.shape} stays in its place"))
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
    return _one(rng, details[first.motion])


def dense_caption(shot: Shot, rng: np.random.Generator) -> Said:
    """All that is worth saying (<= 150 bytes), and what it says."""
    for attempt in range(20):
        core = _event_core(rng, shot, _one(rng, ("plain", "plain", "is")), True)
        place = _place(rng, shot, onto=shot.objects[0].motion == "fall")
        wall = _wall(rng, shot) if attempt < 10 else ""
        detail = _detail(rng, shot) if attempt < 5 else ""
        comma = ", " if shot.kind != "single" or rng.random() < 0.5 else " "
        if detail.startswith("and "):
            comma = " "
        if detail and comma == " ":
            text = _join(core, place, detail, wall) if detail.startswith("and ") else _join(core, detail, place, wall)
        else:
            text = _join(core, place, wall) + (f", {detail}" if detail else "")
        if len(text) <= DENSE_BYTES:
            return Said(text, True, bool(wall), True, True)
    raise AssertionError(f"no caption of {DENSE_BYTES} bytes for {core}")


def _still(rng: np.random.Generator, shot: Shot, seen: Sequence[WorldObject], dense: bool, attempt: int) -> str:
    where = _place(rng, shot) if dense or attempt < 8 else ""
    behind = _wall(rng, shot) if dense else ""
    what = _subject(rng, seen, terse=attempt >= 16) if seen else "nothing"
    if dense and shot.occluder is not None:
        what = f"{what} and a {shot.occluder.color} wall"
    if dense and rng.random() < 0.3:
        what = _one(rng, ("a picture of ", "an image of ")) + what
    return _join(what, where, behind)


def _image_captions(shot: Shot, rng: np.random.Generator, frame: int) -> Captions:
    """What can be seen in one frame: which things, how many, on what."""
    seen = [thing for thing in shot.objects if thing.visibility[frame] >= 0.4]
    tries = range(24)
    short = next(text for n in tries if len(text := _still(rng, shot, seen, False, n)) <= SHORT_BYTES)
    dense = next(text for n in tries if len(text := _still(rng, shot, seen, True, n)) <= DENSE_BYTES)
    return Captions(short, dense)


def shot_captions(shot: Shot, rng: np.random.Generator, *, image: bool = False, frame: int = 0) -> Captions:
    """Captions of one shot. A still (`image`, or a shot of one frame) gets static attributes only, those of `frame`."""
    if image or shot.frames == 1:
        return _image_captions(shot, rng, frame)
    return Captions(short_caption(shot, rng).text, dense_caption(shot, rng).text)


def captions(scene: Scene, rng: np.random.Generator, *, image: bool = False, frame: int = 0) -> Captions:
    """Captions of an uncut scene: `short` of at most 64 bytes, `dense` of at most 150, both ASCII.

    With `image`, they speak of what one frame shows. A scene with cuts has captions for each of its shots:
    `[shot_captions(shot, rng) for shot in scene.shots]`.
    """
    return shot_captions(scene.shot, rng, image=image, frame=frame)
