"""What is said of the second world's shots: how things stand to one another, what they meet, and where the camera goes.

    core = subject relation object [, both moving so]        "a red ball behind a large blue square, both sliding left"

Every clause is true of the shot that it is made from; a test holds each against the scene's exact state.
"""

from __future__ import annotations

import numpy as np

from sora_jax.data.world.phrases import TOWARDS, article, join, noun, pan_direction, predicate, subject
from sora_jax.data.world.plans import pick
from sora_jax.data.world.scene import Shot

_RELATION: dict[str, tuple[str, ...]] = {
    "left of": ("to the left of", "left of", "on the left of"),
    "right of": ("to the right of", "right of", "on the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
    "between": ("between",),
    "in front of": ("in front of",),
    "behind": ("behind",),
}
_WEIGHTLESS = ("without gravity", "without gravity", "in zero gravity", "weightlessly")


def unsaid_direction(shot: Shot) -> bool:
    """Whether no caption gives the directions of its objects: two that float go two ways."""
    return shot.kind == "floating" and len(shot.objects) > 1


def still_clause(rng: np.random.Generator, shot: Shot, terse: bool = False) -> str:
    """The words "a red ball to the left of a blue square": true of every frame of a shot with a relation."""
    assert shot.relation is not None
    name, first, others = shot.relation
    things = " and ".join(article(noun(rng, shot.objects[other], terse)) for other in others)
    return f"{article(noun(rng, shot.objects[first], terse))} {pick(rng, _RELATION[name])} {things}"


def _standing(rng: np.random.Generator, shot: Shot, direction: bool, terse: bool) -> str:
    """Objects that keep a relation, at rest or moving as one."""
    still = still_clause(rng, shot, terse)
    first = shot.objects[0]
    if first.motion == "rest":
        return still
    way = (first.direction if terse else pick(rng, TOWARDS[first.direction])) if direction else ""
    return f"{still}, {join('both' if len(shot.objects) == 2 else 'all', pick(rng, ('sliding', 'moving')), way)}"


def _passing(rng: np.random.Generator, shot: Shot, direction: bool, terse: bool) -> str:
    assert shot.relation is not None
    first, second = (article(noun(rng, thing, terse)) for thing in shot.objects)
    way = f" to the {shot.objects[0].direction}" if direction else ""
    return f"{first} {pick(rng, ('passes', 'slides', 'moves'))}{way} {shot.relation.name} {second}"


def _meeting(rng: np.random.Generator, shot: Shot, direction: bool, terse: bool) -> str:
    first, second = (article(noun(rng, thing, terse)) for thing in shot.objects)
    ways = [thing.direction for thing in shot.objects]
    if ways[0] != ways[1]:
        if direction:
            return f"{first} moving {ways[0]} {pick(rng, ('hits', 'meets'))} {second} moving {ways[1]}"
        how = ("slide into each other", "collide head-on", "meet head-on")
        return f"{first} and {second} {pick(rng, how)}"
    way = f", both moving {ways[0]}" if direction else ""
    how = ("catches up with and hits", "hits", "bumps into")
    number = int(rng.integers(3))
    behind = "" if number == 0 else " from behind"
    return f"{first} {how[number]} {second}{behind}{way}"


def _wall(rng: np.random.Generator, shot: Shot, direction: bool, terse: bool) -> str:
    things = shot.objects
    bar = pick(rng, ("wall", "wall", "bar")) if shot.background.kind != "floor" else "wall"
    if len(things) == 1 or things[0].direction == things[1].direction:
        verb = pick(rng, ("passes", "slides", "moves") if len(things) == 1 else ("pass", "slide", "move"))
        way = f" to the {things[0].direction}" if direction else ""
        return f"{subject(rng, things, terse)} {verb}{way} behind a {bar}"
    first, second = (article(noun(rng, thing, terse)) for thing in things)
    if direction:
        return f"{first} passes {things[0].direction} and {second} {things[1].direction} behind a {bar}"
    return f"{first} and {second} {pick(rng, ('pass', 'cross'))} behind a {bar}"


def _floating(rng: np.random.Generator, shot: Shot, direction: bool, terse: bool) -> str:
    things = shot.objects
    floats = predicate(rng, things[0], len(things) > 1, False, False, "plain", terse)
    way = pick(rng, TOWARDS[things[0].direction][:2]) if direction and len(things) == 1 else ""
    return join(subject(rng, things, terse), floats, way, pick(rng, _WEIGHTLESS))


def _travel(rng: np.random.Generator, shot: Shot, direction: bool, terse: bool) -> str:
    way = pan_direction(shot)
    pans = pick(rng, ("pans", "pans", "moves")) if way in ("left", "right") else pick(rng, ("pans", "tilts", "moves"))
    return f"the camera {pans} {way} past {subject(rng, shot.objects, terse)}"


_CORES = {
    "relation": _standing,
    "depth": _standing,
    "passing": _passing,
    "meeting": _meeting,
    "wall": _wall,
    "floating": _floating,
    "travel": _travel,
}
CLAUSES = tuple(_CORES)  # the kinds of shot that have a clause of their own


def clause(rng: np.random.Generator, shot: Shot, direction: bool, terse: bool = False) -> str:
    """Who does what in a shot of `CLAUSES`, without the place; `terse` in the fewest words."""
    return _CORES[shot.kind](rng, shot, direction, terse)


def clause_detail(rng: np.random.Generator, shot: Shot) -> str:
    """What a dense caption adds to it, true by construction; "" for nothing."""
    first, last = shot.objects[0], shot.objects[-1]
    name = f"the {last.color} {last.shape}"
    equal = first.radii[0] == last.radii[0]
    match shot.kind:
        case "passing" if shot.order[0] == 0:
            return pick(rng, ("and comes out on the other side", f"partly hidden by {name} for a moment"))
        case "passing":
            return pick(rng, (f"hiding a part of {name} for a moment", ""))
        case "meeting" if first.direction != last.direction:
            # of equal masses each goes back as fast as the other one came
            return pick(rng, ("they bounce off each other", "and they bounce apart")) if equal else ""
        case "meeting":
            return f"{name} moves off faster"
        case "wall":
            return "and comes out on the other side" if len(shot.objects) == 1 else "both come out on the other side"
        case "floating":
            bounces = ("bouncing off without losing speed",) if shot.events else ()
            return pick(rng, ("in straight lines", *bounces))
        case "travel":
            return pick(rng, ("nothing else moves", ""))
    return ""
