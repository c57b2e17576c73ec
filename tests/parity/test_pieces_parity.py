"""Text encoder, transformer and autoencoders, through the public door: `Pipeline.load` on the folder that the
reference wrote, then `encode_text`, `velocity`, `encode` and `decode`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import Pipeline
from sora_jax.canvas import lay_out, text_to_video
from sora_jax.models.transformer import model_time
from sora_jax.shapes import Extent
from sora_jax.tokens.patchify import patchify, unpatchify

KINDS = ("t2v", "ti2v")
BAR = 1e-4  # of the reference's standard deviation


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Pipeline]:
    import reference

    theirs = reference.pipeline(request.param)
    path: Path = reference.save(theirs, tmp_path_factory.mktemp("model") / request.param)
    return theirs, Pipeline.load(path, dtype="float32")


def channels_first(video: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.moveaxis(np.asarray(video), -1, 1).copy())


def channels_last(video: Any) -> np.ndarray:
    return np.moveaxis(video.detach().numpy(), 1, -1)


def assert_close(ours: Any, theirs: Any, bar: float = BAR) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= bar * theirs.std()


PROMPTS = ("a red ball bounces", "  the  BLUE cube &amp; &lt;ball&gt;\tslides, é 雨 ", "", "a " * 200)


def test_prompts_are_cut_into_the_same_pieces(both):
    theirs, pipe = both
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    for prompt in PROMPTS:
        assert pipe.folder.tokenizer.encode(prompt) == theirs.tokenizer(prompt_clean(prompt)).input_ids


def test_text_embeddings(both):
    theirs, pipe = both
    expected = theirs._get_t5_prompt_embeds(list(PROMPTS), max_sequence_length=512)
    text, text_ids = pipe.encode_text([[prompt] for prompt in PROMPTS])
    assert_close(text, expected.detach())
    assert (np.asarray(text_ids) == 1).all(), "padding is attended"


@pytest.mark.parametrize("frames_height_width", [(1, 2, 2), (3, 4, 6), (5, 2, 8)])
@pytest.mark.parametrize("level", [0.9991, 0.5, 0.013])
def test_velocity(both, frames_height_width, level: float):
    import torch

    theirs, pipe = both
    F, h, w = frames_height_width
    C = pipe.folder.transformer_config.in_channels
    latents = np.random.default_rng(0).normal(size=(2, F, h, w, C)).astype(np.float32)
    prompts = ("a red ball", "the cube rests")
    text = theirs._get_t5_prompt_embeds(list(prompts), max_sequence_length=512)
    levels = np.linspace(level, level / 2, F)  # of each frame, where a level per token is known
    per_frame = theirs.config.expand_timesteps
    times = np.asarray(model_time(jnp.asarray(levels, jnp.float32)[None]))[0]
    if per_frame:
        timestep = torch.from_numpy(np.repeat(times, h * w // 4)).expand(2, -1)
    else:
        levels[:] = level
        timestep = torch.full((2,), float(np.float32(1000) * np.float32(level)))
    with torch.no_grad():
        expected = theirs.transformer(channels_first(latents), timestep, text, return_dict=False)[0]

    stride = pipe.stride
    canvas = text_to_video("", Extent(1 + stride.time * (F - 1), stride.height * h, stride.width * w))
    layout = lay_out(canvas, stride, pipe.patch)
    table = jnp.asarray(np.tile(levels.astype(np.float32), (2, 1)))
    velocity = pipe.velocity(
        pipe.params, jnp.asarray(patchify(latents, pipe.patch)), table, pipe.condition(layout, [[p] for p in prompts])
    )
    assert_close(unpatchify(np.asarray(velocity), Extent(F, h, w), pipe.patch), channels_last(expected))


@pytest.mark.parametrize("frames", [1, 5, 17])
@pytest.mark.parametrize("size", [(1, 1), (3, 5)])  # in latents
def test_autoencoder(both, frames: int, size: tuple[int, int]):
    import torch

    theirs, pipe = both
    h, w = size
    stride = pipe.stride
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (2, frames, h * stride.height, w * stride.width, 3)).astype(np.uint8)
    mean, std = (np.asarray(theirs.vae.config[name], np.float32) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        pixels = channels_first(video.astype(np.float32) / 127.5 - 1.0)
        expected = channels_last(theirs.vae.encode(pixels).latent_dist.mean)
    assert_close(pipe.encode(video), (expected - mean) / std)

    latents = rng.normal(size=expected.shape).astype(np.float32)
    with torch.no_grad():
        decoded = channels_last(theirs.vae.decode(channels_first(latents * std + mean), return_dict=False)[0])
    assert_close(pipe.decode(latents, "float32"), (decoded + 1.0) / 2.0)
