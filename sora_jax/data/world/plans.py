"""What happens in a shot, before anything has a place: which objects, doing what, in which setting."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from sora_jax.data.world.scene import COLORS, DIRECTIONS, MOTIONS, SHAPES, SIZES, Mix, is_heldout
from sora_jax.errors import UserError

_ON_FLOOR = ("slide", "bounce", "fall", "rest", "enter", "exit")  # motions that make sense on a floor
_DROPS = ("bounce", "fall")  # and these need one
_APART = ("slide", "bounce", "fall", "grow", "shrink", "rest")  # motions that share a frame with another one


class Spec(NamedTuple):
    """What an object is to be, before it is given a place."""

    shape: str
    color: str
    size: str
    motion: str
    direction: str = ""
    radius: float = 0.0  # units; 0: any of its size

    @property
    def combination(self) -> tuple[str, str, str]:
        return self.color, self.shape, f"{self.motion} {self.direction}" if self.motion == "slide" else self.motion


class Plan(NamedTuple):
    """What a shot is to be."""

    kind: str
    floor: bool
    specs: tuple[Spec, ...]
    orbit_pair: str = ""  # "opposite": both circle the middle; "around": the first circles the second
    relation: str = ""  # of RELATIONS
    camera: str = ""  # which way it goes: "left", "right", "up" or "down"


def choose(rng: np.random.Generator, names: Sequence[str], mix: Mix) -> str:
    """One of `names` with the weights that `mix` gives them."""
    weights = np.array([getattr(mix, name) for name in names], np.float64)
    if not weights.sum() > 0:
        raise UserError(f"the mix gives none of {', '.join(names)} a weight > 0")
    return names[int(np.searchsorted(np.cumsum(weights), rng.random() * weights.sum(), side="right"))]


def pick(rng: np.random.Generator, names: Sequence[str]) -> str:
    return names[int(rng.integers(len(names)))]


def _pick_pair(rng: np.random.Generator) -> tuple[str, str]:
    return (("small", "small"), ("small", "small"), ("small", "medium"), ("medium", "small"))[int(rng.integers(4))]


def _direction(rng: np.random.Generator, name: str, floor: bool) -> str:
    """A direction that suits the motion and the setting."""
    if name == "orbit":
        return pick(rng, ("clockwise", "counterclockwise"))
    if name == "bounce":
        return pick(rng, ("left", "right")) if rng.random() < 0.3 else ""
    if name in ("slide", "enter", "exit") and floor:
        return pick(rng, ("left", "right"))
    if name in ("enter", "exit"):
        return pick(rng, ("left", "right", "up", "down"))
    return pick(rng, tuple(DIRECTIONS)) if name == "slide" else ""


def _spec(rng: np.random.Generator, name: str, direction: str, size: str, shapes: tuple[str, ...] = SHAPES) -> Spec:
    return Spec(pick(rng, shapes), pick(rng, tuple(COLORS)), size, name, direction)


def draw_plan(rng: np.random.Generator, kind: str, mix: Mix, moving: bool) -> Plan:
    """Draws what happens in a shot of a kind; without regard to the split, which the caller checks."""
    floor = bool(rng.random() < mix.floor)
    if kind == "pair":
        return _draw_pair(rng, floor, mix, moving)
    if kind == "single":
        name = choose(rng, MOTIONS if moving else ("rest",), mix)
        floor = name in _DROPS or (floor and name in _ON_FLOOR)
        size = choose(rng, tuple(SIZES), mix)
        return Plan(kind, floor, (_spec(rng, name, _direction(rng, name, floor), size),))
    if kind == "pan":
        return Plan(kind, False, (_spec(rng, "rest", "", choose(rng, tuple(SIZES), mix)),))
    direction = pick(rng, ("left", "right"))
    if kind == "occluder":
        return Plan(kind, floor, (_spec(rng, "slide", direction, "small"),))
    # A collision. On a floor both have one size, so that they meet head-on; two of medium size have no room to move
    sizes = ("small", "small") if floor else _pick_pair(rng)
    first = _spec(rng, "slide", direction, sizes[0], ("ball", "square"))
    second = _spec(rng, "rest", "", sizes[1], ("ball", "square"))
    return Plan(kind, floor, (first, second))


def _draw_pair(rng: np.random.Generator, floor: bool, mix: Mix, moving: bool) -> Plan:
    """Two objects: twins, or two kinds that move together, or two kinds that each do their own thing."""
    how = choose(rng, ("twins", "together", "apart"), mix)
    small = Mix(small=mix.small + mix.large, medium=mix.medium, large=0.0)  # two large ones would not fit
    sizes = [choose(rng, ("small", "medium"), small) for _ in range(2)]
    motions = [name for name in MOTIONS if name not in ("enter", "exit")] if moving else ["rest"]
    name = choose(rng, motions, mix)
    floor = name in _DROPS or (floor and name in _ON_FLOOR)
    names, directions = [name] * 2, [_direction(rng, name, floor)] * 2
    others = [
        other
        for other in _APART
        if other != name and getattr(mix, other) > 0 and (other in _ON_FLOOR if floor else other not in _DROPS)
    ]
    if how == "apart" and name in _APART and moving and others:
        names[1] = choose(rng, others, mix)
        directions[1] = _direction(rng, names[1], floor)
    first = _spec(rng, names[0], directions[0], sizes[0])
    second = first if how == "twins" else _spec(rng, names[1], directions[1], sizes[1])
    orbit_pair = ""
    if names == ["orbit", "orbit"]:
        orbit_pair = "opposite" if how == "twins" or rng.random() < 0.4 else "around"
        if orbit_pair == "around":
            second = second._replace(motion="rest", direction="")
    return Plan("pair", floor, (first, second), orbit_pair)


def allowed(plan: Plan, split: str) -> bool:
    """Training never sees a held-out combination, `heldout` always shows one, two kinds never share a colour."""
    if any(one.color == other.color and one != other for one, other in combinations(plan.specs, 2)):
        return False
    if split == "all":
        return True
    return any(is_heldout(spec.combination) for spec in plan.specs) == (split == "heldout")
