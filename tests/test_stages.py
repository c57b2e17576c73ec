"""Both stages of training, tiny, through the loop: from nothing prepared to latents, losses and samples."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from sora_jax.config import Config, from_dict, override
from sora_jax.data.latents import LatentSource
from sora_jax.data.workers import LoaderError
from sora_jax.data.world import WorldSource, is_heldout, sample_scenes
from sora_jax.errors import UserError
from sora_jax.media import read_media, write_media
from sora_jax.models.autoencoder import Autoencoder
from sora_jax.models.structure import structure_of
from sora_jax.models.text_encoder import TextEncoder
from sora_jax.record import Record
from sora_jax.training.checkpoint import Checkpoints
from sora_jax.training.clip_batches import ClipBatches, clip_source
from sora_jax.training.loop import train
from sora_jax.training.pretrained import load_autoencoder, load_modules, load_run
from sora_jax.training.samples import film_strips, grid
from sora_jax.training.trained import model_of_run

pytestmark = pytest.mark.usefixtures("quick_training")

AUTOENCODER = {
    "base_dim": 4,
    "z_dim": 8,
    "dim_mult": (2, 2),  # two levels and no more: compiling is what takes the time here
    "num_res_blocks": 1,
    "temperal_downsample": (True,),
    "is_residual": True,
    "patch_size": 4,
}
DATA = {"frames": 5, "height": 16, "width": 16, "clips": 40, "held_out": 4, "row_tokens": 12, "row_text": 160}
TRAIN = {"batch_size": 2, "steps": 2, "log_every": 1, "validate_every": 2, "sample_every": 2, "checkpoint_every": 0}
TRAIN |= {"mesh": {"data": 1}}


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------------- autoencoder


@pytest.fixture(scope="module")
def autoencoder_config() -> Config:
    return from_dict(
        {
            "autoencoder": AUTOENCODER,
            "data": DATA | {"image_share": 0.0},
            "optimizer": {"warmup_steps": 0},
            "train": TRAIN | {"stage": "autoencoder"},
        }
    )


@pytest.fixture(scope="module")
def autoencoder_run(autoencoder_config: Config, quick_training: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("autoencoder") / "run"
    train(autoencoder_config, workdir, say=lambda line: None)
    return workdir


@pytest.mark.slow
def test_autoencoder_stage(autoencoder_run: Path):
    first, last = lines(autoencoder_run)
    for name in ("loss", "l1", "gradient", "kl", "psnr"):
        assert np.isfinite(first[name])
    # validation is of all four held-out clips, which are two batches
    config, params = load_autoencoder(str(autoencoder_run))
    model = nnx.merge(structure_of(lambda rngs: Autoencoder(config, rngs=rngs)), params)
    clips = np.stack([WorldSource(0, 40, "heldout", 5, 16, 16)[i]["frames"] for i in range(4)]) / 127.5 - 1.0
    rebuilt = np.asarray(model.decode(model.encode(jnp.asarray(clips, jnp.float32)).mean), np.float64)
    squared = np.square(rebuilt - clips).mean(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(last["validation_psnr"], np.mean(10 * np.log10(4 / squared)), rtol=1e-4)
    np.testing.assert_allclose(last["validation_loss"], np.abs(rebuilt - clips).mean(), rtol=1e-4)
    # four held-out clips, more than a batch has, each beside its reconstruction, in a grid
    assert read_media(autoencoder_run / "samples" / "0000002.mp4").frames.shape == (5, 32, 64, 3)


@pytest.mark.slow
def test_a_run_gives_its_averages_and_its_autoencoder(autoencoder_run: Path, autoencoder_config: Config):
    run = load_run(autoencoder_run)
    assert (run.config, run.step) == (autoencoder_config, 2)
    checkpoints = Checkpoints(autoencoder_run / "checkpoints", read_only=True)
    saved = checkpoints.arrays(2)
    checkpoints.close()
    config, params = load_autoencoder(str(autoencoder_run))
    assert dataclasses.replace(config, latents_mean=None, latents_std=None) == autoencoder_config.autoencoder
    kernel = params["encoder"]["conv_in"]["kernel"][...]
    np.testing.assert_array_equal(kernel, saved["ema.autoencoder.encoder.conv_in.kernel"])
    assert not np.array_equal(kernel, saved["params.autoencoder.encoder.conv_in.kernel"])
    with pytest.raises(UserError, match="has trained autoencoder and no transformer"):
        load_modules(str(autoencoder_run), {"transformer": {}})


@pytest.mark.runs
def test_a_run_can_start_from_the_parameters_of_another(autoencoder_run: Path, autoencoder_config: Config, tmp_path):
    only_steps = ["train.validate_every=0", "train.sample_every=0"]
    config = override(autoencoder_config, [f"train.init={autoencoder_run}", "train.seed=1", *only_steps])
    said: list[str] = []
    train(config, tmp_path / "run", say=said.append)
    assert f"starting from autoencoder of {autoencoder_run}" in said
    start, end = load_run(autoencoder_run).params, load_run(tmp_path / "run").params
    # In two steps Adam moves nothing by more than about twice its rate; another seed's parameters are far away.
    away = max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), start, end)))
    assert 0 < away < 2.1 * config.optimizer.learning_rate
    with pytest.raises(UserError, match=r"autoencoder\.[a-z_.0-9]+ has shape \(.*\), and this config makes \("):
        train(override(config, ["autoencoder.z_dim=4"]), tmp_path / "smaller", say=said.append)


def batches_of(config: Config, rows: int = 3, **options) -> ClipBatches:
    return ClipBatches(clip_source(config.data, 4), config.data, rows, time_stride=4, **options)


def test_batches_of_clips_mix_images_and_go_on_where_they_were(autoencoder_config: Config):
    config = override(autoencoder_config, ["data.image_share=0.5"])
    batches = batches_of(config)
    taken = [next(batches) for _ in range(8)]
    shapes = {batch.shape for batch in taken}
    # 3 videos of 5 frames are 6 latents, and so are 6 images
    assert shapes == {(3, 5, 16, 16, 3), (6, 1, 16, 16, 3)}
    state = json.loads(json.dumps(batches.state()))
    following = [next(batches) for _ in range(3)]
    batches.close()
    again = batches_of(config)
    next(again)
    again.restore(state)
    for batch in following:
        np.testing.assert_array_equal(next(again), batch)
    again.close()
    with pytest.raises(UserError, match="source was"):
        batches_of(override(config, ["data.seed=1"])).restore(state)


def test_parts_of_a_batch_are_the_batch_and_go_on_as_one(autoencoder_config: Config):
    whole = batches_of(autoencoder_config, rows=4)
    parts = [batches_of(autoencoder_config, rows=2, part=i, parts=2) for i in (0, 1)]
    for number in (0, 3):
        np.testing.assert_array_equal(np.concatenate([part.batch(number) for part in parts]), whole.batch(number))
    next(parts[1])
    whole.restore(parts[1].state())
    expected = np.concatenate([part.batch(1) for part in parts])
    np.testing.assert_array_equal(next(whole), expected)
    for batches in (whole, *parts):
        batches.close()


def test_processes_make_the_batches_of_one_thread(autoencoder_config: Config):
    config = override(autoencoder_config, ["data.image_share=0.5", "data.workers=2"])
    with contextlib.closing(batches_of(config)) as batches:
        batches.restore({"next": 3, "source": {"world": config.data.seed}})
        for number in range(3, 8):
            np.testing.assert_array_equal(next(batches), batches.batch(number))
        assert batches.state()["next"] == 8
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(LoaderError, match=r"one of 2 processes that read ahead died \(exit code -9"):
            [next(batches) for _ in range(100)]  # some of which were ready
    assert not multiprocessing.active_children()


def test_held_out_clips_are_combinations_that_training_never_shows(autoencoder_config: Config):
    held_out = clip_source(autoencoder_config.data, 4).held_out(3)
    assert held_out.shape == (3, 5, 16, 16, 3)
    scenes = sample_scenes(0, 3, split="heldout", frames=5, height=16, width=16)
    for scene in scenes:
        assert any(is_heldout(thing.combination) for thing in scene.objects)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four videos of 9 frames, each of one shade, and a picture."""
    for shade in (40, 90, 140, 190):
        frames = np.full((9, 16, 16, 3), shade, np.uint8)
        write_media(frames, tmp_path / "own" / f"{shade}.mp4", Record("", 0, "none"), fps=8.0)
    write_media(np.full((1, 16, 16, 3), 240, np.uint8), tmp_path / "own" / "z.png", Record("", 0, "none"))
    return tmp_path / "own"


