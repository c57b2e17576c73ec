"""PSNR and SSIM of the autoencoder on clips it was not trained on, beside a still of their first frame."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from sora_jax.data.sources import FolderSource
from sora_jax.data.world import Mix, WorldSource
from sora_jax.evaluation.intervals import Metric, mean
from sora_jax.evaluation.reconstruction import evaluate_reconstruction
from sora_jax.evaluation.suites import Asked
from sora_jax.pipeline import Pipeline


def run(pipe: Pipeline, asked: Asked) -> dict[str, Any]:
    source = _clips(pipe, asked)
    count = min(asked.n, len(source))
    there_and_back = asked.there_and_back(pipe)

    def clips() -> Iterator[np.ndarray]:
        for index in range(count):
            yield source[index]["frames"]
            asked.progress(index + 1, count)

    scores = evaluate_reconstruction(lambda clip: there_and_back(clip[None])[0], clips())
    return {"suite": "reconstruction", "n": count, "metrics": {name: _finite(v) for name, v in scores.items()}}


def _clips(pipe: Pipeline, asked: Asked) -> WorldSource | FolderSource:
    """Items with uint8 "frames" of the model's size."""
    frames, height, width = asked.extent(pipe)
    if asked.source == "world":
        return WorldSource(asked.seed, asked.n, "heldout", frames, height, width, asked.mix or Mix())
    fps = pipe.folder.defaults.fps
    return FolderSource(asked.source, fps=fps, frames=frames, height=height, width=width, captions=False)


def _finite(values: list[float]) -> Metric:
    """The mean without clips that come back free of error, whose PSNR is infinite."""
    finite = [value for value in values if np.isfinite(value)]
    return mean(finite) if finite else {"value": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0}
