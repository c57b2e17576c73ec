"""The pipeline on a tiny random model: what is given stays, batches equal singles, and streams equal wholes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.canvas import storyboard
from sora_jax.errors import UserError
from sora_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sora_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from sora_jax.models.tokenizer import ByteTokenizer
from sora_jax.models.transformer import Transformer, TransformerConfig
from sora_jax.pipeline import Pipeline
from sora_jax.shapes import Stride
from sora_jax.weights.defaults import SamplingDefaults, SchedulerDefaults
from sora_jax.weights.layout import ModelFolder


def random_params(make):
    """Random everywhere: a fresh model predicts zero, which would make every comparison trivial."""
    shapes = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), graph=False)[1]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(scale=0.2, size=p.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    transformer = TransformerConfig(
        n_layers=2, n_heads=2, head_dim=8, ffn_dim=32, in_channels=4, out_channels=4, patch=Stride(1, 2, 2), text_dim=16
    )
    autoencoder = AutoencoderConfig(
        base_dim=8, z_dim=4, dim_mult=(1, 2), num_res_blocks=1, temperal_downsample=(True,), patch_size=2
    )
    text = TextEncoderConfig(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    folder = ModelFolder(
        transformer,
        random_params(lambda rngs: Transformer(transformer, rngs=rngs)),
        autoencoder,
        random_params(lambda rngs: Autoencoder(autoencoder, rngs=rngs)),
        text,
        random_params(lambda rngs: TextEncoder(text, rngs=rngs)),
        ByteTokenizer(32),
        SchedulerDefaults("unipc", 2.0),
        SamplingDefaults("tiny-1", frames=5, height=16, width=24, fps=8.0, steps=3, guidance=3.0),
    )
    return Pipeline(folder, "tiny-1", dtype="float32")


def test_the_record_is_enough_to_make_the_video_again(pipe):
    video = pipe.sample("a red ball", seed=7)
    record = video.record
    again = pipe.sample(
        record.prompt,
        seed=record.seed,
        frames=record.frames,
        height=record.height,
        width=record.width,
        steps=record.steps,
        guidance=record.guidance,
        solver=record.solver,
        shift=record.shift,
        negative_prompt=record.negative_prompt,
    )
    assert video.frames.shape == (5, 16, 24, 3)
    assert video.frames.dtype == np.uint8
    assert video.frames.std() > 1
    np.testing.assert_array_equal(video.frames, again.frames)
    assert record.model == "tiny-1"


def test_video_k_of_a_batch_is_what_its_seed_makes_alone(pipe):
    prompts = ["a red ball", "two green squares slide left", "x"]
    batch = pipe.sample(prompts, seed=[5, 0, 9], output="float32")
    for prompt, seed, video in zip(prompts, [5, 0, 9], batch, strict=True):
        alone = pipe.sample(prompt, seed=seed, output="float32")
        np.testing.assert_allclose(video.frames, alone.frames, atol=1e-5)
    whole = [v.frames for v in pipe.sample(prompts, seed=[5, 0, 9])]
    for prompt, seed, frames in zip(prompts, [5, 0, 9], whole, strict=True):
        np.testing.assert_array_equal(frames, pipe.sample(prompt, seed=seed).frames)


def test_prompt_guidance_seed_and_noise_all_matter(pipe):
    base = pipe.sample("a red ball", output="float32").frames
    for change in ({"seed": 1}, {"guidance": 1.0}, {"negative_prompt": "blue"}, {"solver": "euler"}, {"steps": 4}):
        assert np.abs(pipe.sample("a red ball", output="float32", **change).frames - base).max() > 1e-3, change
    assert np.abs(pipe.sample("a blue ball", output="float32").frames - base).max() > 1e-3
    noise = np.random.default_rng(0).normal(size=(1, 3, 4, 6, 4)).astype(np.float32)
    assert np.abs(pipe.sample("a red ball", noise=noise, output="float32").frames - base).max() > 1e-3


def test_given_frames_come_back_as_the_autoencoder_keeps_them(pipe):
    """Given tokens pass the solver to the bit: the first frame is the image, encoded and decoded."""
    image = np.random.default_rng(1).integers(0, 255, (16, 24, 3), np.uint8)
    video = pipe.sample("a red ball", image=image)
    kept = pipe.decode(pipe.encode(image[None, None]))[0, 0]
    np.testing.assert_array_equal(video.frames[0], kept)
    clip = np.random.default_rng(2).integers(0, 255, (3, 16, 24, 3), np.uint8)
    video = pipe.sample("a red ball", video=clip)
    np.testing.assert_array_equal(video.frames[:3], pipe.decode(pipe.encode(clip[None]))[0])


def test_shots_of_a_storyboard_read_their_own_prompt(pipe):
    def shots(first, second):
        board = storyboard([(first, 3), (second, 3)], 16, 24)
        return pipe.sample_canvases([board], seeds=[0], output="float32")[0].frames

    frames = shots("a red ball", "a blue square")
    assert frames.shape == (6, 16, 24, 3)
    assert np.abs(frames[3:] - shots("a red ball", "a green square")[3:]).max() > 1e-3


def test_progress_is_reported_for_every_step_and_latent(pipe):
    seen = []
    pipe.sample("a red ball", progress=lambda *event: seen.append(event))
    assert [e for e in seen if e[0] == "denoise"] == [("denoise", i, 3) for i in (1, 2, 3)]
    assert [e for e in seen if e[0] == "decode"] == [("decode", i, 3) for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": []}, "no prompt"),
        ({"prompt": "x" * 40}, "40 bytes long and 31 fit"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"guidance": float("nan")}, "guidance must be a finite number"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"solver": "eular"}, 'did you mean "euler"'),
        ({"shift": 0.0}, "shift must be"),
        ({"frames": 4}, "4 frames cannot be made.*nearest: 3 or 5"),
        ({"width": 30}, "width 30 cannot be made.*nearest: 24 or 32"),
        ({"frames": 5, "seconds": 1.0}, "frames and seconds"),
        ({"output": "float64"}, "unknown output"),
        ({"noise": np.zeros((1, 1, 4, 6, 4), np.float32)}, "noise has the shape"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_line(pipe, options, says):
    options = {"prompt": "a red ball", **options}
    with pytest.raises(UserError, match=says) as error:
        pipe.sample(options.pop("prompt"), **options)
    assert "\n" not in str(error.value)


def test_unknown_model_names_the_shipped_ones():
    with pytest.raises(UserError, match="unknown model 'wrold'.*did you mean \"world\""):
        Pipeline.load("wrold")