def test_batches_of_a_folder_of_your_own(folder: Path, autoencoder_config: Config):
    config = override(autoencoder_config, [f"data.source={folder}", "data.image_share=0.5", "data.held_out=2"])
    batches = batches_of(config, rows=2)
    shapes, shades = set(), set()
    for number in range(12):
        batch = batches.batch(number)
        np.testing.assert_array_equal(batch, batches.batch(number))
        shapes.add(batch.shape)
        shades |= set((batch.mean(axis=(1, 2, 3, 4)) / 10).round().astype(int).tolist())
    assert shapes == {(2, 5, 16, 16, 3), (4, 1, 16, 16, 3)}
    source = clip_source(config.data, 4)
    held_out = set((source.held_out(3).mean(axis=(1, 2, 3, 4)) / 10).round().astype(int).tolist())
    assert held_out
    assert not held_out & shades
    with pytest.raises(UserError, match="data.held_out is 50"):
        clip_source(override(config, ["data.held_out=50"]).data, 4)


def test_a_size_that_the_autoencoder_cannot_make_is_refused(autoencoder_config: Config, tmp_path: Path):
    with pytest.raises(UserError, match="6 frames cannot be made"):
        train(override(autoencoder_config, ["data.frames=6"]), tmp_path, say=lambda line: None)


