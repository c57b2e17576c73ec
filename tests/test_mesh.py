"""Eight devices compute what one computes: the loss of packed rows and every gradient, on each axis of the mesh and on
several together, and other videos of a row are not seen on any."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_accumulation
from flax import nnx

from sora_jax import sharding
from sora_jax.bench.compute import count_collectives
from sora_jax.bench.programs import placed_shapes
from sora_jax.diffusion.levels import LevelsConfig, draw_levels
from sora_jax.models import attention
from sora_jax.models.structure import shapes_of, structure_of
from sora_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from sora_jax.models.transformer import Transformer, TransformerConfig, model_time
from sora_jax.shapes import Stride
from sora_jax.tokens.packing import Clip, PackedRows, clip_shape, fill_rows
from sora_jax.tokens.planning import ClipShape, LookAhead
from sora_jax.training.diffusion_step import DiffusionModules, condition_of, diffusion_loss, index_of, read_text
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
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # half the time to compile
# axes, heads
MESHES = [
    ({"data": 8}, 8),
    ({"fsdp": 8}, 8),
    ({"tensor": 8}, 8),
    ({"sequence": 8}, 8),
    ({"sequence": 8}, 12),  # 4 x 2: all-to-all and a ring
    ({"data": 2, "fsdp": 2, "sequence": 2}, 8),
    ({"fsdp": 2, "tensor": 2, "sequence": 2}, 12),
]
AUTOENCODER_MESHES: list[dict[str, int]] = [
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 2},
    {"sequence": 2},
    {"sequence": 4},  # a row of latents each: whole pictures
    {"data": 2, "sequence": 2},
    {"data": 2, "sequence": 4},
    {"fsdp": 2, "sequence": 2},
    {"data": 2, "fsdp": 2, "sequence": 2},
    {"fsdp": 2, "tensor": 2, "sequence": 2},
]
on_every_mesh = pytest.mark.parametrize(
    ("axes", "heads"), MESHES, ids=["-".join(f"{k}{v}" for k, v in axes.items()) + f"-{n}heads" for axes, n in MESHES]
)


def networks(heads: int) -> dict:
    transformer = dataclasses.replace(TRANSFORMER, n_heads=heads)
    return {
        "transformer": lambda rngs: Transformer(transformer, rngs=rngs),
        "text_encoder": lambda rngs: TextEncoder(TEXT_ENCODER, rngs=rngs),
    }


def structures(heads: int) -> DiffusionModules:
    return DiffusionModules(**{name: structure_of(make) for name, make in networks(heads).items()})


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
    waiting = LookAhead()
    for index, clip in enumerate(clips):
        waiting.add(clip_shape(clip), index)
    plan = [waiting.take_row(ClipShape(TOKENS, TEXT, GROUPS)) for _ in range(ROWS)]
    packed = PackedRows(**fill_rows(plan, clips, row_tokens=TOKENS, row_text=TEXT, row_groups=GROUPS))
    assert (packed.segment_ids == 0).any()
    assert packed.segment_ids.max() > 1
    return packed


@functools.cache
def params(heads: int) -> dict[str, nnx.State]:
    """Every parameter random: a fresh head is zero, and would pass no gradient on."""
    rng = np.random.default_rng(1)
    shapes = {name: shapes_of(make) for name, make in networks(heads).items()}
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32), shapes)


def loss_and_gradients(heads: int, params: dict, rows: PackedRows) -> tuple[jax.Array, dict]:
    level_key, noise_key = jax.random.split(jax.random.key(2))
    levels = draw_levels(level_key, LevelsConfig(), index_of(rows))
    noise = jax.random.normal(noise_key, rows.tokens.shape, jnp.float32)
    loss = functools.partial(diffusion_loss, structures(heads))
    return jax.value_and_grad(lambda p: loss(p, rows, levels, noise))(params)


class Outcome(NamedTuple):
    loss: float
    grads: dict[str, np.ndarray]
    cut: list[str]  # the parameters that lie cut on the mesh
    program: str


def by_name(tree) -> dict[str, jax.Array]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def on_mesh(axes: dict[str, int], heads: int, rows: PackedRows) -> Outcome:
    mesh = sharding.make_mesh(axes, jax.devices()[: math.prod(axes.values())])
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        placed = jax.device_put(params(heads), state_shardings(params(heads), mesh))
        batch = place(rows, mesh)
        compiled = jax.jit(functools.partial(loss_and_gradients, heads)).lower(placed, batch).compile(QUICK)
        loss, grads = compiled(placed, batch)
    cut = [name for name, leaf in by_name(placed).items() if not leaf.sharding.is_fully_replicated]
    return Outcome(float(loss), {k: np.asarray(v) for k, v in by_name(grads).items()}, cut, compiled.as_text())


@pytest.fixture(scope="module")
def alone(rows: PackedRows):
    return functools.cache(lambda heads: on_mesh({"data": 1}, heads, rows))


@pytest.fixture
def rows_are_long(monkeypatch):
    """Tokens of these short rows are traded between devices as those of long ones are."""
    return lambda: monkeypatch.setattr(attention, "BLOCK", 8)


@pytest.mark.slow
@on_every_mesh
def test_loss_and_gradients_are_those_of_one_device(axes: dict[str, int], heads: int, rows, alone, rows_are_long):
    expected = alone(heads)
    rows_are_long()
    found = on_mesh(axes, heads, rows)
    assert not expected.cut
    assert bool(found.cut) == bool({"fsdp", "tensor"} & set(axes))  # these two cut parameters, the others activations
    if "sequence" in axes:  # nothing of the state is cut: the tokens have to be, or the devices do the same work
        shard = (ROWS // (axes.get("data", 1) * axes.get("fsdp", 1)), TOKENS // axes["sequence"], 8 * heads)
        assert f"f32[{','.join(map(str, shard))}]" in found.program
        assert "all-to-all" in found.program
        if (heads // axes.get("tensor", 1)) % axes["sequence"]:
            assert "collective-permute" in found.program
    whole = f"f32[{ROWS},{TOKENS},{8 * heads}]"
    assert whole in expected.program
    assert ("tensor" in axes and len(axes) == 1) or whole not in found.program, "no device has all tokens of all rows"
    assert abs(found.loss - expected.loss) <= 1e-5 * abs(expected.loss)
    assert found.grads.keys() == expected.grads.keys()
    for name, gradient in found.grads.items():
        norm = np.linalg.norm(expected.grads[name])
        assert norm > 0, name
        assert np.linalg.norm(gradient - expected.grads[name]) <= 1e-5 * norm, name


@pytest.mark.slow
@on_every_mesh
def test_no_video_of_a_row_sees_another(axes: dict[str, int], heads: int, rows, rows_are_long):
    """The second video of every row becomes something else entirely: not one bit of the others' velocity moves."""
    rows_are_long()
    second = rows.segment_ids == 2
    shaken = dataclasses.replace(rows, tokens=np.where(second[..., None], rows.tokens + 100.0, rows.tokens))
    modules = structures(heads)

    def velocity(params: dict, rows: PackedRows) -> jax.Array:
        levels = jnp.full(rows.group_segment.shape, 0.5)
        condition = condition_of(rows, read_text(modules, params, rows, jnp.float32), rows.segment_ids == 0)
        return nnx.merge(modules.transformer, params["transformer"])(rows.tokens, model_time(levels), condition)

    mesh = sharding.make_mesh(axes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params(heads), state_shardings(params(heads), mesh))
        compiled = jax.jit(velocity).lower(placed, place(rows, mesh)).compile(QUICK)
        before, after = (np.asarray(compiled(placed, place(batch, mesh))) for batch in (rows, shaken))
    others = (rows.segment_ids > 0) & ~second
    np.testing.assert_array_equal(after[others], before[others])
    assert (after[second] != before[second]).any(axis=-1).all()


