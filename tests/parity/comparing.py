"""One request to both: the reference's frames for it, and what it means that ours are the same."""

from __future__ import annotations

from typing import Any

import numpy as np

from sora_jax import Pipeline

PROMPT, NEGATIVE = "a red ball bounces on the floor", "blue"
FRAMES, STEPS = 9, 10


def sizes(pipe: Pipeline) -> dict[str, int]:
    return {"height": 4 * pipe.stride.height, "width": 6 * pipe.stride.width}


def draw(pipe: Pipeline) -> np.ndarray:
    F = 1 + (FRAMES - 1) // pipe.stride.time
    return np.random.default_rng(0).normal(size=(F, 4, 6, pipe.folder.autoencoder_config.z_dim)).astype(np.float32)


def our_frames(pipe: Pipeline, noise: np.ndarray, **options: Any) -> np.ndarray:
    video = pipe.sample(
        PROMPT,
        negative_prompt=NEGATIVE,
        frames=FRAMES,
        steps=STEPS,
        guidance=4.0,
        noise=noise,
        output="float32",
        **sizes(pipe),
        **options,
    )
    return np.asarray(video.frames)


def their_frames(theirs: Any, noise: np.ndarray, sizes: dict[str, int], **options: Any) -> np.ndarray:
    import torch

    latents = torch.from_numpy(np.moveaxis(noise, -1, 0)[None].copy())
    made = theirs(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        latents=latents,
        output_type="np",
        **sizes,
        **options,
    )
    return np.asarray(made.frames[0])


def assert_same_frames(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.05, "there is something to see"
    assert np.abs(ours - theirs).max() <= 2e-3
    within = np.abs(np.round(ours * 255) - np.round(theirs * 255)) <= 1
    assert within.mean() >= 0.999
