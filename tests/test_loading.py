"""A model is loaded in one pass: all is checked before anything is placed, and little is held beside what stays."""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sora_jax import Pipeline
from sora_jax.errors import UserError
from sora_jax.models.transformer import TransformerConfig
from sora_jax.weights.component import abstract_params, open_component, save_component
from sora_jax.weights.wan import TRANSFORMER


def test_nothing_is_placed_before_everything_is_checked(tiny_model: Path, tmp_path: Path, monkeypatch):
    """The last component lacks a tensor: no array of the first ones may have been made."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("shared.weight")
    save_file(tensors, file)

    def place(*arguments, **options):
        raise AssertionError("an array was placed on a device")

    monkeypatch.setattr(jax, "device_put", place)
    with pytest.raises(UserError, match=r'lacks tensor "shared\.weight"'):
        Pipeline.load(folder)


def test_progress_counts_the_bytes_of_all_files(tiny_model: Path):
    told: list[tuple[str, int, int]] = []
    Pipeline.load(tiny_model, progress=lambda *said: told.append(said))
    numbers = [array for file in tiny_model.rglob("*.safetensors") for array in load_file(file).values()]
    total = sum(array.nbytes for array in numbers)
    assert told[-1] == ("load", total, total)
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})
    assert len(told) == len(numbers)


def test_loading_needs_little_memory_beside_what_stays(tmp_path: Path):
    """At most the largest parameter more than the parameters themselves, which are stacks of 8 layers."""
    config = TransformerConfig(n_layers=8, n_heads=2, head_dim=32, ffn_dim=1024, text_dim=32, frequency_dim=32)
    draw = np.random.default_rng(0)
    shapes = abstract_params(TRANSFORMER, config)
    params = jax.tree.map(lambda leaf: draw.standard_normal(leaf.shape, np.float32), shapes)
    save_component(tmp_path, TRANSFORMER, config, params)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    del params
    tracemalloc.start()
    loaded = open_component(tmp_path, TRANSFORMER).load(on_host=True)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(loaded)) == sum(sizes) < kept
    assert peak - kept < max(sizes)
