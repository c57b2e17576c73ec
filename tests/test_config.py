"""Configs: what is found, what is refused and with which words, and that nothing is lost on the way to disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sora_jax import config as configs
from sora_jax.config import Config, difference, from_json, load_config, override, to_json
from sora_jax.errors import UserError
from sora_jax.shapes import Stride


@pytest.mark.parametrize("name", sorted(configs.shipped_configs()))
def test_shipped_configs_load_and_say_how_they_are_run(name: str):
    config = load_config(name)
    assert dataclasses.is_dataclass(config)
    assert f"--config {name} " in configs.shipped_configs()[name].read_text().split('"""')[1]


def test_a_config_may_change_another(tmp_path: Path):
    text = "import ml_collections\nBASE = {!r}\n"
    text += (
        "def get_config():\n    return ml_collections.ConfigDict({{'train': {{'steps': 7}}, 'data': {{'fps': 4.0}}}})\n"
    )
    (tmp_path / "mine.py").write_text(text.format("world"))
    changed = configs.load_config(str(tmp_path / "mine.py"))
    assert configs.difference(configs.load_config("world"), changed) == [
        "data.fps: 8.0 -> 4.0",
        "train.steps: 5000 -> 7",
    ]
    (tmp_path / "mine.py").write_text(text.format("wrold"))
    with pytest.raises(UserError, match='unknown config "wrold": did you mean "world"'):
        configs.load_config(str(tmp_path / "mine.py"))
    (tmp_path / "mine.py").write_text(text.format(str(tmp_path / "mine.py")))
    with pytest.raises(UserError, match="names itself as its BASE"):
        configs.load_config(str(tmp_path / "mine.py"))


def test_a_config_may_have_a_section_of_another(tmp_path: Path):
    text = "import ml_collections\nBASE = 'world_text'\nLIKE = {!r}\n"
    text += "def get_config():\n    return ml_collections.ConfigDict({{'data': {{'mix': {{'trio': 0.5}}}}}})\n"
    (tmp_path / "mine.py").write_text(text.format({"data.mix": "world_2"}))
    mixed, second = load_config(str(tmp_path / "mine.py")), load_config("world_2")
    assert difference(
        second, dataclasses.replace(second, data=dataclasses.replace(second.data, mix=mixed.data.mix))
    ) == ["data.mix.trio: 0.08 -> 0.5"]
    assert difference(load_config("world_text"), mixed, free=("data.mix",)) == []
    (tmp_path / "mine.py").write_text(text.format({"data.mux": "world_2"}))
    with pytest.raises(UserError, match="wants data.mux as in world_2, which has no such section"):
        load_config(str(tmp_path / "mine.py"))
    (tmp_path / "mine.py").write_text(text.format({"data.mix": str(tmp_path / "mine.py")}))
    with pytest.raises(UserError, match="names itself as its LIKE"):
        load_config(str(tmp_path / "mine.py"))


def test_the_second_world_has_one_mix():
    mixes = {load_config(name).data.mix for name in ("world_2", "world_2_text", "world_2_autoencoder")}
    assert len(mixes) == 1
    assert not mixes.pop().plain
    assert load_config("world").data.mix.plain


def test_shipped_configs_import_nothing_of_the_package():
    for path in configs.shipped_configs().values():
        assert "sora_jax" not in path.read_text().split('"""', 2)[2]


def test_world_model_fits_together():
    world, autoencoder = load_config("world"), load_config("world_autoencoder").autoencoder
    assert world.transformer.in_channels == world.transformer.out_channels == autoencoder.z_dim
    assert world.transformer.text_dim == world.text_encoder.d_model
    latents = [
        1 + (world.data.frames - 1) // autoencoder.stride.time,
        world.data.height // autoencoder.stride.height,
        world.data.width // autoencoder.stride.width,
    ]
    assert latents == [5, 4, 4]
    assert world.data.row_tokens >= latents[0] * latents[1] * latents[2]
    assert world.data.groups >= latents[0]


