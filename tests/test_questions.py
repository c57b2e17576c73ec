"""What captions say, against the words that stand in them."""

from __future__ import annotations

import re

import numpy as np

from sora_jax.data.world.prompts import ObjectTruth, Truth
from sora_jax.data.world.questions import ANSWER_COUNTS, QUESTIONS, answers, captions_with_answers
from sora_jax.data.world.scene import COLORS, SHAPES


def said(numbers: np.ndarray) -> dict[str, str]:
    return {name: known[n - 1] for (name, known), n in zip(QUESTIONS.items(), numbers, strict=True) if n}


def test_answers_of_a_truth_by_hand():
    truth = Truth(
        (ObjectTruth("red", "ball", "small", "slide", "up-left"), ObjectTruth("blue", "star", motion="rest")),
        kind="pair",
        floor="gray",
    )
    assert said(answers(truth)) == {
        "color 1": "red", "shape 1": "ball", "size 1": "small", "motion 1": "slide", "direction 1": "up-left",
        "color 2": "blue", "shape 2": "star", "motion 2": "rest", "kind": "pair", "floor": "gray",
    }  # fmt: skip
    assert tuple(len(known) + 1 for known in QUESTIONS.values()) == ANSWER_COUNTS


def test_every_answer_stands_in_its_caption():
    seen: dict[str, set[str]] = {name: set() for name in QUESTIONS}
    for text, numbers in captions_with_answers(0, range(300)):
        told = said(numbers)
        for name, answer in told.items():
            seen[name].add(answer)
        words = re.findall(r"[a-z]+", text)
        named = [word for word in words if word in COLORS and f"{word} background" not in text]
        assert told["color 1"] in named
        assert told["shape 1"] in text or (told["shape 1"] == "ball" and "circle" in text)
        if "color 2" in told and told["color 2"] != told["color 1"]:
            assert text.index(told["color 1"]) < text.rindex(told["color 2"])
        for ground in ("wall", "floor"):
            assert ground not in told or told[ground] in words
        if "floor" not in told and " floor" in text:
            raise AssertionError(f"{text} speaks of a floor, and its answers do not")
    assert seen["color 1"] == set(COLORS)
    assert seen["shape 1"] == set(SHAPES)
    assert {"small", "large"} <= seen["size 1"]


def test_captions_are_those_of_their_scene_whatever_comes_with_it():
    together = captions_with_answers(3, [5, 6, 7])
    alone = captions_with_answers(3, [6])
    assert [text for text, _ in together[2:4]] == [text for text, _ in alone]
    np.testing.assert_array_equal(together[2][1], alone[0][1])
    assert captions_with_answers(3, [6], dense=False)[0][0] == alone[0][0]
