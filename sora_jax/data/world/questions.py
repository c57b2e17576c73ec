"""What a caption of the world says, as answers to fixed questions: what a text encoder can be taught to read by.

    "a small red ball bounces on a blue floor"  ->  object 1: red, ball, small, bounce, no direction; floor: blue; ...

An answer is a number, 0 for what the caption leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from sora_jax.data.world.captions import Said, dense_caption, short_caption
from sora_jax.data.world.prompts import Truth, truth_of
from sora_jax.data.world.sampling import sample_scenes
from sora_jax.data.world.scene import COLORS, DIRECTIONS, GROUNDS, KINDS, MOTIONS, SHAPES, SIZES, Scene

_STREAM = 0x52454144
_OBJECT: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "motion": MOTIONS,
    "direction": (*DIRECTIONS, "clockwise", "counterclockwise"),
}
# The first two objects in the order they are named, then the scene.
QUESTIONS: dict[str, tuple[str, ...]] = {
    **{f"{name} {number}": answers for number in (1, 2) for name, answers in _OBJECT.items()},
    "kind": KINDS,
    "pan": ("left", "right"),
    "wall": tuple(GROUNDS),
    "floor": tuple(GROUNDS),
}
ANSWER_COUNTS = tuple(1 + len(answers) for answers in QUESTIONS.values())


def answers(truth: Truth) -> Int32[np.ndarray, " questions"]:
    """The number of each answer, 1 + its index in `QUESTIONS`; 0 where the truth says nothing."""
    said: dict[str, str] = {"kind": truth.kind, "pan": truth.pan, "wall": truth.wall, "floor": truth.floor}
    for number, thing in enumerate(truth.objects[:2], start=1):
        said |= {f"{name} {number}": getattr(thing, name) for name in _OBJECT}
    return np.array(
        [1 + known.index(said[name]) if said.get(name) else 0 for name, known in QUESTIONS.items()], np.int32
    )


def captions_with_answers(
    seed: int, indices: Sequence[int], *, split: str = "train", dense: bool = True
) -> list[tuple[str, Int32[np.ndarray, " questions"]]]:
    """For each scene a short caption, and with `dense` a long one, each with what it says."""
    made = []
    for scene in sample_scenes(seed, indices, split=split):
        rng = np.random.default_rng((_STREAM, scene.seed, scene.index))
        made += [_answered(scene, said) for said in _say(scene, rng, dense)]
    return made


def _say(scene: Scene, rng: np.random.Generator, dense: bool) -> list[Said]:
    return [short_caption(scene.shot, rng), *([dense_caption(scene.shot, rng)] if dense else [])]


def _answered(scene: Scene, said: Said) -> tuple[str, np.ndarray]:
    return said.text, answers(truth_of(scene.shot, said))
