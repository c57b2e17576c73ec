"""The pipeline on a tiny random model: what is given stays, batches equal singles, and streams equal wholes."""

from __future__ import annotations

import base64
import dataclasses
import io
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from sora_jax.canvas import inpaint, lay_out, storyboard, text_to_video
from sora_jax.diffusion.sampler import find_solver, level_schedule
from sora_jax.errors import UserError
from sora_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sora_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from sora_jax.models.tokenizer import ByteTokenizer
from sora_jax.models.transformer import Transformer, TransformerConfig
from sora_jax.pipeline import Pipeline
from sora_jax.settings import check_frames, real, whole
from sora_jax.shapes import Extent, Stride
from sora_jax.tokens.patchify import patchify, unpatchify
from sora_jax.weights.defaults import SamplingDefaults, SchedulerDefaults
from sora_jax.weights.layout import ModelFolder, save_folder
from sora_jax.weights.shipped import HUB_CONFIGS, HUB_FILES, find_model


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


def test_what_a_mask_gives_of_each_frame_stays(pipe):
    """To the bit in latents; what is made instead sees it."""
    clip = np.random.default_rng(2).integers(0, 255, (5, 16, 24, 3), np.uint8)
    made = np.zeros((16, 24), bool)
    made[8:, 8:] = True  # two tokens of 8 pixels, 2 latents each
    canvas = inpaint("a red ball", clip, made)
    (video,) = pipe.sample_canvases([canvas], seeds=[1], output="latents")
    latents, inside = pipe.encode(clip[None])[0], made[::4, ::4]
    np.testing.assert_array_equal(video.latents[:, ~inside], latents[:, ~inside])
    assert (video.latents[:, inside] != latents[:, inside]).all()
    (other,) = pipe.sample_canvases([inpaint("a red ball", clip[::-1].copy(), made)], seeds=[1], output="latents")
    assert (video.latents[:, inside] != other.latents[:, inside]).any()
    with pytest.raises(UserError, match="sampled together have one layout, given parts included: call once for each"):
        pipe.sample_canvases([canvas, inpaint("a red ball", clip, ~made)], seeds=[1, 1])


def test_a_video_arrives_at_its_last_image(pipe):
    rng = np.random.default_rng(3)
    first, last = (rng.integers(0, 255, (16, 24, 3), np.uint8) for _ in range(2))
    video = pipe.sample("a red ball", image=first, last_image=last)
    assert video.frames.shape == (6, 16, 24, 3), "the model's 5 frames and the last image"
    for frame, image in ((video.frames[0], first), (video.frames[-1], last)):
        np.testing.assert_array_equal(frame, pipe.decode(pipe.encode(image[None, None]))[0, 0])
    alone = pipe.sample("a red ball", last_image=last, output="float32").frames
    other = pipe.sample("a red ball", last_image=first, output="float32").frames
    assert np.abs(alone[:5] - other[:5]).max() > 1e-3, "what is made sees what it is to arrive at"
    with pytest.raises(UserError, match=r"7 frames that end in a given one cannot be made.* nearest: 6 or 8"):
        pipe.sample("a red ball", last_image=last, frames=7)
    with pytest.raises(UserError, match="the last frames are 24x16 and the video is to be 32x16"):
        pipe.sample("a red ball", last_image=last, width=32)


def test_seeds_of_several_prompts_and_several_videos(pipe):
    made = pipe.sample(["a red ball", "x"], seed=4, num_videos=2)
    assert [(v.record.prompt, v.record.seed) for v in made] == [
        ("a red ball", 4),
        ("a red ball", 5),
        ("x", 4),
        ("x", 5),
    ]
    np.testing.assert_array_equal(made[1].frames, pipe.sample("a red ball", seed=5).frames)
    assert [v.record.seed for v in pipe("a red ball", seed=7, num_videos=2)] == [7, 8]
    with pytest.raises(UserError, match="num_videos must be at least 1, not 0"):
        pipe.sample("a red ball", num_videos=0)
    with pytest.raises(UserError, match="2 prompts and 3 seeds"):
        pipe.sample(["a red ball", "x"], seed=[1, 2, 3])


def test_latents_and_their_trajectory(pipe, tmp_path):
    latents = pipe.sample("a red ball", output="latents", trajectory=True)
    assert latents.frames is None
    assert latents.latents.shape == (3, 4, 6, 4)
    frames = pipe.sample("a red ball").frames
    np.testing.assert_array_equal(pipe.decode(latents.latents[None])[0], frames)
    assert latents.trajectory.shape == (3, 3, 4, 6, 4)
    np.testing.assert_allclose(latents.trajectory[-1], latents.latents, atol=1e-6)
    with pytest.raises(UserError, match="is latents and has no frames to save"):
        latents.save(tmp_path / "x.mp4")

    # Euler's first step from pure noise: x_0 = eps - v, by the pieces of the public door
    noise = pipe.noise(0, (3, 4, 6, 4))
    euler = pipe.sample("a red ball", solver="euler", guidance=1.0, noise=noise, output="latents", trajectory=True)
    layout = lay_out(text_to_video("a red ball", pipe.extent()), pipe.stride, pipe.patch)
    tokens = patchify(noise[None], pipe.patch)
    velocity = pipe.velocity(
        pipe.params, jnp.asarray(tokens), jnp.ones((1, 3)), pipe.condition(layout, [["a red ball"]])
    )
    expected = unpatchify(tokens - np.asarray(velocity), Extent(3, 4, 6), pipe.patch)[0]
    np.testing.assert_allclose(euler.trajectory[0], expected, atol=1e-4)

    # one noise for all, or one each
    both = pipe.sample(["a red ball", "x"], noise=noise, output="latents")
    each = pipe.sample(["a red ball", "x"], noise=np.stack([noise, noise]), output="latents")
    for one, other in zip(both, each, strict=True):
        np.testing.assert_array_equal(one.latents, other.latents)


