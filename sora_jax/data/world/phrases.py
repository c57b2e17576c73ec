"""What things, motions and places are called: the words that every caption is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sora_jax.data.world.plans import pick
from sora_jax.data.world.scene import Shot, WorldObject


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
TOWARDS = {
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
VERBS: dict[str, tuple[Verb, ...]] = {
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
    "float": (
        Verb("floats", "float", "floating"),
        Verb("floats", "float", "floating"),
        Verb("drifts", "drift", "drifting"),
    ),
    "exit": (
        Verb("leaves", "leave", "leaving"),
        Verb("slides out", "slide out", "sliding out"),
        Verb("exits", "exit", "exiting"),
    ),
}
_ROLL = Verb("rolls", "roll", "rolling")


def join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def noun(rng: np.random.Generator, thing: WorldObject, terse: bool = False) -> str:
    """The words "small red ball", without an article; `terse` leaves the size out, as does a size that changes."""
    changes = thing.motion in ("grow", "shrink")
    word = "" if changes or terse else pick(rng, _SIZE_WORDS[thing.size])
    return join(word, thing.color, pick(rng, _SHAPE_WORDS[thing.shape]))


def twins(objects: Sequence[WorldObject]) -> bool:
    """Whether two or three objects are alike in all that a caption says."""
    return len(objects) > 1 and len({(o.shape, o.color, o.size, o.motion) for o in objects}) == 1


def subject(rng: np.random.Generator, objects: Sequence[WorldObject], terse: bool = False) -> str:
    if twins(objects):
        return f"{('two', 'three')[len(objects) - 2]} {noun(rng, objects[0], terse)}s"
    *most, last = [article(noun(rng, thing, terse)) for thing in objects]
    return f"{', '.join(most)} and {last}" if most else last


def predicate(
    rng: np.random.Generator,
    thing: WorldObject,
    plural: bool,
    floor: bool,
    direction: bool,
    form: str,
    terse: bool = False,
) -> str:
    """The words "slides to the right"; `form` is "plain", "ing" or "is" (is sliding)."""
    verbs = VERBS[thing.motion]
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
        ways = TOWARDS[thing.direction]
        how = thing.direction if terse else pick(rng, ways if thing.motion == "slide" else ways[:3])
    elif thing.motion == "orbit" and direction:
        how = thing.direction
    elif thing.motion == "enter":
        how = f"from the {_OPPOSITE[thing.direction]}"
    elif thing.motion == "exit":
        side = _SIDE[thing.direction]
        on = "to" if side in ("left", "right") and verb.one != "exits" else "at"
        how = f"{on} the {side}"
    return join(said, how)


def place_phrase(rng: np.random.Generator, shot: Shot, onto: bool = False) -> str:
    ground = shot.background
    if ground.kind == "floor":
        texture = f"{ground.texture} " if ground.texture and ground.texture != ground.floor else ""
        return f"{'onto' if onto and rng.random() < 0.5 else 'on'} {article(texture + ground.floor)} floor"
    preposition = pick(rng, ("on", "on", "over", "against"))
    stripes = "striped " if ground.striped else ""
    if ground.kind == "gradient":
        return pick(
            rng,
            (
                f"{preposition} a {ground.wall} to {ground.floor} background",
                f"{preposition} a background fading from {ground.wall} to {ground.floor}",
            ),
        )
    return f"{preposition} {article(stripes + ground.wall)} background"


def wall_phrase(rng: np.random.Generator, shot: Shot) -> str:
    """The wall behind a floor, for dense captions."""
    if shot.background.kind != "floor":
        return ""
    stripes = "striped " if shot.background.striped else ""
    wall = article(stripes + shot.background.wall) + " wall"
    return pick(rng, (f"in front of {wall}", f"in front of {wall}", f"with {wall} behind"))


_LIGHTS: dict[str, tuple[str, ...]] = {
    "dim": ("in dim light", "in dim light", "in half-darkness"),
    "warm": ("in warm light", "in warm light", "in golden light"),
    "cool": ("in cool light", "in cold light"),
    "left": ("lit from the left", "with light from the left"),
    "right": ("lit from the right", "with light from the right"),
}


def light_phrase(rng: np.random.Generator, shot: Shot) -> str:
    """The words "in dim light", or none in plain daylight."""
    return pick(rng, _LIGHTS[shot.light]) if shot.light else ""


def pan_direction(shot: Shot) -> str:
    """Which way the camera goes: "left", "right", "up" or "down"."""
    if shot.tilt is not None:
        return "down" if shot.tilt[-1] > shot.tilt[0] else "up"
    return "right" if shot.pan[-1] > shot.pan[0] else "left"
