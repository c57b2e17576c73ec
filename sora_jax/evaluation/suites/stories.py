"""Clips with cuts, a prompt for each shot: are the cuts there, and do the shots show what they should?"""

from __future__ import annotations

from typing import Any

import numpy as np

from sora_jax.canvas import storyboard
from sora_jax.data.world import Story
from sora_jax.evaluation.stories import SHOTS, evaluate_stories
from sora_jax.evaluation.suites import Asked
from sora_jax.pipeline import Pipeline


def run(pipe: Pipeline, asked: Asked) -> dict[str, Any]:
    _, height, width = asked.extent(pipe)

    def make(batch: list[Story], seeds: list[int]) -> np.ndarray:
        shots = [zip((prompt.text for prompt in story.prompts), story.lengths, strict=True) for story in batch]
        return asked.make(pipe, [storyboard(list(one), height, width) for one in shots], seeds)

    return evaluate_stories(
        make,
        asked.n,
        asked.seed,
        asked.batch_size,
        shots=asked.shots or SHOTS,
        height=height,
        width=width,
        mix=asked.mix,
        progress=asked.progress,
    )
