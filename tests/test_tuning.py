"""Tuning a model: the transformer alone, or adapters on it; what does not learn stays as it was."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from sora_jax import cli
from sora_jax.config import Config, from_dict, load_config, override
from sora_jax.errors import UserError
from sora_jax.models.transformer import Transformer, TransformerConfig
from sora_jax.pipeline import Pipeline
from sora_jax.training.adapters import complete, merge_adapters, split_adapters
from sora_jax.training.loop import train
from sora_jax.training.pretrained import load_run
from sora_jax.weights.layout import load_folder, save_folder
from sora_jax.weights.safetensors_io import read_header

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_training")]


@pytest.fixture(scope="module")
def config(tiny_model: Path, quick_training: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Of a run that tunes the tiny model's adapters, on latents that are made once."""
    folder = load_folder(tiny_model)
    t, e = folder.transformer_config, folder.text_encoder_config
    config = from_dict(
        {
            "transformer": {
                "n_layers": t.n_layers,
                "n_heads": t.n_heads,
                "head_dim": t.head_dim,
                "ffn_dim": t.ffn_dim,
                "in_channels": t.in_channels,
                "out_channels": t.out_channels,
                "patch": tuple(t.patch),
                "text_dim": t.text_dim,
                "frequency_dim": t.frequency_dim,
                "lora_rank": 2,
                "lora_alpha": 3.0,
            },
            "text_encoder": {
                name: getattr(e, name) for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
            },
            "data": {
                "autoencoder": str(tiny_model),
                "frames": 5,
                "height": 16,
                "width": 16,
                "clips": 24,
                "held_out": 4,
                "row_tokens": 200,
                "image_share": 0.0,
            },
            "optimizer": {"warmup_steps": 0, "learning_rate": 0.01, "weight_decay": 0.0},
            "train": {
                "init": str(tiny_model),
                "learns": "lora",
                "batch_size": 2,
                "steps": 3,
                "log_every": 1,
                "validate_every": 3,
                "sample_every": 0,
                "checkpoint_every": 0,
                "mesh": {"data": 1},
            },
        }
    )
    first = tmp_path_factory.mktemp("first") / "run"
    train(override(config, ["train.steps=1"]), first, say=lambda line: None)
    return override(config, [f"data.latents={first / 'latents'}"])


def test_adapters_start_as_nothing_and_merged_they_do_what_they_did():
    plain = TransformerConfig(
        n_layers=2, n_heads=2, head_dim=6, ffn_dim=20, in_channels=3, out_channels=3, text_dim=8, frequency_dim=8
    )
    with_adapters = dataclasses.replace(plain, lora_rank=3, lora_alpha=6.0)
    graphdef, params = nnx.split(Transformer(with_adapters, rngs=nnx.Rngs(0)), graph=False)
    base, adapters = split_adapters(params)
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4, jnp.float32), adapters)
    x = jnp.asarray(rng.normal(size=(2, 5, 12)), jnp.float32)

    def first_layer(transformer: nnx.State, structure: nnx.GraphDef) -> jax.Array:
        blocks = nnx.merge(structure, transformer).blocks
        layers = nnx.split(blocks, graph=False)
        return nnx.merge(layers[0], jax.tree.map(lambda leaf: leaf[0], layers[1])).ffn(x)

    plain_graphdef, _ = nnx.split(Transformer(plain, rngs=nnx.Rngs(0)), graph=False)
    before = first_layer(base, plain_graphdef)
    kept = {"transformer": base}
    untrained, live = (
        first_layer(complete(kept, {"adapters": some})["transformer"], graphdef) for some in (adapters, drawn)
    )
    np.testing.assert_array_equal(untrained, before)
    merged = first_layer(merge_adapters(with_adapters, base, drawn), plain_graphdef)
    assert np.abs(live - before).max() > 0.1
    np.testing.assert_allclose(live, merged, atol=1e-5 * float(np.std(live)))


