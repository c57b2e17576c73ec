"""Encoding to a cache: the autoencoder's own latents, whole after any interruption, and never of two autoencoders."""

from __future__ import annotations

import json
import multiprocessing
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from sora_jax import cli
from sora_jax.data.latents import LatentSource
from sora_jax.errors import UserError
from sora_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sora_jax.shapes import Extent
from sora_jax.training.encoding import autoencoder_hash, encode_clips


class Clips:
    """Random clips of these lengths, of 8x8; those in `bad` cannot be read, and `stop` presses Ctrl-C."""

    identity: ClassVar = {"made": "in memory"}
    extents = (Extent(5, 8, 8),)

    def __init__(self, lengths, bad=(), stop=None):
        self.lengths, self.bad, self.stop = lengths, bad, stop

    def __len__(self):
        return len(self.lengths)

    def frames(self, index):
        return np.random.default_rng(index).integers(0, 256, (5, 8, 8, 3), np.uint8)[: self.lengths[index]]

    def batch(self, indices):
        if self.stop in indices:
            raise KeyboardInterrupt
        return [
            f"clip {index}: torn"
            if index in self.bad
            else {
                "frames": self.frames(index),
                "captions": [f"clip {index}"],
                "captions_image": [],
                "fps": 8.0,
                "source": f"clip/{index}",
            }
            for index in indices
        ]


@pytest.fixture(scope="module")
def autoencoder():
    """Config and parameters: strides 2, 4, 4, and statistics of latents that are not 0 and 1."""
    config = AutoencoderConfig(
        base_dim=4,
        z_dim=8,
        dim_mult=(1, 2),
        num_res_blocks=1,
        temperal_downsample=(True,),
        patch_size=2,
        latents_mean=tuple(np.linspace(-1, 1, 8).tolist()),
        latents_std=tuple(np.linspace(0.5, 2, 8).tolist()),
    )
    draw = np.random.default_rng(0)
    shapes = nnx.split(nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0))), graph=False)[1]
    return config, jax.tree.map(lambda leaf: jnp.asarray(0.3 * draw.standard_normal(leaf.shape, np.float32)), shapes)


@pytest.fixture
def encode(autoencoder, one_device_mesh, tmp_path):
    def run(source, out="cache", autoencoder=autoencoder, **options):
        options = {"batch_size": 3, "clips_per_shard": 4, "mesh": one_device_mesh, "name": "tiny", **options}
        return encode_clips(source, *autoencoder, tmp_path / out, **options)

    return run


