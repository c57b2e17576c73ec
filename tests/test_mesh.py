"""Eight devices compute what one computes: the loss of packed rows and every gradient, on each axis of the mesh."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax import sharding
from sora_jax.diffusion.levels import LevelsConfig, draw_levels
from sora_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from sora_jax.models.transformer import Transformer, TransformerConfig
from sora_jax.shapes import Stride
from sora_jax.tokens.packing import Clip, PackedRows, clip_shape, fill_rows
from sora_jax.tokens.planning import plan_rows
from sora_jax.training.diffusion_step import DiffusionModules, diffusion_loss
from sora_jax.training.loop import place
from sora_jax.training.state import state_shardings

ROWS, TOKENS, TEXT, GROUPS = 8, 32, 24, 8
TRANSFORMER = TransformerConfig(
    n_layers=1,
    n_heads=8,
    head_dim=8,
    ffn_dim=64,
    in_channels=4,
    out_channels=4,
    patch=Stride(1, 1, 1),
    text_dim=32,
    frequency_dim=16,
)
TEXT_ENCODER = TextEncoderConfig(vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=8)
MODULES = DiffusionModules(
    transformer=nnx.split(nnx.eval_shape(lambda: Transformer(TRANSFORMER, rngs=nnx.Rngs(0))), graph=False)[0],
    text_encoder=nnx.split(nnx.eval_shape(lambda: TextEncoder(TEXT_ENCODER, rngs=nnx.Rngs(0))), graph=False)[0],
)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # half the time to compile
MESHES = [{"data": 8}, {"fsdp": 8}, {"tensor": 8}, {"sequence": 8}, {"data": 2, "tensor": 2, "sequence": 2}]


@pytest.fixture(scope="module")
def rows() -> PackedRows:
    """Rows of videos of 3 frames and images, with their prompts, some places empty."""
    rng = np.random.default_rng(0)
    clips = [
        Clip(
            rng.standard_normal((3 if i % 3 else 1, 2, 2, 4)).astype(np.float32),
            rng.integers(3, 259, 4 + i % 5).astype(np.int32),
        )
        for i in range(3 * ROWS)
    ]
    plan = plan_rows(
        [clip_shape(clip) for clip in clips], row_tokens=TOKENS, row_text=TEXT, row_groups=GROUPS, rows=ROWS
    )
    packed = PackedRows(**fill_rows(plan, clips, row_tokens=TOKENS, row_text=TEXT, row_groups=GROUPS))
    assert (packed.segment_ids == 0).any()
    assert packed.segment_ids.max() > 1
    return packed


@pytest.fixture(scope="module")
def params() -> dict[str, nnx.State]:
    """Every parameter random: a fresh head is zero, and would pass no gradient on."""
    rng = np.random.default_rng(1)
    modules = {
        "transformer": lambda: Transformer(TRANSFORMER, rngs=nnx.Rngs(0)),
        "text_encoder": lambda: TextEncoder(TEXT_ENCODER, rngs=nnx.Rngs(0)),
    }
    shapes = {name: nnx.split(nnx.eval_shape(make), graph=False)[1] for name, make in modules.items()}
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32), shapes)


def loss_and_gradients(params: dict, rows: PackedRows) -> tuple[jax.Array, dict]:
    level_key, noise_key = jax.random.split(jax.random.key(2))
    groups = {name: getattr(rows, name) for name in ("group_segment", "group_frame", "group_count", "segment_ids")}
    levels = draw_levels(level_key, LevelsConfig(), **groups)
    noise = jax.random.normal(noise_key, rows.tokens.shape, jnp.float32)
    loss = functools.partial(diffusion_loss, MODULES)
    return jax.value_and_grad(lambda p: loss(p, rows, levels, noise))(params)


class Outcome(NamedTuple):
    loss: float
    grads: dict[str, np.ndarray]
    cut: list[str]  # the parameters that lie cut on the mesh
    program: str


def by_name(tree) -> dict[str, jax.Array]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def on_mesh(axes: dict[str, int], params: dict, rows: PackedRows) -> Outcome:
    mesh = sharding.make_mesh(axes, jax.devices()[: math.prod(axes.values())])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, state_shardings(params, mesh))
        batch = place(rows, mesh)
        compiled = jax.jit(loss_and_gradients).lower(placed, batch).compile(QUICK)
        loss, grads = compiled(placed, batch)
    cut = [name for name, leaf in by_name(placed).items() if not leaf.sharding.is_fully_replicated]
    return Outcome(float(loss), {k: np.asarray(v) for k, v in by_name(grads).items()}, cut, compiled.as_text())


@pytest.fixture(scope="module")
def alone(params: dict, rows: PackedRows) -> Outcome:
    return on_mesh({"data": 1}, params, rows)


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES, ids=lambda axes: "-".join(f"{k}{v}" for k, v in axes.items()))
def test_loss_and_gradients_are_those_of_one_device(axes: dict[str, int], params, rows, alone: Outcome):
    found = on_mesh(axes, params, rows)
    assert not alone.cut
    assert bool(found.cut) == bool({"fsdp", "tensor"} & set(axes))  # these two cut parameters, the others activations
    if "sequence" in axes:  # nothing of the state is cut: the tokens have to be, or the devices do the same work
        shard = (ROWS // axes.get("data", 1), TOKENS // axes["sequence"], TRANSFORMER.dim)
        assert f"f32[{','.join(map(str, shard))}]" in found.program
    assert abs(found.loss - alone.loss) <= 1e-5 * abs(alone.loss)
    assert found.grads.keys() == alone.grads.keys()
    for name, gradient in found.grads.items():
        norm = np.linalg.norm(alone.grads[name])
        assert norm > 0, name
        assert np.linalg.norm(gradient - alone.grads[name]) <= 1e-5 * norm, name
