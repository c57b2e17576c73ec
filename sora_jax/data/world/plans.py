"""What happens in a shot, before anything has a place: which objects, doing what, in which setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sora_jax.data.world.scene import COLORS, DIRECTIONS, MOTIONS, SHAPES, SIZES, Mix, is_heldout
from sora_jax.errors import UserError

_ON_FLOOR = ("slide", "bounce", "fall", "rest", "enter", "exit")  # motions that make sense on a floor
_APART = ("slide", "bounce", "fall", "grow", "shrink", "rest")  # motions that share a frame with another one


class Spec(NamedTuple):
    """What an object is to be, before it is given a place."""

    shape: str
    color: str
    size: str
    motion: str
    direction: str = ""

    @property
    def combination(self) -> tuple[str, str, str]:
        return self.color, self.shape, f"{self.motion} {self.direction}" if self.motion == "slide" else self.motion


class Plan(NamedTuple):
    """What a shot is to be."""

    kind: str
    floor: bool
    specs: tuple[Spec, ...]
    orbit_pair: str = ""  # "opposite": both circle the middle; "around": the first circles the second


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


def draw_plan(rng: np.random.Generator, kind: str, mix: Mix, moving: bool) -> Plan:
    """Draws what happens in a shot of a kind; without regard to the split, which the caller checks."""
    floor = bool(rng.random() < mix.floor)
    motions = MOTIONS if moving else ("rest",)

    def spec(name: str, direction: str, shapes: Sequence[str] = SHAPES, size: str = "") -> Spec:
        size = size or choose(rng, tuple(SIZES), mix)
        return Spec(pick(rng, shapes), pick(rng, tuple(COLORS)), size, name, direction)

    if kind == "single":
        name = choose(rng, motions, mix)
        floor = name in ("bounce", "fall") or (floor and name in _ON_FLOOR)
        return Plan(kind, floor, (spec(name, _direction(rng, name, floor)),))
    if kind == "pan":
        return Plan(kind, False, (spec("rest", ""),))
    if kind == "occluder":
        return Plan(kind, floor, (spec("slide", pick(rng, ("left", "right")), size="small"),))
    if kind == "collision":
        direction = pick(rng, ("left", "right"))
        # On a floor both have one size, so that they meet head-on; two of medium size would have no room to move
        sizes = ("small", "small") if floor else _pick_pair(rng)
        first = spec("slide", direction, ("ball", "square"), sizes[0])
        second = spec("rest", "", ("ball", "square"), sizes[1])
        return Plan(kind, floor, (first, second))

    how = choose(rng, ("twins", "together", "apart"), mix)
    small = Mix(small=mix.small + mix.large, medium=mix.medium, large=0.0)  # two large ones would not fit
    sizes = [choose(rng, ("small", "medium"), small) for _ in range(2)]
    if how == "apart" and moving:
        first_name = choose(rng, _APART, mix)
        floor = first_name in ("bounce", "fall") or (floor and first_name in _ON_FLOOR)
        second_name = choose(rng, [m for m in _APART if m != first_name and (m in _ON_FLOOR or not floor)
                                    and (floor or m not in ("bounce", "fall"))], mix)  # fmt: skip
        names = [first_name, second_name]
        directions = [_direction(rng, name, floor) for name in names]
    else:
        name = choose(rng, [m for m in motions if m not in ("enter", "exit")], mix)
        floor = name in ("bounce", "fall") or (floor and name in _ON_FLOOR)
        names, directions = [name] * 2, [_direction(rng, name, floor)] * 2
    first = spec(names[0], directions[0], size=sizes[0])
    second = first if how == "twins" else spec(names[1], directions[1], size=sizes[1])
    orbit_pair = ""
    if names == ["orbit", "orbit"]:
        orbit_pair = "opposite" if how == "twins" or rng.random() < 0.4 else "around"
        if orbit_pair == "around":
            second = second._replace(motion="rest", direction="")
    return Plan(kind, floor, (first, second), orbit_pair)


def allowed(plan: Plan, split: str) -> bool:
    """Training never sees a held-out combination, `heldout` always shows one, two kinds never share a colour."""
    first, *others = plan.specs
    if any(other.color == first.color and other != first for other in others):
        return False
    if split == "all":
        return True
    return any(is_heldout(spec.combination) for spec in plan.specs) == (split == "heldout")
