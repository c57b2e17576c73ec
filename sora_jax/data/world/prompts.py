"""Prompts with the truth that a checker must find, and the known words of the world."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sora_jax.data.world.captions import Said, short_caption
from sora_jax.data.world.phrases import pan_direction
from sora_jax.data.world.sampling import sample_scene
from sora_jax.data.world.scene import Mix, Shot, WorldObject

_PROMPT_STREAM = 0x50524D50


@dataclass(frozen=True)
class ObjectTruth:
    """What a prompt says about one object; "" where it says nothing."""

    color: str
    shape: str
    size: str = ""
    motion: str = ""
    direction: str = ""


@dataclass(frozen=True)
class Truth:
    """What a clip made from a prompt must show; "" where the prompt says nothing."""

    objects: tuple[ObjectTruth, ...]
    kind: str = "single"  # of KINDS and MORE_KINDS
    pan: str = ""  # which way the camera goes
    wall: str = ""  # colour of the background, or of the wall behind a floor
    floor: str = ""  # colour of the floor, or of the bottom of a gradient
    relation: str = ""  # of the first object to the others, of RELATIONS; "head-on" or "from behind" where two meet
    gravity: bool = True  # False: nothing pulls down, and the prompt says so
    light: str = ""  # of LIGHTS
    texture: str = ""  # of the floor


@dataclass(frozen=True)
class Prompt:
    """A text, and what a clip made from it must show."""

    text: str
    truth: Truth


def _object_truth(thing: WorldObject, said: Said | None) -> ObjectTruth:
    direction = said is None or said.direction or thing.motion in ("enter", "exit")
    size = (said is None or said.size) and thing.motion not in ("grow", "shrink")
    return ObjectTruth(
        thing.color, thing.shape, thing.size if size else "", thing.motion, thing.direction if direction else ""
    )


def truth_of(shot: Shot, said: Said | None = None) -> Truth:
    """The truth of a shot; with `said`, only as much of it as that caption speaks of."""
    ground = shot.background
    wall, floor = ground.wall, ground.floor
    if said is not None:
        floor = floor if said.place else ""
        wall = wall if (said.wall if ground.kind == "floor" else said.place) else ""
    objects = tuple(_object_truth(thing, said) for thing in shot.objects)
    relation = shot.relation.name if shot.relation else ""
    if shot.kind == "meeting":
        relation = "from behind" if shot.objects[0].direction == shot.objects[1].direction else "head-on"
    return Truth(
        objects,
        shot.kind,
        pan_direction(shot) if shot.kind in ("pan", "travel") else "",
        wall,
        floor,
        relation,
        shot.gravity,
        shot.light if said is None or said.light else "",
        ground.texture if floor else "",
    )


def prompts(
    n: int, seed: int, *, split: str, frames: int = 17, height: int = 64, width: int = 64, mix: Mix | None = None
) -> list[Prompt]:
    """`n` short prompts of a split, drawn like the captions of training, each with what it asks for."""
    made = []
    for index in range(n):
        scene = sample_scene(seed, index, split=split, frames=frames, height=height, width=width, mix=mix)
        said = short_caption(scene.shot, np.random.default_rng((_PROMPT_STREAM, seed, index)))
        made.append(Prompt(said.text, truth_of(scene.shot, said)))
    return made


def heldout_prompts(
    n: int, seed: int, *, frames: int = 17, height: int = 64, width: int = 64, mix: Mix | None = None
) -> list[Prompt]:
    """`n` prompts that each name a combination of colour, shape and motion that training never showed."""
    return prompts(n, seed, split="heldout", frames=frames, height=height, width=width, mix=mix)


@dataclass(frozen=True)
class Story:
    """A prompt for each shot of a clip with cuts, and what each of them must show."""

    lengths: tuple[int, ...]  # frames
    prompts: tuple[Prompt, ...]
    same: bool  # the first object of every shot is one character


def stories(
    n: int,
    seed: int,
    *,
    split: str = "heldout",
    shots: tuple[int, ...] = (9, 9),
    height: int = 64,
    width: int = 64,
    mix: Mix | None = None,
) -> list[Story]:
    """`n` clips of several shots to ask for; `mix.same` is the share of them in which a character stays."""
    made = []
    for index in range(n):
        scene = sample_scene(seed, index, split=split, height=height, width=width, mix=mix, shots=shots)
        rng = np.random.default_rng((_PROMPT_STREAM, seed, index))
        said = [short_caption(shot, rng) for shot in scene.shots]
        prompts = tuple(Prompt(one.text, truth_of(shot, one)) for shot, one in zip(scene.shots, said, strict=True))
        made.append(Story(tuple(shots), prompts, all(shot.same for shot in scene.shots[1:])))
    return made
