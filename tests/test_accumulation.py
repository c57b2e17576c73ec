"""A step in several passes: loss, gradients and metrics of the whole batch, in every stage, on one device and two."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sora_jax.diffusion.levels import LevelsConfig, ModeWeights
from sora_jax.errors import UserError
from sora_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sora_jax.models.structure import shapes_of, structure_of
from sora_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from sora_jax.models.transformer import Transformer, TransformerConfig
from sora_jax.shapes import Stride
from sora_jax.sharding import make_mesh
from sora_jax.tokens.packing import Clip, PackedRows, fill_rows
from sora_jax.training.accumulation import accumulated
from sora_jax.training.autoencoder_step import MODULE, AutoencoderLossConfig, make_autoencoder_step
from sora_jax.training.diffusion_step import DiffusionModules, make_diffusion_step
from sora_jax.training.loop import place
from sora_jax.training.state import TrainState, make_init, state_shardings
from sora_jax.training.text_step import Anchor, Captions, Reader, TextModules, make_text_step

ROWS = 8
TEXT = TextEncoderConfig(vocab_size=384, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
NETWORK = TransformerConfig(
    n_layers=1,
    n_heads=2,
    head_dim=8,
    ffn_dim=16,
    in_channels=2,
    out_channels=2,
    patch=Stride(1, 1, 1),
    text_dim=8,
    frequency_dim=8,
)
AUTOENCODER = AutoencoderConfig(
    base_dim=4, z_dim=4, dim_mult=(1, 1), num_res_blocks=1, temperal_downsample=(True,), is_residual=True, patch_size=2
)
KEEPS = optax.trace(decay=0.0)  # an optimizer whose state is the gradients
MakeStep = Callable[..., Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]]


def random(make: Callable[[nnx.Rngs], nnx.Module]) -> nnx.State:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(np.float32), shapes_of(make))


def packed() -> PackedRows:
    """Rows of 1 to 4 images and videos: they differ much in how many of their 24 tokens carry loss."""
    rng = np.random.default_rng(1)
    frames = [(1,), (3, 1), (1, 1), (5,), (2, 2, 1), (1,), (3, 3), (4, 1, 1)]
    clips = [Clip(rng.normal(size=(f, 2, 2, 2)).astype(np.float32), np.array([40, 41])) for row in frames for f in row]
    ends = np.cumsum([len(row) for row in frames])
    plan = [list(range(end - len(row), end)) for end, row in zip(ends, frames, strict=True)]
    return PackedRows(**fill_rows(plan, clips, row_tokens=24, row_text=8, row_groups=6))


def diffusion() -> tuple[MakeStep, dict[str, nnx.State], Any]:
    make = {
        "transformer": lambda rngs: Transformer(NETWORK, rngs=rngs),
        "text_encoder": lambda rngs: TextEncoder(TEXT, rngs=rngs),
    }
    modules = DiffusionModules(**{name: structure_of(one) for name, one in make.items()})
    levels = LevelsConfig(modes=ModeWeights(uniform=0.5, first=0.5))
    return partial(make_diffusion_step, modules, KEEPS, levels), {n: random(m) for n, m in make.items()}, packed()


def text() -> tuple[MakeStep, dict[str, nnx.State], Any]:
    make = {
        "text_encoder": lambda rngs: TextEncoder(TEXT, rngs=rngs),
        "reader": lambda rngs: Reader(TEXT.d_model, (3, 5), rngs=rngs),
    }
    rng = np.random.default_rng(2)
    ids = (np.arange(12) < rng.integers(3, 12, (ROWS, 1))).astype(np.int32)
    answers = np.stack([rng.integers(0, 3, ROWS), rng.integers(0, 5, ROWS)], axis=1)
    captions = Captions(rng.integers(3, 259, ids.shape).astype(np.int32) * ids, ids, answers)
    modules = TextModules(**{name: structure_of(one) for name, one in make.items()})
    return partial(make_text_step, modules, KEEPS), {name: random(one) for name, one in make.items()}, captions


def anchored() -> tuple[MakeStep, dict[str, nnx.State], Any]:
    make_step, params, captions = text()
    moved = jax.tree.map(lambda leaf: leaf + 0.3 * jnp.cos(leaf), params["text_encoder"])
    return lambda **options: jax.jit(partial(make_step(**options), anchor=Anchor(moved, 0.7))), params, captions


def autoencoder() -> tuple[MakeStep, dict[str, nnx.State], Any]:
    def make(rngs: nnx.Rngs) -> nnx.Module:
        return Autoencoder(AUTOENCODER, rngs=rngs)

    clips = np.random.default_rng(3).integers(0, 255, (ROWS, 3, 16, 8, 3), np.uint8)  # latents of 4 x 2
    weights = AutoencoderLossConfig(l1=1.0, l2=1.0, gradient=1.0, gradient_scales=2, kl=1e-2)
    step = partial(make_autoencoder_step, structure_of(make), AUTOENCODER, KEEPS, weights)
    return step, {MODULE: random(make)}, clips


STAGES = {"diffusion": diffusion, "text": text, "anchored": anchored, "autoencoder": autoencoder}


def one_step(stage: str, passes: int, mesh_sizes: dict[str, int] | None = None) -> tuple[dict, dict[str, float], str]:
    """The gradients (by name), the metrics, and the program of a step that is taken in so many passes."""
    make_step, params, batch = STAGES[stage]()
    mesh = make_mesh(mesh_sizes or {"data": 1}, jax.devices()[: math.prod((mesh_sizes or {}).values())])
    state = make_init(lambda key: params, KEEPS)(jax.random.key(0))
    step = make_step(clip_norm=0.0, accumulate=passes)
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        places = jax.tree.broadcast(state_shardings(state, mesh), state)
        placed = jax.tree.map(lambda leaf, where: jax.device_put(jnp.array(leaf, copy=True), where), state, places)
        compiled = step.lower(placed, place(batch, mesh)).compile({"xla_backend_optimization_level": 0})
        after, metrics = compiled(placed, place(batch, mesh))
    named = jax.tree_util.tree_flatten_with_path(after.opt_state.trace)[0]
    gradients = {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in named}
    return gradients, {name: float(value) for name, value in metrics.items()}, compiled.as_text()


def assert_same(
    found: tuple[dict, dict[str, float], str], expected: tuple[dict, dict[str, float], str], tolerance: float = 3e-6
) -> None:
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert found[1][name] == pytest.approx(value, rel=tolerance, nan_ok=True), name
    # A bias that softmax cancels has a gradient of rounding alone: it is held against the largest.
    largest = max(np.linalg.norm(gradient) for gradient in expected[0].values())
    for name, gradient in expected[0].items():
        scale = max(np.linalg.norm(gradient), 1e-3 * largest)
        assert np.linalg.norm(found[0][name] - gradient) <= tolerance * scale, name


@pytest.mark.parametrize(
    "stage",
    ["text", "anchored", *(pytest.param(name, marks=pytest.mark.slow) for name in ("diffusion", "autoencoder"))],
)
def test_four_passes_are_one_step(stage: str):
    assert_same(one_step(stage, 4), one_step(stage, 1))


@pytest.mark.pods
@pytest.mark.parametrize("stage", ["diffusion", "text", "autoencoder"])
def test_on_several_devices_each_pass_uses_all_of_them(stage: str):
    """Two of the eight rows a pass, on two devices one each; of the text stage's rows of 12 places e.g. s32[1,12]."""
    found = one_step(stage, 4, {"fsdp": 2})
    assert_same(found, one_step(stage, 1), tolerance=1e-5)
    share = {"diffusion": "f32[1,24,16]", "text": "f32[1,12,8]", "autoencoder": "f32[1,3,16,8,3]"}[stage]
    assert share in found[2]
    if stage != "text":  # whose text has 2 heads, so that the shape of two rows is that of other arrays too
        assert share.replace("[1,", "[2,") not in found[2], "no device has the rows of two"


