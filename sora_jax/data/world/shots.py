"""A character who stays over the cuts of a clip: one shape, colour and size, elsewhere and doing something else."""

from __future__ import annotations

import numpy as np

from sora_jax.data.world.plans import Plan, Spec, choose, pick
from sora_jax.data.world.scene import COLORS, SHAPES, SIZES, Mix, Shot

CHARACTER_KINDS = ("single", "pan", "floating", "travel")  # of shot in which the first object has room for any size
_CHANGES = ("grow", "shrink")  # what changes its size is nobody to recognise


def draw_character(rng: np.random.Generator, mix: Mix) -> Spec:
    """Who it is; what it does is left open. Its radius is drawn once, in units."""
    size = choose(rng, ("small", "medium"), mix)
    low, high = SIZES[size]
    return Spec(pick(rng, SHAPES), pick(rng, tuple(COLORS)), size, "rest", radius=float(rng.uniform(low, high)))


def played(plan: Plan, character: Spec) -> Plan:
    """The plan with the character as its first object."""
    first, *others = plan.specs
    return plan._replace(specs=(character._replace(motion=first.motion, direction=first.direction), *others))


def recognisable(plan: Plan) -> bool:
    """Whether the character keeps its size, and no other object has its colour."""
    first, *others = plan.specs
    return first.motion not in _CHANGES and all(one.color != first.color for one in others)


def differs(plan: Plan, before: Shot | None) -> bool:
    """Whether the character does something else than in the shot before; after a still it may rest again."""
    if before is None:
        return True
    first, was = plan.specs[0], before.objects[0]
    still = plan.kind == "single" and first.motion == "rest" and before.frames == 1
    return still or (plan.kind, first.motion, first.direction) != (before.kind, was.motion, was.direction)


def character_kinds(mix: Mix, before: Shot | None, moving: bool) -> list[str]:
    """The kinds of shot that a character may play in; the camera does not go by twice in a row."""
    if not moving:
        return ["single"]
    twice = before.kind if before is not None and before.kind in ("pan", "travel") else ""
    return [kind for kind in CHARACTER_KINDS if getattr(mix, kind) > 0 and kind != twice] or ["single"]