# ----------------------------------------------------------------------------------------------------------- diffusion


@pytest.fixture(scope="module")
def diffusion_config(autoencoder_run: Path) -> Config:
    return from_dict(
        {
            "transformer": {
                "n_layers": 1,
                "n_heads": 1,
                "head_dim": 8,
                "ffn_dim": 16,
                "in_channels": 8,
                "out_channels": 8,
                "patch": (1, 1, 1),
                "text_dim": 8,
                "frequency_dim": 8,
            },
            "text_encoder": {"vocab_size": 384, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2},
            "data": DATA | {"autoencoder": str(autoencoder_run)},
            "optimizer": {"name": "muon", "warmup_steps": 0},
            "train": TRAIN,
            "sample": {"steps": 2, "frames": 5, "height": 16, "width": 16, "prompts": ("a ball", "two balls", "none")},
        }
    )


@pytest.mark.slow
def test_diffusion_from_nothing_prepared(diffusion_config: Config, tmp_path: Path):
    said: list[str] = []
    train(diffusion_config, tmp_path, say=said.append)
    assert any(line.startswith("encoding world to") for line in said)
    cache = LatentSource(tmp_path / "latents")
    assert len(cache) == 40
    assert cache[0].latents.shape == (3, 2, 2, 8)
    first, last = lines(tmp_path)
    assert np.isfinite(first["loss"])
    assert sum(name.startswith("validation_loss_0") for name in last) == 10
    levels = [value for name, value in last.items() if name.startswith("validation_loss_0")]
    assert last["validation_loss"] == pytest.approx(np.mean(levels), rel=1e-5)
    # three prompts in a grid of two by two
    assert read_media(tmp_path / "samples" / "0000002.mp4").frames.shape == (5, 32, 32, 3)
    # the cache is whole: a second run does not encode
    said.clear()
    train(override(diffusion_config, ["train.steps=3"]), tmp_path, say=said.append)
    assert not any(line.startswith("encoding") for line in said)
    assert len(lines(tmp_path)) == 3


