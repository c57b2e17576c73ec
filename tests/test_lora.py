"""Adapters at sampling: beside the kernels they do what they do merged, at weights that may change."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from sora_jax import Pipeline, cli
from sora_jax.errors import UserError
from sora_jax.training.compilations import Compilations
from sora_jax.weights.layout import load_folder, save_folder

WAN = Path(__file__).parent / "fixtures" / "wan_t2v"  # 2 layers of width 24, patches of 1 x 2 x 2
# What is made of noise in two steps: latents, which frames are decoded from.
OPTIONS = {"frames": 5, "guidance": 1.0, "output": "latents"}

# (in, out) of kernels of the tiny model by their names in a file: two files, which have one of them in common.
FIRST = {
    "blocks.0.attn1.to_q": (16, 16),
    "blocks.1.ffn.net.0.proj": (16, 32),
    "condition_embedder.time_embedder.linear_2": (16, 16),
    "condition_embedder.text_embedder.linear_1": (16, 16),
}
SECOND = {
    "blocks.0.attn1.to_q": (16, 16),
    "blocks.1.attn2.to_out.0": (16, 16),
    "condition_embedder.time_proj": (16, 96),
    "proj_out": (16, 8),
}


def write(path: Path, kernels: dict[str, tuple[int, int]], rank: int, alpha: float | None, seed: int) -> Path:
    draw = np.random.default_rng(seed)
    tensors = {}
    for module, (n_in, n_out) in kernels.items():
        tensors[f"transformer.{module}.lora_A.weight"] = 0.3 * draw.standard_normal((rank, n_in), np.float32)
        tensors[f"transformer.{module}.lora_B.weight"] = 0.3 * draw.standard_normal((n_out, rank), np.float32)
        if alpha is not None:
            tensors[f"transformer.{module}.alpha"] = np.array(alpha, np.float32)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("loras")
    first = write(folder / "first.safetensors", FIRST, rank=3, alpha=1.5, seed=1)
    second = write(folder / "second.safetensors", SECOND, rank=2, alpha=None, seed=2)
    return {str(first): 0.8, str(second): -0.5}


@pytest.fixture(scope="module")
def live(tiny_model: Path, loras: dict[str, float]) -> Pipeline:
    return Pipeline.load(tiny_model, dtype="float32", lora=loras, lora_live=True)


def kernels(transformer: nnx.State) -> dict[str, np.ndarray]:
    """What each kernel comes to with the adapter beside it."""
    flat = {".".join(map(str, path)): np.asarray(leaf, np.float32) for path, leaf in nnx.to_flat_state(transformer)}
    for name in [name for name in flat if name.endswith("adapter_a")]:
        module = name.removesuffix("adapter_a")
        flat[f"{module}kernel"] = flat[f"{module}kernel"] + flat.pop(name) @ flat.pop(f"{module}adapter_b")
    return flat


def test_live_adapters_do_what_they_do_merged_and_weights_change_without_compiling(
    live: Pipeline, tiny_model: Path, loras: dict[str, float]
):
    first, second = loras
    base = Pipeline.load(tiny_model, dtype="float32")
    merged = Pipeline.load(tiny_model, dtype="float32", lora=loras)
    for name, array in nnx.to_flat_state(base.params):
        np.testing.assert_array_equal(dict(nnx.to_flat_state(live.params))[name][...], array[...])
    expected = merged.sample("a red ball", **OPTIONS).latents
    with_all = live.sample("a red ball", **OPTIONS)
    np.testing.assert_allclose(with_all.latents, expected, atol=1e-5 * expected.std())
    assert with_all.record.lora == loras

    programs = Compilations()
    with programs:
        live.set_lora({first: 0.0, second: 0})
        without = live.sample("a red ball", **OPTIONS)
        live.set_lora({second: -0.5})
        with_one = live.sample("a red ball", **OPTIONS)
    assert programs.count == 0
    plain = base.sample("a red ball", **OPTIONS).latents
    np.testing.assert_allclose(without.latents, plain, atol=1e-6 * plain.std())
    assert np.abs(plain - expected).max() > 0.01 * expected.std(), "the adapters do something"
    only = Pipeline.load(tiny_model, dtype="float32", lora={second: -0.5})
    one = only.sample("a red ball", **OPTIONS).latents
    np.testing.assert_allclose(with_one.latents, one, atol=1e-5 * one.std())
    # each video keeps the weights that it was made with
    assert with_all.record.lora == loras
    assert without.record.lora == {first: 0.0, second: 0.0}
    assert with_one.record.lora == {first: 0.0, second: -0.5}


def test_what_live_adapters_cannot_do_is_one_line(
    live: Pipeline, tiny_model: Path, loras: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture
):
    first, _ = loras
    before = live.lora
    for weights, says in (
        ({"other.safetensors": 1.0}, r"LoRA file other\.safetensors was not loaded with tiny-1: .*first\.safetensors"),
        ({first: float("inf")}, "must have a finite weight, not inf"),
    ):
        with pytest.raises(UserError, match=says):
            live.set_lora(weights)
    assert live.lora == before
    for lora, says in ((loras, "its adapters were merged"), (None, "it was loaded without adapters")):
        with pytest.raises(UserError, match=f"no weights to set: {says}.*lora_live=True"):
            Pipeline.load(tiny_model, lora=lora).set_lora({first: 1.0})
    with pytest.raises(UserError, match="lora_live .* is about the files of lora"):
        Pipeline.load(tiny_model, lora_live=True)
    with pytest.raises(UserError, match=r"live adapters has no place for them .* load it without lora_live"):
        save_folder(tmp_path / "saved", live.folder)
    assert not list(tmp_path.iterdir())

    whole = tmp_path / "distilled.safetensors"
    save_file({"diffusion_model.blocks.0.norm3.diff": np.ones(16, np.float32)}, whole)
    command = ["sample", "a red ball", "--model", str(tiny_model), "--lora", f"{whole}=1", "--lora-live"]
    assert cli.main([*command, "--out", str(tmp_path / "x.mp4")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "distilled.safetensors holds whole differences (.diff)" in said
    assert "can only be merged: load it without lora_live (--lora-live)" in said


def test_two_experts_have_their_own(tiny_model: Path, loras: dict[str, float], tmp_path: Path):
    """A file in both, and one in the second alone; the numbers of the kernels are those of merging."""
    folder = load_folder(tiny_model)
    save_folder(tmp_path / "model", dataclasses.replace(folder, transformer_2=folder.transformer, boundary=0.5))
    first, second = loras
    both = {first: 0.8, f"low:{second}": -0.5}
    merged = Pipeline.load(tmp_path / "model", dtype="float32", lora=both)
    pipe = Pipeline.load(tmp_path / "model", dtype="float32", lora=both, lora_live=True)

    def check(expected: Pipeline) -> None:
        for expert in ("transformer", "transformer_2"):
            ours, theirs = kernels(getattr(pipe.folder, expert)), kernels(getattr(expected.folder, expert))
            assert ours.keys() == theirs.keys()
            for name, array in theirs.items():
                np.testing.assert_allclose(ours[name], array, atol=1e-6, err_msg=name)

    check(merged)
    pipe.set_lora({f"low:{second}": 2.0})
    check(Pipeline.load(tmp_path / "model", dtype="float32", lora=both | {f"low:{second}": 2.0}))
    with pytest.raises(UserError, match="was not loaded"):
        pipe.set_lora({second: 1.0})


def test_on_a_mesh_and_in_bfloat16(live: Pipeline, tiny_model: Path, loras: dict[str, float]):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(1, 2, 2, 1), ("data", "fsdp", "tensor", "sequence"))
    pipe = Pipeline.load(tiny_model, dtype="bfloat16", mesh=mesh, lora=loras, lora_live=True)
    query = pipe.params["blocks"]["self_attn"]["q"]
    assert {leaf[...].dtype for leaf in (query["kernel"], query["adapter_a"], query["adapter_b"])} == {
        np.dtype(jnp.bfloat16)
    }
    # [layers, in, R] and [layers, R, out], where the kernel [layers, in, out] lies over fsdp and tensor
    assert query["adapter_a"][...].sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", None)
    assert query["adapter_b"][...].sharding.spec == jax.sharding.PartitionSpec(None, None, "tensor")
    live.set_lora(loras)
    expected = live.sample("a red ball", **OPTIONS).latents
    made = pipe.sample("a red ball", **OPTIONS).latents
    assert np.abs(made - expected).max() < 0.1 * expected.std()


def test_whole_differences_are_merged_where_they_belong(tmp_path: Path):
    """As the files of distilled models hold them, under the authors' names: times the weight of the file, without
    alpha, beside an adapter."""
    draw = np.random.default_rng(0)

    def some(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape, np.float32)

    added = {
        "blocks.0.self_attn.k.diff": some(24, 24),
        "blocks.0.norm3.diff": some(24),
        "blocks.1.norm3.diff_b": some(24),
        "blocks.1.self_attn.norm_q.diff": some(24),
        "blocks.0.ffn.0.diff_b": some(40),
        "blocks.1.diff_m": some(1, 6, 24),
        "head.diff_m": some(1, 2, 24),
        "patch_embedding.diff": some(24, 4, 1, 2, 2),
        "blocks.0.self_attn.k.lora_down.weight": some(2, 24),
        "blocks.0.self_attn.k.lora_up.weight": some(24, 2),
        "blocks.0.self_attn.k.alpha": np.array(1.0, np.float32),
    }
    file = tmp_path / "distilled.safetensors"
    save_file({f"diffusion_model.{name}": array for name, array in added.items()}, file)
    base, made = (
        {name: array.copy() for name, array in kernels(Pipeline.load(WAN, dtype="float32", **lora).params).items()}
        for lora in ({}, {"lora": {str(file): 0.5}})
    )
    adapter = added["blocks.0.self_attn.k.lora_up.weight"] @ added["blocks.0.self_attn.k.lora_down.weight"]
    base["blocks.self_attn.k.kernel"][0] += 0.5 * (added["blocks.0.self_attn.k.diff"] + 1.0 / 2 * adapter).T
    base["blocks.cross_norm.scale"][0] += 0.5 * added["blocks.0.norm3.diff"]
    base["blocks.cross_norm.bias"][1] += 0.5 * added["blocks.1.norm3.diff_b"]
    base["blocks.self_attn.q_norm.scale"][1] += 0.5 * added["blocks.1.self_attn.norm_q.diff"]
    base["blocks.ffn.in_proj.bias"][0] += 0.5 * added["blocks.0.ffn.0.diff_b"]
    base["blocks.modulation"][1] += 0.5 * added["blocks.1.diff_m"][0]
    base["head_modulation"] += 0.5 * added["head.diff_m"][0]
    # pixels of a patch, and channels within a pixel
    base["patch_embed.kernel"] += 0.5 * np.transpose(added["patch_embedding.diff"], (2, 3, 4, 1, 0)).reshape(16, 24)
    assert made.keys() == base.keys()
    for name, array in base.items():
        np.testing.assert_allclose(made[name], array, atol=1e-6, err_msg=name)