def test_latents_are_those_of_each_clip_alone(encode, autoencoder, tmp_path):
    config, params = autoencoder
    source = Clips([5, 1, 3, 5, 1, 3, 5])
    seen = []
    encoded = encode(source, progress=lambda done, total: seen.append((done, total)))
    assert (encoded.clips, encoded.made, encoded.left_out) == (7, 7, ())
    assert seen == [(0, 7), (3, 7), (4, 7), (7, 7)]  # shards of 4 and 3, in batches of 3

    graphdef = nnx.split(nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0))), graph=False)[0]
    alone = jax.jit(lambda video: nnx.merge(graphdef, params).encode(video).mean)
    cache = LatentSource(tmp_path / "cache")
    assert cache.info.stride == (2, 4, 4)
    for index, record in enumerate(cache):
        frames = source.frames(index)
        raw = np.asarray(alone(jnp.asarray(frames[None]).astype(jnp.float32) / 127.5 - 1))[0]
        expected = (raw - np.linspace(-1, 1, 8)) / np.linspace(0.5, 2, 8)
        assert record.latents.shape == (1 + (len(frames) - 1) // 2, 2, 2, 8)
        np.testing.assert_allclose(record.latents, expected, rtol=2e-3, atol=2e-3)  # float16
        assert (record.source, record.pixels) == (f"clip/{index}", frames.shape[:3])
    assert np.std([record.latents[0].mean() for record in cache]) > 1e-3, "clips differ"


class Full(Clips):
    """A source that gives up at its sixth clip."""

    def batch(self, indices):
        if 5 in indices:
            raise UserError("too many clips cannot be read")
        return super().batch(indices)


def test_processes_read_what_threads_read(encode, tmp_path):
    lengths = [5, 1, 3, 5, 1] * 5
    read_by_threads = encode(Clips(lengths, bad=(4,)))
    read_by_processes = encode(Clips(lengths, bad=(4,)), "again", workers=2)
    assert read_by_processes._replace(seconds=0) == read_by_threads._replace(seconds=0, programs=0)  # compiled before
    assert read_by_processes.left_out == ("clip 4: torn",)
    for one, other in zip(LatentSource(tmp_path / "cache"), LatentSource(tmp_path / "again"), strict=True):
        assert one.source == other.source
        np.testing.assert_array_equal(one.latents, other.latents)
    with pytest.raises(UserError, match="^too many clips cannot be read$"):
        encode(Full([5] * 9), "stopped", workers=2)
    assert not multiprocessing.active_children()
    assert encode(Clips([5] * 9), "stopped").made == 9 - 4  # by threads again; the first shard was whole
    with pytest.raises(UserError, match="no fewer than 0 processes: not 3, 2 and -1"):
        encode(Clips([5]), "none", workers=-1)


def test_each_shot_of_a_cut_clip_is_encoded_alone(encode, autoencoder, tmp_path):
    class Cut(Clips):
        """Every other clip has a shot of 5 frames and one of 3."""

        def batch(self, indices):
            return [self.cut(clip) if int(clip["source"][5:]) % 2 else clip for clip in super().batch(indices)]

        def cut(self, clip):
            more = np.random.default_rng(99).integers(0, 256, (3, 8, 8, 3), np.uint8)
            shots = [(5, ["before", "at first"]), (3, ["after"])]
            return {**clip, "frames": np.concatenate([clip["frames"], more]), "captions": [], "shots": shots}

    encode(Cut([5, 5, 1, 5, 5, 5]))  # in batches of three clips, which have up to five shots
    encode(Clips([5, 5, 1, 5, 5, 5]), "whole")
    alone = [{"frames": Cut([5]).cut({"frames": np.zeros((0, 8, 8, 3), np.uint8)})["frames"]}]
    second = Clips([3])
    second.frames = lambda index: alone[0]["frames"]
    encode(second, "second")
    cache, whole = LatentSource(tmp_path / "cache"), LatentSource(tmp_path / "whole")
    (after,) = LatentSource(tmp_path / "second")
    for index, (record, other) in enumerate(zip(cache, whole, strict=True)):
        first = record.latents[: len(other.latents)]
        np.testing.assert_array_equal(first, other.latents)
        if index % 2:
            assert [shot.latents for shot in record.shots] == [3, 2]
            assert [shot.captions for shot in record.shots] == [("before", "at first"), ("after",)]
            assert record.pixels == (8, 8, 8)
            np.testing.assert_array_equal(record.latents[3:], after.latents)
        else:
            assert record.shots == ()
            assert len(record.latents) == len(other.latents)


def test_first_latent_is_that_of_the_first_frame(encode, tmp_path):
    """So that images, and shorter clips, may be cut from the latents of a clip."""
    encode(Clips([5, 5]), "videos")
    encode(Clips([1, 3]), "parts")
    videos, (image, part) = LatentSource(tmp_path / "videos"), LatentSource(tmp_path / "parts")
    np.testing.assert_allclose(image.latents[0], videos[0].latents[0], atol=4e-3)
    np.testing.assert_allclose(part.latents, videos[1].latents[:2], atol=4e-3)


def test_interrupted_encoding_ends_as_if_it_had_not_been(encode, tmp_path):
    lengths = [5, 1] * 6
    encode(Clips(lengths), "straight")
    with pytest.raises(KeyboardInterrupt):
        encode(Clips(lengths, stop=9))
    again = encode(Clips(lengths))
    assert (again.clips, again.made) == (12, 4), "two of the three shards were there"
    for name in sorted(path.name for path in (tmp_path / "straight").iterdir()):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "cache" / name).read_bytes()
    assert encode(Clips(lengths)).made == 0


