"""The words and prompts that a model trained on the world has read."""

from __future__ import annotations

import numpy as np

from sora_jax.data.world.captions import shot_captions
from sora_jax.data.world.prompts import prompts
from sora_jax.data.world.sampling import sample_scenes
from sora_jax.vocabulary import words_of

ENOUGH = 2000  # clips whose captions hold every word of the grammar


def world_words(clips: int = ENOUGH) -> list[str]:
    """Every word of the captions of `clips` training clips, short and dense, sorted."""
    rng = np.random.default_rng(0)
    words: set[str] = set()
    for scene in sample_scenes(0, range(clips), split="train"):
        for image in (False, True):
            words.update(*map(words_of, shot_captions(scene.shot, rng, image=image)))
    return sorted(words)


def world_prompts(count: int = 300) -> list[str]:
    """Some short prompts of training, each once, in the order they are drawn."""
    return list(dict.fromkeys(prompt.text for prompt in prompts(count, 0, split="train")))
