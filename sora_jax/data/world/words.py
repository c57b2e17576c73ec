"""The words and prompts that a model trained on the world has read."""

from __future__ import annotations

import functools

import numpy as np

from sora_jax.data.world.captions import shot_captions
from sora_jax.data.world.prompts import prompts
from sora_jax.data.world.sampling import sample_scenes
from sora_jax.data.world.scene import Mix
from sora_jax.vocabulary import words_of

ENOUGH = 2000  # clips whose captions hold every word of the first world's grammar
ENOUGH_SECOND = 6000  # and of the second's, where some things are rare
_CUT = 300  # cut ones, which say "the same"


@functools.lru_cache(maxsize=4)
def world_words(mix: Mix | None = None, clips: int | None = None) -> tuple[str, ...]:
    """Every word of the captions of `clips` training clips of a mix (enough of them by default), short and dense, and
    of some cut ones where the mix has characters that stay; sorted."""
    mix = mix or Mix()
    clips = clips or (ENOUGH if mix.plain else ENOUGH_SECOND)
    scenes = sample_scenes(0, range(clips), split="train", mix=mix)
    if mix.same:
        scenes += sample_scenes(0, range(min(_CUT, clips)), split="train", frames=18, mix=mix, shots=(9, 9))
    rng = np.random.default_rng(0)
    words: set[str] = set()
    for scene in scenes:
        for shot in scene.shots:
            for image in (False, True):
                words.update(*map(words_of, shot_captions(shot, rng, image=image)))
    return tuple(sorted(words))


@functools.lru_cache(maxsize=4)
def world_prompts(mix: Mix | None = None, count: int = 300) -> tuple[str, ...]:
    """Some short prompts of training with a mix, each once, in the order they are drawn."""
    return tuple(dict.fromkeys(prompt.text for prompt in prompts(count, 0, split="train", mix=mix)))
