"""Held-out prompts, judged by checkers."""

from __future__ import annotations

from typing import Any

import numpy as np

from sora_jax.canvas import text_to_video
from sora_jax.errors import UserError
from sora_jax.evaluation.suite import evaluate
from sora_jax.evaluation.suites import Asked
from sora_jax.pipeline import Pipeline
from sora_jax.shapes import Extent


def motion_extent(pipe: Pipeline, asked: Asked) -> Extent:
    """What is asked for. Raises `UserError` where it is too short to show motion."""
    extent = asked.extent(pipe)
    if extent.frames < 9:
        raise UserError(f"motion cannot be judged in {extent.frames} frames; ask for --frames 9 or more")
    return extent


def run(pipe: Pipeline, asked: Asked) -> dict[str, Any]:
    extent = motion_extent(pipe, asked)

    def make(prompts: list[str], seeds: list[int]) -> np.ndarray:
        return asked.make(pipe, [text_to_video(prompt, extent) for prompt in prompts], seeds)

    return evaluate(make, asked.n, asked.seed, asked.batch_size, asked.progress, asked.mix)