def test_a_text_encoder_whose_weights_are_cut_fetches_them_and_sums_no_activations():
    """Rows of text outweigh weights: summed over devices at each block, they were most of a large step's traffic."""
    config = TextEncoderConfig(vocab_size=384, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4)
    make = functools.partial(TextEncoder, config)
    mesh = sharding.make_mesh({"fsdp": 8})
    structure, shapes = structure_of(lambda rngs: make(rngs=rngs)), shapes_of(lambda rngs: make(rngs=rngs))
    params = placed_shapes(shapes, mesh, jnp.dtype(jnp.float32))
    ids = jax.ShapeDtypeStruct((16, 256), jnp.int32, sharding=sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        encode = jax.jit(lambda params, ids: nnx.merge(structure, params)(ids, ids))
        moved = count_collectives(encode.lower(params, ids).compile(QUICK).as_text())
    weights = 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    activations = 4 * 16 * 256 * config.d_model  # of one block, over all devices
    assert weights / 2 < moved["all-gather"]["bytes"] < 1.5 * weights < activations
    assert moved.get("all-reduce", {"bytes": 0})["bytes"] < activations / 100


@pytest.mark.pods
@pytest.mark.parametrize("axes", AUTOENCODER_MESHES, ids=str)
def test_the_autoencoders_step_is_that_of_one_device(axes: dict[str, int]):
    """Loss, terms and gradients of clips whose rows of pixels lie on several devices."""
    gradients, terms, _ = test_accumulation.one_step("autoencoder", 1, axes)
    expected, expected_terms, _ = the_autoencoders_step()
    for name, value in expected_terms.items():
        assert terms[name] == pytest.approx(value, rel=1e-5), name
    for name, gradient in expected.items():
        assert np.linalg.norm(gradients[name] - gradient) <= 1e-5 * np.linalg.norm(gradient), name


@functools.cache
def the_autoencoders_step():
    return test_accumulation.one_step("autoencoder", 1)
