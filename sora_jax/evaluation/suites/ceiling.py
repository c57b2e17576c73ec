"""True clips of held-out prompts through the autoencoder, judged as made ones are: what no prompt can do better."""

from __future__ import annotations

from typing import Any

import numpy as np

from sora_jax.data.world import Mix, WorldSource, heldout_prompts
from sora_jax.evaluation.suite import evaluate
from sora_jax.evaluation.suites import Asked
from sora_jax.evaluation.suites.world import motion_extent
from sora_jax.pipeline import Pipeline


def run(pipe: Pipeline, asked: Asked) -> dict[str, Any]:
    extent = motion_extent(pipe, asked)
    prompts = heldout_prompts(asked.n, asked.seed, **extent._asdict(), mix=asked.mix)
    true = WorldSource(asked.seed, asked.n, "heldout", **extent._asdict(), mix=asked.mix or Mix())

    there_and_back = asked.there_and_back(pipe)

    def rebuilt(_: list[str], seeds: list[int]) -> np.ndarray:
        return there_and_back(np.stack([item["frames"] for item in true.batch([seed - asked.seed for seed in seeds])]))

    report = evaluate(rebuilt, asked.n, asked.seed, asked.batch_size, asked.progress, prompts=prompts)
    return {**report, "suite": "ceiling"}