@pytest.mark.runs
def test_a_run_of_adapters_leaves_the_model_and_hands_back_both(
    config: Config, tiny_model: Path, tmp_path: Path, capsys
):
    said: list[str] = []
    train(config, tmp_path / "run", say=said.append)
    assert f"keeping text_encoder, transformer of {tiny_model} as they are" in said
    run = load_run(tmp_path / "run")
    assert set(run.params) == {"adapters"}
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(run.params["adapters"])), "B has left zero"

    base = load_folder(tiny_model)
    tuned = Pipeline.load(tmp_path / "run", dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, tuned.folder.text_encoder, base.text_encoder)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), tuned.folder.transformer, base.transformer)
    assert min(jax.tree.leaves(moved["blocks"]["ffn"]["in_proj"]["kernel"])) > 0
    assert max(jax.tree.leaves(moved["head"])) == 0

    # the adapters alone, as a file, do the same to the model
    capsys.readouterr()
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "a.safetensors"), "--layout", "lora"]) == 0
    assert "adapters of rank 2" in capsys.readouterr().out
    again = Pipeline.load(tiny_model, dtype="float32", lora=str(tmp_path / "a.safetensors"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again.folder.transformer, tuned.folder.transformer
    )
    for target, says in (("a.safetensors", "exists; --force"), ("adapters", "should end in .safetensors")):
        assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / target), "--layout", "lora"]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.runs
def test_adapters_learn_only_where_they_are_asked_for(config: Config, tiny_model: Path, tmp_path: Path):
    only = override(config, ["transformer.lora_targets=cross_attn.k,ffn"])
    train(only, tmp_path / "run", say=lambda line: None)
    base, tuned = load_folder(tiny_model), Pipeline.load(tmp_path / "run", dtype="float32").folder
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), tuned.transformer, base.transformer)
    changed = {".".join(map(str, path)) for path, leaf in nnx.to_flat_state(moved) if leaf.get_value()}
    assert changed == {f"blocks.{module}.kernel" for module in ("cross_attn.k", "ffn.in_proj", "ffn.out_proj")}

    file = tmp_path / "some.safetensors"
    assert cli.main(["export", str(tmp_path / "run"), str(file), "--layout", "lora"]) == 0
    names = {re.sub(r"^transformer\.blocks\.\d+\.", "", name) for name in read_header(epath.Path(file))}
    modules = ("attn2.to_k", "ffn.net.0.proj", "ffn.net.2")
    assert names == {f"{module}.lora_{half}.weight" for module in modules for half in "AB"}


@pytest.mark.runs
def test_the_transformer_alone_learns(config: Config, tiny_model: Path, tmp_path: Path):
    only = override(config, ["train.learns=transformer", "transformer.lora_rank=0"])
    said: list[str] = []
    train(only, tmp_path / "run", say=said.append)
    assert {f"starting from transformer of {tiny_model}", f"keeping text_encoder of {tiny_model} as they are"} <= set(
        said
    )
    assert set(load_run(tmp_path / "run").params) == {"transformer"}
    base, tuned = load_folder(tiny_model), Pipeline.load(tmp_path / "run", dtype="float32").folder
    jax.tree.map(np.testing.assert_array_equal, tuned.text_encoder, base.text_encoder)
    away = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), tuned.transformer, base.transformer)
    assert 0 < max(jax.tree.leaves(away)) < 3.1 * only.optimizer.learning_rate
    assert (tuned.scheduler, tuned.tokenizer) == (base.scheduler, base.tokenizer)


