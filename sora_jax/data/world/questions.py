"""What a caption of the world says, as answers to fixed questions: what a text encoder can be taught to read by.

    "a small red ball bounces on a blue floor"   ->  object 1: red, ball, small, bounce, no direction; floor: blue; ...
    "a red ball to the right of a blue square"   ->  relation: right of; reference: blue; on the left: blue; ...

An answer is a number, 0 for what the caption leaves out. A mix of the first world alone is asked the first world's
questions (`QUESTIONS`), any other one `MORE_QUESTIONS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int32

from sora_jax.data.world.captions import Said, dense_caption, short_caption
from sora_jax.data.world.prompts import Truth, truth_of
from sora_jax.data.world.sampling import sample_scene
from sora_jax.data.world.scene import (
    COLORS,
    DIRECTIONS,
    FLOOR_COLORS,
    GROUNDS,
    KINDS,
    LIGHTS,
    MORE_KINDS,
    MOTIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Mix,
    Scene,
    Shot,
)

Questions = Mapping[str, tuple[str, ...]]  # each with its answers but the first, "nothing is said"

_STREAM = 0x52454144
_CUT_SHOTS = (9, 9)  # of a clip whose second shot may show the same character; one clip in five
_CUT_EVERY = 5
_OBJECT: Questions = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "motion": MOTIONS,
    "direction": (*DIRECTIONS, "clockwise", "counterclockwise"),
}
# The first two objects in the order they are named, then the scene.
QUESTIONS: Questions = {
    **{f"{name} {number}": answers for number in (1, 2) for name, answers in _OBJECT.items()},
    "kind": KINDS,
    "pan": ("left", "right"),
    "wall": tuple(GROUNDS),
    "floor": tuple(GROUNDS),
}
# Kinds that captions tell as the second world tells one of its own
_TOLD_AS = {"occluder": "wall", "pan": "travel"}
# Three objects, how they stand to one another, and what else the second world's captions speak of.
MORE_QUESTIONS: Questions = {
    **{f"{name} {number}": answers for number in (1, 2, 3) for name, answers in _OBJECT.items()},
    **{f"motion {number}": (*MOTIONS, "float") for number in (1, 2, 3)},
    "count": ("one", "two", "three"),
    "kind": (*(kind for kind in KINDS if kind not in _TOLD_AS), *MORE_KINDS),
    "relation": (*RELATIONS, "head-on", "from behind"),
    "reference": tuple(COLORS),  # what the first object is left of, behind, ...; the first of two that it is between
    "on the left": tuple(COLORS),
    "on top": tuple(COLORS),
    "in front": tuple(COLORS),
    "gravity": ("off",),
    "pan": ("left", "right", "up", "down"),
    "light": LIGHTS,
    "wall": tuple(GROUNDS),
    "floor": tuple(FLOOR_COLORS),
    "texture": TEXTURES,
    "character": ("same",),
}
# Relations that say which of two is on the left, on top or in front: the question, and the number of the object
_FOREMOST = {
    "left of": ("on the left", 0),
    "right of": ("on the left", 1),
    "above": ("on top", 0),
    "below": ("on top", 1),
    "in front of": ("in front", 0),
    "behind": ("in front", 1),
}


def questions_of(mix: Mix) -> Questions:
    """What captions of a mix are asked."""
    return QUESTIONS if mix.plain else MORE_QUESTIONS


def answer_counts(mix: Mix) -> tuple[int, ...]:
    """How many answers each question about captions of a mix has, "nothing is said" among them."""
    return tuple(1 + len(answers) for answers in questions_of(mix).values())


def answers(truth: Truth, asked: Questions = QUESTIONS, *, same: bool = False) -> Int32[np.ndarray, " questions"]:
    """The number of each answer, 1 + its index in `asked`; 0 where the truth says nothing.

    With `same` the caption says that its first object is the one of the shot before.

    Raises:
      ValueError: where the truth has an answer that is not among those of its question.
    """
    said = {
        "count": ("", "one", "two", "three")[len(truth.objects)],
        "kind": truth.kind if truth.kind in asked["kind"] else _TOLD_AS.get(truth.kind, truth.kind),
        "relation": truth.relation,
        "gravity": "" if truth.gravity else "off",
        "pan": truth.pan,
        "light": truth.light,
        "wall": truth.wall,
        "floor": truth.floor,
        "texture": truth.texture,
        "character": "same" if same else "",
    }
    for number, thing in enumerate(truth.objects, start=1):
        said |= {f"{name} {number}": getattr(thing, name) for name in _OBJECT}
    if truth.relation and truth.relation != "head-on":
        said["reference"] = truth.objects[1].color
    if truth.relation in _FOREMOST:
        question, foremost = _FOREMOST[truth.relation]
        said[question] = truth.objects[foremost].color
    return np.array([1 + known.index(said[name]) if said.get(name) else 0 for name, known in asked.items()], np.int32)


def captions_with_answers(
    seed: int, indices: Sequence[int], *, split: str = "train", dense: bool = True, mix: Mix | None = None
) -> list[tuple[str, Int32[np.ndarray, " questions"]]]:
    """For each scene a short caption, and with `dense` a long one, each with what it says.

    Where characters stay over cuts (`mix.same`) one scene in five is cut, and its captions are those of its second
    shot.
    """
    mix = mix or Mix()
    asked, made = questions_of(mix), []
    for index in indices:
        cut = _CUT_SHOTS if mix.same and index % _CUT_EVERY == _CUT_EVERY - 1 else None
        scene = sample_scene(seed, index, split=split, mix=mix, shots=cut)
        shot = scene.shots[-1]
        told = _say(scene, shot, dense)
        made += [(said.text, answers(truth_of(shot, said), asked, same=said.same)) for said in told]
    return made


def _say(scene: Scene, shot: Shot, dense: bool) -> list[Said]:
    rng = np.random.default_rng((_STREAM, scene.seed, scene.index))
    return [short_caption(shot, rng), *([dense_caption(shot, rng)] if dense else [])]