def test_devices_share_a_batch(encode, tmp_path):
    from sora_jax.sharding import make_mesh

    encode(Clips([1] * 5), "one", batch_size=5)
    encode(Clips([1] * 5), "two", batch_size=5, mesh=make_mesh({"data": 2}, jax.devices()[:2]))
    for one, two in zip(LatentSource(tmp_path / "one"), LatentSource(tmp_path / "two"), strict=True):
        np.testing.assert_allclose(one.latents, two.latents, atol=4e-3)


def test_another_autoencoder_is_refused(encode, autoencoder, tmp_path):
    config, params = autoencoder
    encode(Clips([1] * 3))

    def nudged(part):
        flat = dict(nnx.to_flat_state(params))
        path = next(path for path in flat if path[0] == part)
        flat[path] = flat[path].replace(flat[path].get_value() + 1e-6)
        return nnx.from_flat_state(flat.items())

    other = nudged("encoder")
    assert autoencoder_hash(config, nudged("quant_conv")) != autoencoder_hash(config, params)
    assert autoencoder_hash(config, nudged("decoder")) == autoencoder_hash(config, params), "it makes no latents"
    assert autoencoder_hash(config, params) == autoencoder_hash(config, jax.tree.map(jnp.array, params))
    with pytest.raises(UserError, match=r"holds latents of autoencoder tiny \(\w{12}\), not mine \(\w{12}\)"):
        encode(Clips([1] * 3), autoencoder=(config, other), name="mine")
    with pytest.raises(UserError, match=r"holds latents of autoencoder tiny"):
        encode(Clips([1] * 3), autoencoder=(type(config)(**{**config.__dict__, "latents_mean": None}), params))


def test_clips_that_cannot_be_read(encode, tmp_path):
    few = encode(Clips([1] * 20, bad=[7]), "few")
    assert (few.clips, few.left_out) == (19, ("clip 7: torn",))
    assert [record.source for record in LatentSource(tmp_path / "few")][6:8] == ["clip/6", "clip/8"]
    with pytest.raises(
        UserError, match=r"2 of 20 clips cannot be read, more than the 5% .*: clip 7: torn; clip 9: torn"
    ):
        encode(Clips([1] * 20, bad=[7, 9]), "many")


