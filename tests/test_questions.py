"""What captions say, against the words that stand in them."""

from __future__ import annotations

import re

import numpy as np

from sora_jax.config import load_config
from sora_jax.data.world.prompts import ObjectTruth, Truth
from sora_jax.data.world.questions import (
    MORE_QUESTIONS,
    QUESTIONS,
    Questions,
    answer_counts,
    answers,
    captions_with_answers,
    questions_of,
)
from sora_jax.data.world.scene import COLORS, LIGHTS, MORE_KINDS, RELATIONS, SHAPES, Mix

WORLD_2 = load_config("world_2_text").data.mix


def said(numbers: np.ndarray, asked: Questions = QUESTIONS) -> dict[str, str]:
    return {name: known[n - 1] for (name, known), n in zip(asked.items(), numbers, strict=True) if n}


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
    assert answer_counts(Mix()) == (9, 5, 4, 10, 11) * 2 + (6, 3, 9, 9)


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


# ---- the second world: what a reader of the text alone, with a few patterns, finds in it ----

SIZED = {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large"}
NOUN = rf"((?:{'|'.join(SIZED)}) )?({'|'.join(COLORS)}) (ball|circle|{'|'.join(SHAPES)})"
THING = rf"(an?|the same|two|three) {NOUN}s?\b"
RELATED: dict[str, str] = {
    "between": r"between",
    "left of": r"left of",
    "right of": r"right of",
    "above": rf"above|over {THING}",
    "below": r"below|under",
    "in front of": rf"in front of {THING}",
    "behind": rf"(?<!from )behind {THING}",
    "head-on": r"head-on|into each other|moving \w+ (?:hits|meets)",
    "from behind": r"from behind|catches up",
}
LIT: dict[str, str] = {
    "dim": "in dim light|half-darkness",
    "warm": "warm light|golden light",
    "cool": "cool light|cold light",
    "left": "(?:lit|light) from the left",
    "right": "(?:lit|light) from the right",
}


def found(patterns: dict[str, str], text: str) -> str:
    names = [name for name, pattern in patterns.items() if re.search(pattern, text)]
    assert len(names) <= 1, (text, names)
    return "".join(names)


def group(pattern: str, text: str, number: int = 1) -> str:
    match = re.search(pattern, text)
    return match[number] if match else ""


def read(text: str) -> dict[str, str]:
    """What the words say, "" for nothing; sizes and motions of objects are left out."""
    things = [
        (color, "ball" if shape == "circle" else shape)
        for count, _, color, shape in re.findall(THING, text)
        for _ in range({"two": 2, "three": 3}.get(count, 1))
    ]
    relation = "" if "camera" in text else found(RELATED, text)
    colors = [color for color, _ in things]
    places = {"left of": 0, "right of": 1, "above": 0, "below": 1, "in front of": 0, "behind": 1}
    foremost = colors[places[relation]] if relation in places else ""
    ground = r"an? (?:striped )?"
    gradient = r"fading from (\w+) to (\w+)" if "fading" in text else r"a (\w+) to (\w+) background"
    wall, floor = group(gradient, text, 1), group(gradient, text, 2)
    answer = {
        "count": ("one", "two", "three")[len(things) - 1],
        "relation": relation,
        "reference": colors[1] if relation and relation != "head-on" else "",
        "on the left": foremost if relation in ("left of", "right of") else "",
        "on top": foremost if relation in ("above", "below") else "",
        "in front": foremost if relation in ("in front of", "behind") else "",
        "gravity": "off" if re.search("gravity|weightless", text) else "",
        "pan": group(r"camera (?:pans|tilts|moves) (?:to the )?(left|right|up|down)\b", text),
        "light": found(LIT, text),
        "texture": group(r"(checkered|dotted|wooden)", text),
        "wall": wall or group(rf"{ground}(\w+) (?:background|wall)\b", text),
        "floor": floor or group(r"(\w+) floor", text),
        "character": "same" if "the same " in text else "",
    }
    for number in range(3):
        answer[f"color {number + 1}"], answer[f"shape {number + 1}"] = (things + [("", "")] * 3)[number]
    return answer


def test_what_second_world_captions_say_is_what_their_words_say():
    asked = questions_of(WORLD_2)
    assert asked == MORE_QUESTIONS
    seen: dict[str, set[str]] = {name: set() for name in asked}
    for text, numbers in captions_with_answers(0, range(500), mix=WORLD_2):
        told = dict.fromkeys(asked, "") | said(numbers, asked)
        for name, answer in told.items():
            seen[name].add(answer)
        assert {name: told[name] for name in read(text)} == read(text), text
        sizes = [SIZED.get(size.strip(), "") for _, size, _, _ in re.findall(THING, text)]
        for number, size in enumerate(sizes, start=1):  # medium goes unsaid
            assert told[f"size {number}"] == size or (not size and told[f"size {number}"] == "medium"), text
        assert (told["kind"] == "travel") == ("camera" in text)
        assert (told["kind"] == "wall") == bool(re.search("behind a (wall|bar)", text))
        assert (told["kind"] == "meeting") == (told["relation"] in ("head-on", "from behind"))
        assert (told["motion 1"] == "float") == (told["gravity"] == "off")
        if told["kind"] in ("passing", "wall"):
            assert told["direction 1"] == group(r"(?:pass(?:es)?|slides?|moves?) (?:to the )?(left|right)\b", text)
    assert all(len(answers) >= 2 for answers in seen.values())
    assert seen["relation"] == {"", *RELATIONS, "head-on", "from behind"}
    assert set(MORE_KINDS) <= seen["kind"]
    assert seen["light"] == {"", *LIGHTS}
    assert seen["pan"] == {"", "left", "right", "up", "down"}
    assert "wooden" in seen["floor"]


def test_no_caption_of_the_second_world_is_cut_off():
    rows = load_config("world_2_text").data.row_text
    assert max(len(text) for text, _ in captions_with_answers(1, range(300), mix=WORLD_2)) < rows