def test_config_by_path(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    config = ml_collections.ConfigDict()\n"
        "    config.train = {'steps': 7}\n"
        "    config.transformer = {'patch': [1, 2, 2]}\n"
        "    return config\n"
    )
    config = load_config(str(path), ["train.seed=3"])
    assert (config.train.steps, config.train.seed) == (7, 3)
    assert config.transformer.patch == Stride(1, 2, 2)
    assert isinstance(config.transformer.patch, Stride)
    assert config.optimizer == Config().optimizer


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config(:\n", "SyntaxError"),
        ("x = 1\n", "no get_config()"),
        ("def get_config():\n    return {}['a']\n", "KeyError"),
        ("import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({'trian': {}})\n", '"train'),
        ("import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({'train': 3})\n", "section"),
    ],
)
def test_broken_config_file_is_one_line(tmp_path: Path, text: str, words: str):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(UserError, match="^[^\n]*$") as error:
        load_config(str(path))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("train.steps=12", 12),
        ("train.steps=1_000", 1000),
        ("optimizer.learning_rate=1e-4", 1e-4),
        ("optimizer.learning_rate=1", 1.0),
        ("optimizer.name=adamw", "adamw"),
        ("optimizer.rms_match=false", False),
        ("data.latents=gs://bucket/latents", "gs://bucket/latents"),
        ("data.latents=a=b", "a=b"),
        ("autoencoder.patch_size=2", 2),
        ("autoencoder.patch_size=none", None),
        ("transformer.patch=1,2,2", Stride(1, 2, 2)),
        ("transformer.patch=(1, 2, 2)", Stride(1, 2, 2)),
        ("sample.prompts=('one', 'two')", ("one", "two")),
        ("train.mesh.fsdp=4", 4),
        ("levels.modes.first=2", 2.0),
    ],
)
def test_overrides_take_the_type_of_what_they_replace(text: str, value: object):
    found: object = override(Config(), [text])
    for name in text.partition("=")[0].split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.stepz=3", 'unknown config key "train.stepz": did you mean "train.steps"?'),
        ("trian.steps=3", 'did you mean "train.steps"?'),
        ("optimizer.lerning_rate=3", 'did you mean "optimizer.learning_rate"?'),
        ("train.mesh.tensors=3", 'did you mean "train.mesh.tensor"?'),
        ("train.steps", "has no value: write train.steps=VALUE"),
        ("train=3", '"train" is a section'),
        ("train.steps=abc", "\"train.steps\" takes a whole number, not 'abc'"),
        ("train.steps=1.5", '"train.steps" takes a whole number, not 1.5 (float)'),
        ("data.fps=nan", '"data.fps" takes a finite number, not nan'),
        ("data.stalled_seconds=inf", '"data.stalled_seconds" takes a finite number, not inf'),
        ("data.mix.pair=nan", '"data.mix.pair" takes a finite number, not nan'),
        ("data.fps=fast", "\"data.fps\" takes a number, not 'fast'"),
        ("optimizer.rms_match=maybe", '"optimizer.rms_match" takes True or False'),
        ("optimizer.name=adam", 'did you mean "adamw"? (known: adamw, muon)'),
        ("transformer.patch=1,2", '"transformer.patch" takes (time, height, width)'),
        ("transformer.remat=ful", 'did you mean "full"?'),
        ("train.steps=0", "train.steps must be >= 1, not 0"),
        ("train.ema=1.0", "train.ema must be in [0, 1)"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate must be >= 0"),
    ],
)
def test_wrong_overrides_name_the_right_thing(text: str, words: str):
    with pytest.raises(UserError, match="^[^\n]*$") as error:
        override(Config(), [text])
    assert words in str(error.value)


@pytest.mark.parametrize(("name", "words"), [("wrld", '"world"'), ("nowhere.py", "not there"), ("a/b", "not there")])
def test_unknown_config_names_the_known(name: str, words: str):
    with pytest.raises(UserError) as error:
        load_config(name)
    assert words in str(error.value)


def test_json_gives_the_config_back():
    config = load_config("world", ["sample.prompts=('é', 'b')", "autoencoder.patch_size=4", "optimizer.eps=1e-12"])
    assert from_json(to_json(config)) == config
    assert hash(from_json(to_json(config)).transformer) == hash(config.transformer)


def test_difference_is_readable_and_leaves_out_what_is_free():
    old = load_config("world")
    new = override(old, ["train.steps=5", "train.mesh.fsdp=2", "optimizer.b2=0.5", "transformer.patch=1,2,2"])
    lines = difference(old, new)
    assert sorted(line.partition(":")[0] for line in lines) == [
        "optimizer.b2",
        "train.mesh.fsdp",
        "train.steps",
        "transformer.patch",
    ]
    assert "optimizer.b2: 0.99 -> 0.5" in lines
    free = difference(old, new, configs.FREE_ON_RESUME)
    assert sorted(line.partition(":")[0] for line in free) == ["optimizer.b2", "transformer.patch"]
    assert difference(old, old) == []