def test_the_encoder_is_compiled_once_for_each_size(encode):
    class Sized(Clips):
        """Videos, of sizes in turn, that no other test has."""

        extents = (Extent(5, 8, 12), Extent(5, 12, 8))

        def frames(self, index):
            _, height, width = self.extents[index // 2 % 2]
            return np.zeros((self.lengths[index], height, width, 3), np.uint8)

    assert encode(Sized([5, 3] * 4), "videos").programs == 2
    assert encode(Sized([5, 1] * 4), "both").programs == 2, "those of the images; the others are there"


def test_sizes_that_do_not_fit_leave_nothing_behind(encode, tmp_path):
    source = Clips([5])
    source.extents = (Extent(5, 8, 10),)
    with pytest.raises(UserError, match="width 10 cannot be made: it must be a multiple of 4; nearest: 8 or 12"):
        encode(source)
    assert not (tmp_path / "cache").exists()


# --------------------------------------------------------------------------------------------------------- command line


def run(capsys, *argv):
    code = cli.main(["encode", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command_encodes_the_world(capsys, tiny_model, tmp_path):
    size = ["--frames", 5, "--height", 16, "--width", 16, "--batch-size", 8, "--autoencoder", tiny_model]
    code, out, err = run(capsys, "world", "--clips", 6, "--seed", 3, "--out", tmp_path / "w", "--json", *size)
    assert code == 0, err
    document = json.loads(out)
    assert (document["clips"], document["made"], document["left_out"]) == (6, 6, [])
    cut = ["--shots", "5+1", *size[2:]]
    assert run(capsys, "world", "--clips", 3, "--seed", 3, "--out", tmp_path / "cut", *cut)[0] == 0
    for clip in LatentSource(tmp_path / "cut"):
        assert [shot.latents for shot in clip.shots] == [2, 1]
        assert all(len(shot.captions) == 6 for shot in clip.shots)
    assert json.loads((tmp_path / "cut" / "manifest.json").read_text())["source"]["shots"] == [[5, 1]]
    source = LatentSource(tmp_path / "w")
    assert [record.source for record in source] == [f"world/train/3/{i}" for i in range(6)]
    assert {(len(r.captions), len(r.captions_image)) for r in source} == {(6, 3)}
    assert source.info.source["seed"] == 3

    assert run(capsys, "world", "--clips", 8, "--seed", 3, "--out", tmp_path / "w", *size)[0] == 0
    assert len(LatentSource(tmp_path / "w")) == 8
    code, _, err = run(capsys, "world", "--clips", 8, "--seed", 4, "--out", tmp_path / "w", *size)
    assert (code, "was encoded with seed = 3, not 4" in err) == (2, True)


def test_command_takes_another_mix_of_the_world(capsys, tiny_model, tmp_path):
    size = ["--frames", 5, "--height", 32, "--width", 32, "--clips", 8, "--autoencoder", tiny_model]
    others = "single=0,collision=0,occluder=0,pan=0,twins=1,together=0,apart=0"
    code, _, err = run(capsys, "world", "--out", tmp_path / "twins", "--mix", others, *size)
    assert code == 0, err
    captions = [caption for record in LatentSource(tmp_path / "twins") for caption in record.captions]
    assert all("two" in caption or "both" in caption or "pair" in caption for caption in captions), captions
    code, _, err = run(capsys, "world", "--out", tmp_path / "twins", *size)
    assert (code, "was encoded with mix" in err) == (2, True)


def test_command_encodes_a_folder(capsys, tiny_model, tmp_path):
    (tmp_path / "mine").mkdir()
    for index in range(21):
        Image.fromarray(np.full((20, 30, 3), 10 * index, np.uint8)).save(tmp_path / f"mine/{index:02}.png")
        (tmp_path / f"mine/{index:02}.txt").write_text(f"grey number {index}")
    (tmp_path / "mine/20.png").write_bytes(b"garbage")
    options = ["--out", tmp_path / "c", "--autoencoder", tiny_model, "--frames", 5, "--height", 16, "--width", 16]
    code, out, err = run(capsys, tmp_path / "mine", "--batch-size", 8, *options)
    assert code == 0, err
    assert "20 clips, 20 of them now, 1 left out" in out
    assert "left out, could not be read: 20.png: cannot identify image file" in err
    assert [r.captions for r in LatentSource(tmp_path / "c")][:2] == [("grey number 0",), ("grey number 1",)]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["world"], "how many clips of the world?"),
        (["world", "--clips", "5", "--fps", "12"], "--fps is for a folder, and the world has 8 frames a second"),
        (["world", "--clips", "0"], "a world has at least 1 clip, not 0"),
        (["world", "--clips", "5", "--split", "test"], 'no split "test"; known: heldout, train'),
        (["world", "--clips", "5", "--sizes", "64"], '--sizes takes HxW,HxW,..., say 64x64,64x96: "64" is no size'),
        (["world", "--clips", "5", "--mix", "pairs=1"], 'nothing in the world is called "pairs": did you mean "pair"?'),
        (["world", "--clips", "5", "--mix", "pair"], '--mix takes NAME=WEIGHT,..., say pair=0.5: "pair" is none'),
        (["world", "--clips", "5", "--mix", "pair=-1"], "the world's mix has weights >= 0: pair cannot be -1.0"),
        (["nowhere", "--mix", "pair=1"], "--mix is for the world, and this is a folder"),
        (["world", "--clips", "5", "--frames", "16"], "16 frames cannot be made: a video has 1 + 4k frames"),
        (["world", "--clips", "5", "--seed", "-1"], "seed must be a whole number from 0"),
        (["nowhere", "--clips", "5"], "--clips is for the world, and this is a folder"),
        (["nowhere"], "the data folder nowhere is not there"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(capsys, monkeypatch, tiny_model, tmp_path, argv, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv, "--out", "cache", "--autoencoder", tiny_model)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
