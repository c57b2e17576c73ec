"""The suite of stories: a perfect teller gets all of it, and each way of telling it wrong costs what it should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from sora_jax.data import world
from sora_jax.data.world import Mix, Scene, Story
from sora_jax.errors import UserError
from sora_jax.evaluation.stories import SAME, SHOTS, evaluate_stories

N, SEED = 12, 5


def teller(tell: Callable[[Scene], np.ndarray]) -> Callable[[list[Story], list[int]], np.ndarray]:
    """A stand-in that knows the scenes which the suite's stories were taken from."""
    scenes = world.sample_scenes(SEED, N, split="heldout", mix=replace(Mix(), same=SAME), shots=SHOTS)
    return lambda batch, seeds: np.stack([tell(scenes[seed - SEED]) for seed in seeds])


def told(tell: Callable[[Scene], np.ndarray]) -> dict[str, dict[str, float]]:
    return evaluate_stories(teller(tell), N, SEED, batch_size=5)["metrics"]


def true(scene: Scene) -> np.ndarray:
    return world.render([scene])[0]


def without_cut(scene: Scene) -> np.ndarray:
    """Its first shot, and then that backwards."""
    first = true(scene)[: SHOTS[0]]
    return np.concatenate([first, first[::-1]])


def recast(scene: Scene) -> np.ndarray:
    """In the second shot the first object has another colour."""
    second = scene.shots[1]
    taken = {thing.color for shot in scene.shots for thing in shot.objects}
    taken |= {second.background.wall, second.background.floor}
    color = next(name for name in world.COLORS if name not in taken)
    objects = (replace(second.objects[0], color=color), *second.objects[1:])
    return true(replace(scene, shots=(scene.shots[0], replace(second, objects=objects))))


def test_the_truth_is_told_right():
    metrics = told(true)
    assert next(iter(metrics)) == "cut"
    assert all(metric["value"] >= 0.9 for metric in metrics.values()), metrics
    assert metrics["cut"]["n"] == metrics["all"]["n"] == N
    assert metrics["shot.color"]["n"] == 2 * N
    assert 0 < metrics["same"]["n"] < N


def test_a_clip_without_cuts_has_none():
    metrics = told(without_cut)
    assert metrics["cut"]["value"] == 0
    assert metrics["shot.all"]["value"] < 0.7  # the first shot is right, unless it looks the same backwards
    assert metrics["all"]["value"] == 0


def test_another_character_is_noticed():
    metrics = told(recast)
    assert metrics["cut"]["value"] >= 0.9
    assert metrics["same"]["value"] == 0
    assert metrics["shot.color"]["value"] == pytest.approx(0.5, abs=0.05)  # the second of two


def test_stories_that_cannot_be_judged():
    for shots in ((9,), (9, 5)):
        with pytest.raises(UserError, match="two shots or more, of 9 frames or more"):
            evaluate_stories(teller(true), 1, shots=shots)
    with pytest.raises(UserError, match="at least one clip"):
        evaluate_stories(teller(true), 0)
