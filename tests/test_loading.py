"""A model is loaded in one pass: all is checked before anything is placed, and little is held beside what stays."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sora_jax import Pipeline
from sora_jax.config import load_config, to_json
from sora_jax.errors import UserError
from sora_jax.models.transformer import TransformerConfig
from sora_jax.weights.component import abstract_params, open_component, save_component
from sora_jax.weights.wan import TRANSFORMER

WAN = Path(__file__).parent / "fixtures" / "wan_t2v"  # 2 layers of width 24


@pytest.fixture
def nothing_may_be_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    def place(*arguments, **options):
        raise AssertionError("an array was placed on a device")

    monkeypatch.setattr(jax, "device_put", place)


def test_nothing_is_placed_before_everything_is_checked(tiny_model: Path, tmp_path: Path, nothing_may_be_placed):
    """The last component lacks a tensor: no array of the first ones may have been made."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("shared.weight")
    save_file(tensors, file)
    with pytest.raises(UserError, match=r'lacks tensor "shared\.weight"'):
        Pipeline.load(folder)


def a_larger_vocabulary(folder: Path) -> None:
    file = folder / "tokenizer" / "tokenizer.json"
    definition = json.loads(file.read_text())
    definition["model"]["vocab"] += [[f"word{n}", -9.0] for n in range(50)]  # 103 of 60
    file.write_text(json.dumps(definition))


def a_text_encoder_of_many_more_ids(folder: Path) -> None:
    file, config = folder / "text_encoder" / "model.safetensors", folder / "text_encoder" / "config.json"
    tensors = load_file(file)
    tensors["shared.weight"] = np.zeros((4000, 24), np.float32)
    save_file({name: tensor for name, tensor in tensors.items() if "embed_tokens" not in name}, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 4000}))


def the_autoencoder_of_22(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    shutil.copytree(WAN.with_name("wan_ti2v") / "vae", folder / "vae")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (a_larger_vocabulary, "the tokenizer has 103 ids, the text encoder knows 60: it is another model's"),
        (a_text_encoder_of_many_more_ids, "the tokenizer has 53 ids, the text encoder knows 4000: it is another"),
        (the_autoencoder_of_22, "makes latents of 4 channels, the autoencoder reads 6"),
    ],
)
def test_parts_of_other_models_are_refused_before_anything_is_placed(
    damage, says: str, tmp_path: Path, nothing_may_be_placed
):
    folder = Path(shutil.copytree(WAN, tmp_path / "model"))
    damage(folder)
    with pytest.raises(UserError, match=rf"model: .*{says}"):
        Pipeline.load(folder)


def adapter(path: Path, module: str = "blocks.0.attn1.to_q", n_in: int = 24, rank: int = 2, **others) -> Path:
    tensors = {
        f"transformer.{module}.lora_A.weight": np.ones((rank, n_in), np.float32),
        f"transformer.{module}.lora_B.weight": np.ones((24, rank), np.float32),
    }
    save_file(tensors | {f"transformer.{module}.{name}": value for name, value in others.items()}, path)
    return path


def with_difference(name: str, shape: tuple[int, ...], dtype: type = np.float32) -> Callable[[Path], None]:
    """An adapter that fits, beside a tensor of that name, prefix apart."""

    def make(path: Path) -> None:
        save_file(load_file(adapter(path)) | {f"diffusion_model.{name}": np.ones(shape, dtype)}, path)

    return make


@pytest.mark.parametrize(
    ("make", "weight", "says"),
    [
        (lambda p: adapter(p, "blocks.7.attn1.to_q"), 1.0, r"is for another model: 1 of its modules .*blocks\.7"),
        (lambda p: adapter(p, n_in=30), 1.0, r"is for another model: .*\(30,\) in"),
        (lambda p: adapter(p, rank=0), 1.0, "is for another model"),
        (lambda p: adapter(p, alpha=np.array(4)), 1.0, r'alpha" is no float number'),
        (lambda p: adapter(p, alpha=np.ones(2, np.float32)), 1.0, r'alpha" is no float number'),
        (lambda p: save_file(load_file(adapter(p)) | {"x": np.ones(2)}, p), 1.0, 'it holds "x"'),
        (
            lambda p: save_file({name: t.astype(np.int32) for name, t in load_file(adapter(p)).items()}, p),
            1.0,
            "has dtype I32; known: F32, F16, BF16",
        ),
        (
            lambda p: save_file({n: t[0, 0, None].reshape(()) for n, t in load_file(adapter(p)).items()}, p),
            1.0,
            "is for another model",
        ),
        (lambda p: p.write_bytes(b"hello"), 1.0, "is not a safetensors file"),
        (lambda p: p.mkdir(), 1.0, "is a folder"),
        (lambda p: None, 1.0, "does not exist"),
        (adapter, float("nan"), "must have a finite weight, not nan"),
        (with_difference("blocks.0.norm3.diff", (5,)), 1.0, r"norm3\.diff has the shape \[5\], and \[24\] here"),
        (with_difference("patch_embedding.diff", (24, 36, 1, 2, 2)), 1.0, r"\[24, 4, 1, 2, 2\] here"),  # image to video
        (with_difference("blocks.0.ffn.0.diff_b", (24,)), 1.0, r"ffn\.0\.diff_b has the shape \[24\], and \[40\] here"),
        (with_difference("blocks.0.norm9.diff", (24,)), 1.0, r"1 of its modules .*norm9\.diff"),
        (with_difference("blocks.0.norm3.diff", (24,), np.int32), 1.0, r"norm3\.diff has dtype I32; known: F32"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_before_anything_is_placed(
    make, weight: float, says: str, tmp_path: Path, nothing_may_be_placed
):
    file = tmp_path / "lora.safetensors"
    make(file)
    with pytest.raises(UserError, match=says) as error:
        Pipeline.load(WAN, lora={str(file): weight})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("init", [None, WAN])
def test_a_lora_is_checked_before_a_runs_checkpoint_is_looked_for(init: Path | None, tmp_path: Path):
    """Onto a run of a whole model, and one that tunes a folder: the run has no checkpoint yet, and is not asked."""
    tunes = [] if init is None else [f"train.init={init}", "train.learns=lora", "transformer.lora_rank=2"]
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(to_json(load_config("world", tunes)))
    file = adapter(tmp_path / "lora.safetensors", n_in=30)
    with pytest.raises(UserError, match=r"is for another model: blocks\.0\.attn1\.to_q has \(30,\) in"):
        Pipeline.load(tmp_path / "run", lora=str(file))
    with pytest.raises(UserError, match="has no checkpoint yet"):
        Pipeline.load(tmp_path / "run")


def test_what_is_no_model_is_said_to_be_none(tmp_path: Path):
    with pytest.raises(UserError, match=r"is no model: it has no model_index\.json, none of the files"):
        Pipeline.load(tmp_path)


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