def test_given_frames_stay_put_along_the_trajectory(pipe):
    image = np.random.default_rng(1).integers(0, 255, (16, 24, 3), np.uint8)
    video = pipe.sample("a red ball", image=image, output="latents", trajectory=True)
    for prediction in video.trajectory:
        np.testing.assert_array_equal(prediction[0], pipe.encode(image[None, None])[0, 0])


@pytest.mark.slow
def test_a_mesh_whose_devices_trade_tokens_makes_the_same_video(pipe, tmp_path, monkeypatch):
    """data x fsdp x sequence, with rows that count as long: their latents are within 1e-5 of one device's."""
    from sora_jax.models import attention

    save_folder(tmp_path / "model", pipe.folder)
    options = {"output": "latents", "batch_size": 2, "seed": 3}
    with jax.default_matmul_precision("highest"):
        ours = [video.latents for video in pipe.sample(["a red ball", "x"], **options)]
        monkeypatch.setattr(attention, "BLOCK", 8)
        spread = Pipeline.load(tmp_path / "model", mesh={"data": 2, "fsdp": 2, "sequence": 2}, dtype="float32")
        theirs = [video.latents for video in spread.sample(["a red ball", "x"], **options)]
    assert np.linalg.norm(ours[0] - ours[1]) > 0.01 * np.linalg.norm(ours[0])
    for one, other in zip(ours, theirs, strict=True):
        assert np.linalg.norm(other - one) <= 1e-5 * np.linalg.norm(one)


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "sequence": 4}, {"tensor": 2, "sequence": 4}, {"data": 8}])
def test_a_mesh_makes_the_same_video(pipe, sizes, tmp_path):
    save_folder(tmp_path / "model", pipe.folder)
    spread = Pipeline.load(tmp_path / "model", mesh=sizes, dtype="float32")
    kernels = [leaf for leaf in jax.tree.leaves(spread.params) if leaf.size > 100]
    assert len(kernels[0].devices()) == 8
    assert sizes == {"data": 8} or any(not leaf.is_fully_replicated for leaf in kernels)
    ours = pipe.sample("a red ball", output="float32").frames
    np.testing.assert_allclose(spread.sample("a red ball", output="float32").frames, ours, atol=1e-4)
    with pytest.raises(UserError, match="mesh data=1, fsdp=3, tensor=1, sequence=1 does not multiply to the 8 devices"):
        Pipeline.load(tmp_path / "model", mesh={"fsdp": 3})


def test_a_notebook_shows_the_video_enlarged(pipe):
    shown = pipe.sample("a red ball")._repr_html_()
    assert 'width="384" height="256"' in shown  # 24x16 sixteen times
    assert "data:video/mp4;base64," in shown
    still = pipe.sample("a red ball", frames=1)._repr_html_()
    png = base64.b64decode(still.split("base64,")[1].split('"')[0])
    assert Image.open(io.BytesIO(png)).size == (24, 16)
    assert pipe.sample("a red ball", output="latents")._repr_html_() is None


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
        ({"noise": np.full((3, 4, 4, 4), np.nan, np.float32)}, "noise must be finite numbers in float32"),
        ({"negative_prompt": "x" * 40}, "40 bytes long and 31 fit"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_line(pipe, options, says):
    options = {"prompt": "a red ball", **options}
    with pytest.raises(UserError, match=says) as error:
        pipe.sample(options.pop("prompt"), **options)
    assert "\n" not in str(error.value)


def test_values_of_other_types_are_refused_by_name():
    """Tests check annotations, so the pipeline's own checks are called here by themselves."""
    for value in ("3", 2.5, True, None):
        with pytest.raises(UserError, match="steps must be a whole number"):
            whole("steps", value)
    assert whole("steps", np.int64(3)) == 3
    for value in ("strong", None, [1]):
        with pytest.raises(UserError, match="guidance must be a number"):
            real("guidance", value)
    assert real("guidance", 3) == 3.0
    check_frames("image", np.zeros((2, 2, 3), np.uint8), "H W 3")
    for value in ("a.png", np.zeros((2, 2, 3), np.float32), np.zeros((2, 2), np.uint8), np.zeros((2, 2, 1), np.uint8)):
        with pytest.raises(UserError, match=r"image must be a uint8 array \[H W 3\]"):
            check_frames("image", value, "H W 3")


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"num_inference_steps": 3}, "num_inference_steps is called `steps` here"),
        ({"guidance_scale": 3.0}, "guidance_scale is called `guidance` here"),
        ({"stepz": 3}, 'sample has no option stepz: did you mean "steps"'),
        ({"guidance_low": 3.0}, "guidance_low is for models of two experts"),
    ],
)
def test_an_option_of_another_name_is_refused_with_ours(pipe, option, says):
    with pytest.raises(UserError, match=says):
        pipe.sample("a red ball", **option)