@pytest.fixture(scope="module")
def two_experts(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a second expert, other than the first, for levels below .6."""
    folder = load_folder(tiny_model)
    rng = np.random.default_rng(7)
    low = jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), folder.transformer
    )
    path = tmp_path_factory.mktemp("experts") / "model"
    save_folder(path, dataclasses.replace(folder, transformer_2=low, boundary=0.6))
    return path


@pytest.mark.runs
@pytest.mark.parametrize(("expert", "learns", "rank"), [("high", "transformer", 0), ("low", "lora", 2)])
def test_of_two_experts_the_one_that_is_named_learns_at_its_levels(
    config: Config, two_experts: Path, tmp_path: Path, expert: str, learns: str, rank: int
):
    changes = [f"train.init={two_experts}", f"train.expert={expert}", f"train.learns={learns}"]
    only = override(config, [*changes, f"transformer.lora_rank={rank}"])
    train(only, tmp_path / "run", say=lambda line: None)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    levels = [float(name.rsplit("_", 1)[1]) for name in line if name.startswith("validation_loss_")]
    assert len(levels) == 10
    assert all((level > 0.6) == (expert == "high") for level in levels)

    base, tuned = load_folder(two_experts), Pipeline.load(tmp_path / "run", dtype="float32").folder
    names = ("transformer", "transformer_2")
    learned, kept = names if expert == "high" else reversed(names)
    jax.tree.map(np.testing.assert_array_equal, getattr(tuned, kept), getattr(base, kept))
    away = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), getattr(tuned, learned), getattr(base, learned))
    assert 0 < max(jax.tree.leaves(away)) < 0.1
    assert tuned.boundary == base.boundary

    if learns == "lora":  # as a file it goes into the expert that is named with it, and only there
        file = tmp_path / "low.safetensors"
        assert cli.main(["export", str(tmp_path / "run"), str(file), "--layout", "lora"]) == 0
        merged = Pipeline.load(two_experts, dtype="float32", lora=f"low:{file}").folder
        jax.tree.map(np.testing.assert_array_equal, merged.transformer, base.transformer)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged.transformer_2, tuned.transformer_2
        )


def test_an_expert_must_be_named_where_there_are_two_and_only_there(
    config: Config, two_experts: Path, tiny_model: Path, tmp_path: Path
):
    for changes, words in (
        ([f"train.init={two_experts}"], "two experts: train.expert=high tunes the one for levels from 0.6 up"),
        (["train.expert=low"], f"needs a model folder with two experts, and {tiny_model} has one transformer"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            train(override(config, changes), tmp_path / "run", say=lambda line: None)
    with pytest.raises(UserError, match="set train.learns to transformer or lora"):
        override(config, ["train.learns=all", "transformer.lora_rank=0", "train.expert=low"])
    with pytest.raises(UserError, match="for one of two experts, and this model has one transformer"):
        Pipeline.load(tiny_model, lora="high:mine.safetensors")


def test_what_does_not_fit_together_is_refused(config: Config):
    for changes, words in (
        (["train.init="], "train.learns=lora keeps the rest of a model as it is: name it in train.init"),
        (["transformer.lora_rank=0"], "adapters that learn have a rank of at least 1"),
        (["train.learns=all"], "adapters that learn have a rank of at least 1, and others none"),
        (["transformer.lora_rank=-1"], "must be >= 0"),
        (
            ["transformer.lora_targets=cross_attn.key"],
            'lora_targets .cross_attn.key.: did you mean "cross_attn.k"',
        ),
    ):
        with pytest.raises(UserError, match=words):
            override(config, changes)


SHRUNK = """
transformer.n_layers=2 transformer.n_heads=2 transformer.head_dim=8 transformer.ffn_dim=32 transformer.frequency_dim=16
autoencoder.base_dim=4 autoencoder.num_res_blocks=1
data.source=world data.clips=12 data.held_out=2 data.frames=9 data.height=16 data.width=16 data.workers=0
data.row_tokens=8 data.row_text=256 data.groups=8
train.steps=1 train.batch_size=2 train.validate_every=0 train.sample_every=0
train.mesh.data=1 train.mesh.fsdp=1 train.mesh.sequence=1
"""


def shrunk(name: str, model: Path) -> Config:
    """A stage of the recipe for footage, tiny, beside the text encoder of `model`: clips of 9 frames of 16x16."""
    text = load_folder(model).text_encoder_config
    sizes = {key: getattr(text, key) for key in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")}
    of_text = [f"text_encoder.{key}={value}" for key, value in sizes.items()]
    return load_config(name, [*SHRUNK.split(), *of_text, f"transformer.text_dim={text.d_model}"])


@pytest.mark.runs
def test_the_stages_for_footage_go_on_from_one_another(tiny_model: Path, tmp_path: Path, monkeypatch):
    """Each config finds the run before it where that one's command puts it; only the open model's name is changed."""
    monkeypatch.chdir(tmp_path)

    def run(stage: str, *overrides: str) -> list[str]:
        said: list[str] = []
        name = f"footage_{stage}"
        train(override(shrunk(name, tiny_model), overrides), f"runs/{name}", say=said.append)
        return [line for line in said if line.startswith(("starting", "keeping"))]

    assert run("autoencoder") == []
    assert run("images", f"train.init={tiny_model}") == [f"keeping text_encoder of {tiny_model} as they are"]
    for stage, before in (("short", "runs/footage_images"), ("long", "runs/footage_short")):
        assert run(stage) == [f"starting from transformer of {before}", f"keeping text_encoder of {before} as they are"]
        assert set(load_run(f"runs/footage_{stage}").params) == {"transformer"}

    made, kept = Pipeline.load("runs/footage_long", dtype="float32").folder, load_folder(tiny_model)
    jax.tree.map(np.testing.assert_array_equal, made.text_encoder, kept.text_encoder)
    assert made.transformer_config.in_channels == 16  # of the recipe's autoencoder, and not the open model's
    assert made.tokenizer == kept.tokenizer
    assert (made.defaults.frames, made.scheduler.shift) == (161, 8.0)  # of the last stage
