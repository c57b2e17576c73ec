"""Held-out first frames, continued: motion masks against the truth, beside two baselines and the autoencoder."""

from __future__ import annotations

from typing import Any

import numpy as np

from sora_jax.canvas import animate
from sora_jax.errors import UserError
from sora_jax.evaluation.continuation import evaluate_continuation
from sora_jax.evaluation.suites import Asked
from sora_jax.pipeline import Pipeline


def run(pipe: Pipeline, asked: Asked) -> dict[str, Any]:
    extent = asked.extent(pipe)

    def go_on(prompts: list[str], firsts: np.ndarray, seeds: list[int]) -> np.ndarray:
        drawn = [animate(prompt, first, extent) for prompt, first in zip(prompts, firsts, strict=True)]
        return asked.make(pipe, drawn, seeds)

    def fits(text: str) -> bool:
        try:
            pipe.folder.tokenizer.encode(text)
        except UserError:
            return False
        return True

    return evaluate_continuation(
        go_on,
        asked.n,
        asked.seed,
        asked.batch_size,
        frames=extent.frames,
        height=extent.height,
        width=extent.width,
        mix=asked.mix,
        fits=fits,
        there_and_back=lambda clip: pipe.decode(pipe.encode(clip[None]))[0],
        progress=asked.progress,
    )
