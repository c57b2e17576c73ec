"""Attention over tokens cut along `sequence`: what one device computes, by all-to-all, by a ring, and by both."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from one_video import one_video

from sora_jax.models.attention import attention
from sora_jax.models.attention_forms import BLOCK, reference_attention, visible
from sora_jax.models.transformer import Transformer, TransformerConfig
from sora_jax.shapes import Extent
from sora_jax.sharding import make_mesh

WIDTH = 8
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # half the time to compile
N = BLOCK + 17  # long enough to be worth cutting, and no axis divides it
# mesh, heads, and the collectives that move keys and values
CASES = {
    "all-to-all": ({"sequence": 8}, 8, {"all-to-all"}),
    "ring": ({"sequence": 8}, 1, {"collective-permute"}),
    "12 heads on 8": ({"sequence": 8}, 12, {"all-to-all", "collective-permute"}),
    "7 heads and an empty one": ({"sequence": 8}, 7, {"all-to-all"}),
    "3 heads on 4, rows on 2": ({"data": 2, "sequence": 4}, 3, {"collective-permute"}),
    "6 heads, tensor x sequence": ({"tensor": 2, "sequence": 4}, 6, {"collective-permute"}),
    "2 rows on 4": ({"fsdp": 4, "sequence": 2}, 4, {"all-to-all"}),
    "3 heads on 2": ({"tensor": 2, "sequence": 4}, 3, {"collective-permute"}),
    "all four axes": ({"fsdp": 2, "tensor": 2, "sequence": 2}, 4, {"all-to-all"}),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def draw(heads: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.normal(size=(2, N, heads, WIDTH)), jnp.float32) for _ in range(3))
    ids = jnp.asarray(rng.integers(0, 4, (2, N)))
    return q, k, v, ids


def on_mesh(axes: dict[str, int], function, *arrays):
    """Its value on so many devices, and the program."""
    with jax.set_mesh(make_mesh(axes, jax.devices()[: math.prod(axes.values())])):
        compiled = jax.jit(function).lower(*arrays).compile(QUICK)
        return compiled(*arrays), compiled.as_text()


@cases
def test_outputs_and_gradients_are_those_of_one_device(case):
    axes, heads, moves = case
    q, k, v, ids = draw(heads)

    def value_and_gradients(attend):
        def loss(q, k, v):
            out = attend(q, k, v)
            return jnp.sum(jnp.sin(out)), out

        return lambda q, k, v: jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    (_, out), grads = value_and_gradients(lambda q, k, v: reference_attention(q, k, v, visible(ids, ids)))(q, k, v)
    cut = value_and_gradients(lambda q, k, v: attention(q, k, v, q_ids=ids, kv_ids=ids))
    ((_, found), found_grads), program = on_mesh(axes, cut, q, k, v)
    np.testing.assert_allclose(found, out, atol=1e-5)
    for a, b in zip(found_grads, grads, strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
    np.testing.assert_array_equal(np.asarray(found)[np.asarray(ids) == 0], 0.0)
    for collective in ("all-to-all", "collective-permute"):
        assert (collective in program) == (collective in moves)


@cases
def test_other_segments_cannot_leak(case):
    axes, heads, _ = case
    q, k, v, _ = draw(heads, seed=1)
    ids = jnp.asarray(np.tile(np.repeat([1, 2, 0], [N - 200, 190, 10]), (2, 1)))
    first = np.asarray(ids[0]) == 1
    noise = np.where(first[None, :, None, None], 0.0, 1e4).astype(np.float32)

    def run(q, k, v):
        return attention(q, k, v, q_ids=ids, kv_ids=ids)

    plain, _ = on_mesh(axes, run, q, k, v)
    shaken, _ = on_mesh(axes, run, q + noise, k + noise, v + noise)
    np.testing.assert_array_equal(np.asarray(plain)[:, first], np.asarray(shaken)[:, first])
    assert not np.array_equal(np.asarray(plain)[:, ~first], np.asarray(shaken)[:, ~first])


def test_text_lies_whole_and_nothing_is_moved_for_it():
    q, _, _, ids = draw(4)
    _, k, v, _ = draw(4, seed=2)
    k, v, text_ids = k[:, :40], v[:, :40], ids[:, :40]
    expected = reference_attention(q, k, v, visible(ids, text_ids))
    found, program = on_mesh({"sequence": 8}, lambda q: attention(q, k, v, q_ids=ids, kv_ids=text_ids), q)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert "all-to-all" not in program
    assert "collective-permute" not in program


def test_the_transformer_trades_its_tokens_for_heads():
    """It passes its segment ids twice, which is how `attention` knows that keys are cut like queries."""
    config = TransformerConfig(
        n_layers=1, n_heads=2, head_dim=8, ffn_dim=16, in_channels=2, out_channels=2, text_dim=4, frequency_dim=8
    )
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), graph=False)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(scale=0.3, size=p.shape), jnp.float32), shapes)
    extent = Extent(2, 2, (BLOCK + 4) // 4)
    tokens, condition = one_video(rng, extent, channels=8, text=(6, 4))

    def forward(params, tokens):
        return nnx.merge(graphdef, params)(tokens, jnp.full((1, 1), 500.0), condition)

    found, program = on_mesh({"sequence": 2}, forward, params, tokens)
    alone, _ = on_mesh({"data": 1}, forward, params, tokens)
    assert "all-to-all" in program
    np.testing.assert_allclose(found, alone, atol=1e-5)