@pytest.mark.slow
def test_what_does_not_fit_together_is_refused(diffusion_config: Config, tmp_path: Path):
    for changes, words in (
        (["transformer.text_dim=16"], "transformer.text_dim 16 is not the width"),
        ([f"data.latents={tmp_path / 'nothing'}"], "latent cache .*nothing is not there"),
        (["data.autoencoder=nowhere"], "unknown model 'nowhere'"),
        (["train.init=nowhere"], "unknown model 'nowhere'"),
        (["train.text_init=nowhere"], "unknown model 'nowhere'"),
        (["train.init=world"], r"has shape .* and this config makes"),
        (["data.row_tokens=11"], "a clip of 5 frames, 16x16, has 12 tokens and a row holds 11: raise row_tokens to 12"),
        (["data.image_share=0.8", "data.prefix_share=0.3"], "more than 1 together"),
        (["sample.frames=4"], "4 frames cannot be made"),
        (["sample.steps=0"], "steps must be at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            train(override(diffusion_config, changes), tmp_path / "run", say=lambda line: None)
        assert not (tmp_path / "run").exists(), "not a clip was encoded"


@pytest.mark.slow
def test_latents_are_scaled_by_what_the_run_of_their_autoencoder_measured(autoencoder_run: Path):
    config, params = load_autoencoder(str(autoencoder_run))
    model = nnx.merge(nnx.split(nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0))), graph=False)[0], params)
    # other clips than those that were measured, of the same world
    clips = np.stack([item["frames"] for item in WorldSource(0, 64, frames=5, height=16, width=16).batch(range(64))])
    latents = np.asarray(model.normalize(model.encode(jnp.asarray(clips, jnp.float32) / 127.5 - 1.0).mean))
    np.testing.assert_allclose(latents.mean(axis=(0, 1, 2, 3)), 0.0, atol=0.3)
    np.testing.assert_allclose(latents.std(axis=(0, 1, 2, 3)), 1.0, atol=0.25)


@pytest.mark.runs
def test_a_decoder_can_learn_on_without_moving_the_latents(
    autoencoder_run: Path, autoencoder_config: Config, diffusion_config: Config, tmp_path: Path
):
    frozen = [f"train.init={autoencoder_run}", "reconstruction.train_encoder=False", "optimizer.weight_decay=0.1"]
    frozen += ["train.seed=1", "train.validate_every=0", "train.sample_every=0"]
    frozen += ["autoencoder.decoder_dim_mult=(1,2)"]  # and may have other widths than it had
    said: list[str] = []
    train(override(autoencoder_config, frozen), tmp_path / "decoder", say=said.append)
    assert "starting anew, in other shapes than its: autoencoder.decoder" in said
    (config, before), (wider, after) = (
        load_autoencoder(str(autoencoder_run)),
        load_autoencoder(str(tmp_path / "decoder")),
    )
    assert config == dataclasses.replace(wider, decoder_dim_mult=None), "the statistics are those of cached latents"
    for part in ("encoder", "quant_conv"):
        jax.tree.map(np.testing.assert_array_equal, before[part], after[part])
    assert np.abs(before["post_quant_conv"]["kernel"][...] - after["post_quant_conv"]["kernel"][...]).max() > 0
    with pytest.raises(UserError, match=r"keeps an encoder as it is: name its model in train\.init"):
        train(override(autoencoder_config, frozen[1:]), tmp_path / "none", say=lambda line: None)
    with pytest.raises(UserError, match=r"autoencoder\.decoder\.[a-z_.0-9]+ has shape"):  # where the encoder learns too
        train(override(autoencoder_config, [frozen[0], frozen[-1]]), tmp_path / "none", say=lambda line: None)

    # a video model takes the new decoder, and no other's
    train(override(diffusion_config, ["train.sample_every=0"]), tmp_path / "video", say=lambda line: None)
    model = model_of_run(epath.Path(tmp_path / "video"), autoencoder=str(tmp_path / "decoder"))
    jax.tree.map(np.testing.assert_array_equal, model.autoencoder["decoder"], after["decoder"])
    with pytest.raises(UserError, match="makes other latents than"):
        model_of_run(epath.Path(tmp_path / "video"), autoencoder="world")


# ---------------------------------------------------------------------------------------------------------------- text


