"""LoRA files that the reference wrote: merged into our kernels, or beside them, they do what its live adapters do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax import Pipeline
from sora_jax.canvas import lay_out, text_to_video
from sora_jax.errors import UserError
from sora_jax.models.transformer import Transformer
from sora_jax.shapes import Extent
from sora_jax.tokens.patchify import patchify, unpatchify
from sora_jax.training.adapters import merge_adapters, split_adapters
from sora_jax.weights.lora import save_lora

pytest.importorskip("peft", reason="peft is not installed")


def add_adapter(theirs: Any, seed: int, rank: int, alpha: float, path: Path) -> Path:
    import torch
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    names = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    name = f"adapter_{seed}"
    theirs.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in theirs.transformer.named_parameters():
            if f"lora_B.{name}" in key:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    state = get_peft_model_state_dict(theirs.transformer, adapter_name=name)
    metadata = {"r": rank, "lora_alpha": alpha}
    theirs.save_lora_weights(path, transformer_lora_layers=state, transformer_lora_adapter_metadata=metadata)
    return path / "pytorch_lora_weights.safetensors"


def test_files_merged_and_live_are_the_references_live_adapters(tmp_path):
    import reference
    import torch

    theirs = reference.pipeline("t2v")
    theirs.set_progress_bar_config(disable=True)
    folder = reference.save(theirs, tmp_path / "model")
    files = [add_adapter(theirs, 1, 4, 2.0, tmp_path / "a"), add_adapter(theirs, 2, 3, 3.0, tmp_path / "b")]
    theirs.transformer.set_adapters(["adapter_1", "adapter_2"], [1.0, -0.5])
    noise = np.random.default_rng(0).normal(size=(2, 4, 4, 4)).astype(np.float32)
    size = {"height": 32, "width": 32}
    made = theirs(
        prompt="a red ball",
        num_frames=5,
        num_inference_steps=4,
        guidance_scale=1.0,
        latents=torch.from_numpy(np.moveaxis(noise, -1, 0)[None].copy()),
        output_type="latent",
        **size,
    )
    expected = np.moveaxis(made.frames[0].numpy(), 0, -1)
    options = {"frames": 5, "steps": 4, "guidance": 1.0, "noise": noise, "output": "latents", **size}
    loras = dict(zip(map(str, files), (1.0, -0.5), strict=True))
    for live in (False, True):
        pipe = Pipeline.load(folder, dtype="float32", lora=loras, lora_live=live)
        video = pipe.sample("a red ball", **options)
        assert np.abs(video.latents - expected).max() <= 1e-4 * expected.std()
        assert video.record.lora == loras
    without = Pipeline.load(folder, dtype="float32").sample("a red ball", **options).latents
    assert np.abs(without - expected).max() > 0.01 * expected.std(), "the adapters do something"


def test_an_adapter_for_another_model_is_refused(tmp_path):
    import reference

    theirs = reference.pipeline("t2v")
    file = add_adapter(theirs, 1, 2, 2.0, tmp_path / "a")
    with pytest.raises(UserError, match="is for another model: .* out there, and "):
        Pipeline.load("world", lora=str(file))
    with pytest.raises(UserError, match="does not exist"):
        Pipeline.load("world", lora=str(tmp_path / "none.safetensors"))
    weights = reference.save(reference.pipeline("t2v"), tmp_path / "model")
    with pytest.raises(UserError, match="is not a LoRA file"):
        Pipeline.load("world", lora=str(weights / "transformer" / "diffusion_pytorch_model.safetensors"))


def test_the_reference_reads_the_adapters_that_we_write(tmp_path):
    import reference
    import torch

    theirs = reference.pipeline("t2v")
    pipe = Pipeline.load(reference.save(theirs, tmp_path / "model"), dtype="float32")
    config = dataclasses.replace(pipe.folder.transformer_config, lora_rank=3, lora_alpha=1.5)
    shapes = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), graph=False)[1]
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), split_adapters(shapes)[1]
    )
    save_lora(tmp_path / "ours.safetensors", config, adapters)
    theirs.load_lora_weights(tmp_path, weight_name="ours.safetensors")

    latents = rng.normal(size=(1, 2, 4, 4, 4)).astype(np.float32)
    text = rng.normal(size=(1, 512, 24)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.transformer(
            torch.from_numpy(np.moveaxis(latents, -1, 1).copy()),
            torch.full((1,), 500.0),
            torch.from_numpy(text),
            return_dict=False,
        )[0]
    layout = lay_out(text_to_video("", Extent(5, 32, 32)), pipe.stride, pipe.patch)
    condition = dataclasses.replace(pipe.condition(layout, [["a"]]), text=jnp.asarray(text))
    merged = merge_adapters(config, pipe.params, adapters)
    ours = pipe.velocity(merged, jnp.asarray(patchify(latents, pipe.patch)), jnp.full((1, 2), 0.5), condition)
    ours = np.moveaxis(unpatchify(np.asarray(ours), Extent(2, 4, 4), pipe.patch), -1, 1)
    assert np.abs(ours - expected.numpy()).max() <= 1e-4 * expected.numpy().std()