def test_it_is_not_the_mean_of_the_passes_means():
    """By hand: passes of 1 and 3 counted numbers."""
    counted = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    numbers = jnp.array([[1.0, 9.0], [2.0, 3.0], [9.0, 9.0], [6.0, 9.0]])

    def share(scale: jax.Array, rows: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        values, used = rows
        return scale * jnp.sum(values * used) / 4.0, None

    (loss, _), gradient = accumulated(share, jnp.float32(5.0), (numbers, counted), 2)
    assert float(loss) == 5.0 * (1 + 2 + 3 + 6) / 4
    assert float(gradient) == (1 + 2 + 3 + 6) / 4
    # rows 0 and 2 are one pass, 1 and 3 the other
    assert float(loss) != 5.0 * (1 / 1 + (2 + 3 + 6) / 3) / 2


def test_a_state_in_passes_is_donated():
    make_step, params, batch = text()
    state = jax.tree.map(jnp.array, make_init(lambda key: params, KEEPS)(jax.random.key(0)))
    compiled = make_step(accumulate=2).lower(state, batch).compile().memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state)))
    assert compiled.alias_size_in_bytes >= size


def test_rows_that_do_not_divide_are_refused():
    from sora_jax.config import load_config
    from sora_jax.training.loop import train

    config = load_config("world", ["train.batch_size=12", "train.accumulate=5", "train.mesh.data=8"])
    with pytest.raises(UserError, match=r"12 cannot be split over .* in 5 passes \(train.accumulate\); nearest: "):
        train(config, "never-made", say=lambda line: None)
    with pytest.raises(UserError, match="train.accumulate must be >= 1, not 0"):
        load_config("world", ["train.accumulate=0"])