def test_an_open_model_without_levels_per_frame_refuses_given_frames(pipe):
    defaults = dataclasses.replace(pipe.folder.defaults, takes_frames=False)
    folder = dataclasses.replace(pipe.folder, defaults=defaults)
    image = np.zeros((16, 24, 3), np.uint8)
    with pytest.raises(UserError, match="makes videos from text alone"):
        Pipeline(folder, "open", dtype="float32").sample("a red ball", image=image)


def test_two_experts_share_the_steps_at_the_boundary(pipe):
    """With the second expert the same network, nothing changes; with another, from the boundary on everything does."""
    same = dataclasses.replace(pipe.folder, transformer_2=pipe.folder.transformer, boundary=0.6)
    expected = pipe.sample("a red ball", output="latents", steps=4, trajectory=True)
    made = Pipeline(same, "two", dtype="float32").sample("a red ball", output="latents", steps=4, trajectory=True)
    np.testing.assert_array_equal(made.latents, expected.latents)

    still = jax.tree.map(jnp.zeros_like, pipe.folder.transformer)
    other = Pipeline(dataclasses.replace(same, transformer_2=still), "two", dtype="float32")
    split = other.sample("a red ball", output="latents", steps=4, trajectory=True)
    levels = level_schedule(find_solver("unipc"), 4, 2.0)[:-1]
    high = int((levels * 1000 >= 600).sum())
    assert 0 < high < 4
    np.testing.assert_array_equal(split.trajectory[:high], expected.trajectory[:high])
    assert np.abs(split.trajectory[high:] - expected.trajectory[high:]).max() > 1e-3
    # and the high-noise one is back for the next video
    np.testing.assert_array_equal(other.sample("a red ball", output="latents", steps=4).latents, split.latents)


def test_offloaded_parts_make_the_same_video(pipe, tmp_path):
    save_folder(tmp_path / "model", pipe.folder)
    image = np.random.default_rng(1).integers(0, 255, (16, 24, 3), np.uint8)
    ours = Pipeline.load(tmp_path / "model", dtype="float32", offload=True)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(ours.folder.text_encoder))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(ours.folder.autoencoder))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(ours.folder.transformer))
    made, expected = (one.sample("a red ball", image=image).frames for one in (ours, pipe))
    np.testing.assert_array_equal(made, expected)


def test_a_hub_name_says_what_it_takes(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as where the extra is not installed
    with pytest.raises(UserError, match=r"there is no folder nobody/nothing; .*sora-jax\[weights\]"):
        Pipeline.load("nobody/nothing")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="unknown model 'runs/wrold'"):  # a path, as its folder shows
        Pipeline.load("runs/wrold")


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def fetch(name, allow_patterns):
        asked.append(allow_patterns)
        raise hub.errors.LocalEntryNotFoundError("an address\nand more lines")

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    for files in (HUB_FILES, HUB_CONFIGS):
        with pytest.raises(UserError, match="the Hugging Face hub cannot be reached: check the network") as error:
            find_model("nobody/nothing", files)
        assert "\n" not in str(error.value)
    assert any("safetensors" in pattern for pattern in asked[0])
    assert not any("safetensors" in pattern for pattern in asked[1]), "a plan fetches no weights"


def test_a_hub_name_of_the_authors_files_is_fetched_whole(monkeypatch, tmp_path):
    """By the hub's own reading of patterns, on the listing of a repository of two experts, and of one of one."""
    hub = pytest.importorskip("huggingface_hub")
    asked = []
    monkeypatch.setattr(
        hub, "snapshot_download", lambda name, allow_patterns: asked.append(allow_patterns) or str(tmp_path)
    )
    monkeypatch.chdir(tmp_path)
    find_model("nobody/nothing")
    needed = {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model-00001-of-00006.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "high_noise_model/config.json",
        "low_noise_model/diffusion_pytorch_model-00001-of-00006.safetensors",
        "low_noise_model/diffusion_pytorch_model.safetensors.index.json",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "Wan2.1_VAE.pth",
        "google/umt5-xxl/tokenizer.json",
        "google/umt5-xxl/tokenizer_config.json",
    }
    others = {"README.md", "LICENSE.txt", "assets/logo.png", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"}
    fetched = hub.utils.filter_repo_objects(needed | others, allow_patterns=asked[0])
    assert set(fetched) == needed


def test_unknown_model_names_the_shipped_ones():
    with pytest.raises(UserError, match="unknown model 'wrold'.*did you mean \"world\""):
        Pipeline.load("wrold")