@pytest.mark.runs
def test_a_text_encoder_learns_to_read_and_a_diffusion_run_starts_from_it(diffusion_config: Config, tmp_path: Path):
    changes = ["train.stage=text", "train.steps=60", "train.batch_size=32", "data.held_out=8"]
    changes += ["optimizer.learning_rate=0.02", "train.sample_every=0", "train.log_every=1"]
    train(override(diffusion_config, changes), tmp_path / "text", say=lambda line: None)
    first, *_, last = lines(tmp_path / "text")
    assert last["loss"] < 0.8 * first["loss"]
    assert last["validation_accuracy"] > 0.5
    run = load_run(tmp_path / "text")
    encoder = nnx.merge(
        structure_of(lambda rngs: TextEncoder(run.config.text_encoder, rngs=rngs)), run.params["text_encoder"]
    )
    size = np.sqrt(np.square(encoder(jnp.arange(3, 35)[None], jnp.ones((1, 32), jnp.int32))).mean(axis=-1))
    np.testing.assert_allclose(size, 0.25, rtol=1e-3, err_msg="embeddings whisper, however long they are trained")
    with pytest.raises(UserError, match="has trained reader and text_encoder alone|text_encoder and reader alone"):
        model_of_run(epath.Path(tmp_path / "text"))

    said: list[str] = []
    frozen = ["train.steps=1", "optimizer.learning_rate=0", "optimizer.name=adamw", "train.sample_every=0"]
    frozen += [f"train.init={tmp_path / 'text'}"]
    train(override(diffusion_config, frozen), tmp_path / "video", say=said.append)
    assert f"starting from text_encoder of {tmp_path / 'text'}" in said
    read, started = run.params, load_run(tmp_path / "video").params
    assert_equal(started["text_encoder"], read["text_encoder"])

    alone = [*frozen, "train.learns=transformer", "train.anew=True"]
    train(override(diffusion_config, alone), tmp_path / "alone", say=said.append)
    model = model_of_run(epath.Path(tmp_path / "alone"))
    assert_equal(model.text_encoder, read["text_encoder"])
    assert_equal(model.transformer, load_run(tmp_path / "alone").params["transformer"])
    assert model.tokenizer.max_length == diffusion_config.data.row_text

    both = [*frozen[:-1], "train.seed=7", f"train.init={tmp_path / 'video'}", "train.text_init=world-1"]
    with pytest.raises(UserError, match=r"text_encoder\..* has shape .* and this config makes"):
        train(override(diffusion_config, both), tmp_path / "wrong", say=lambda line: None)
    train(
        override(diffusion_config, ["train.stage=text", "train.seed=3", *frozen[:-1]]),
        tmp_path / "other",
        say=said.append,
    )
    both[-1] = f"train.text_init={tmp_path / 'other'}"
    train(override(diffusion_config, both), tmp_path / "both", say=said.append)
    joined = load_run(tmp_path / "both").params
    assert_equal(joined["transformer"], started["transformer"])
    assert_equal(joined["text_encoder"], load_run(tmp_path / "other").params["text_encoder"])

    # blocks go on with tokens of another kind, where that is asked for
    patches = [*frozen[:-1], f"train.init={tmp_path / 'video'}", "transformer.patch=(1,2,2)"]
    with pytest.raises(UserError, match=r"transformer\.(patch_embed|head)\..* has shape .* and this config makes"):
        train(override(diffusion_config, patches), tmp_path / "wrong", say=lambda line: None)
    train(override(diffusion_config, [*patches, "train.other_latents=True"]), tmp_path / "patches", say=said.append)
    assert said.count("starting anew, in other shapes than its: transformer.patch_embed, transformer.head") == 1
    moved = load_run(tmp_path / "patches").params
    assert moved["transformer"]["patch_embed"]["kernel"].shape == (4 * 8, 8)
    for part in started["transformer"].keys() - {"patch_embed", "head"}:
        assert_equal(moved["transformer"][part], started["transformer"][part])
    assert_equal(moved["text_encoder"], started["text_encoder"])


def assert_equal(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


# ------------------------------------------------------------------------------------------------------------- pictures


def test_grid_and_film_strips():
    videos = [np.full((4, 2, 3, 3), shade, np.uint8) for shade in (10, 20, 30)]
    assert grid(videos).shape == (4, 4, 6, 3)
    assert grid(videos)[0, ::2, ::3, 0].tolist() == [[10, 20], [30, 0]]
    strip = film_strips([np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)], frames=5)
    assert strip.shape == (2, 15, 3)
    assert strip[0, ::3, 0].tolist() == [0, 2, 4, 6, 8]
