"""Counted operations against sums by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from sora_jax.bench.flops import program_flops
from sora_jax.models.attention import attention
from sora_jax.sharding import make_mesh

A, B = jnp.zeros((8, 32)), jnp.zeros((32, 16))
PRODUCT = 2 * 8 * 32 * 16


def test_products_wherever_they_are():
    assert program_flops(jnp.matmul, A, B) == PRODUCT
    assert program_flops(jax.jit(lambda a, b: jnp.sin(a @ b) + 1), A, B) == PRODUCT
    batched = jnp.zeros((3, 8, 32)), jnp.zeros((3, 32, 16))
    assert program_flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), *batched) == 3 * PRODUCT


def test_loops_turn_and_branches_cost_the_most():
    square = jnp.zeros((16, 16))
    one = 2 * 16**3
    assert program_flops(lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=5)[0], square) == 5 * one
    assert program_flops(lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x @ x), square) == 2 * one
    with pytest.raises(ValueError, match="nobody knows how often it turns"):
        program_flops(lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ c, x), square)


def test_gradients_cost_two_forwards_and_recomputation_one_more():
    def loss(a, b, c):
        return jnp.sum(jnp.sin(a @ b) @ c)

    arguments = A, B, jnp.zeros((16, 4))
    forward = PRODUCT + 2 * 8 * 16 * 4
    assert program_flops(loss, *arguments) == forward
    assert program_flops(jax.grad(loss, (0, 1, 2)), *arguments) == 3 * forward
    again = jax.checkpoint(lambda a, b, c: jnp.sin(jnp.sin(a @ b) @ c))
    counted = program_flops(jax.grad(lambda *x: jnp.sum(again(*x)), (0, 1, 2)), *arguments)
    assert counted == 4 * forward


def test_convolutions():
    x, kernel = jnp.zeros((2, 5, 9, 9, 6)), jnp.zeros((3, 3, 3, 6, 7))
    numbers = ("NTHWC", "THWIO", "NTHWC")
    counted = program_flops(
        lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 2, 2), "VALID", dimension_numbers=numbers), x, kernel
    )
    assert counted == 2 * (2 * 3 * 4 * 4 * 7) * (3 * 3 * 3 * 6)
    grouped = program_flops(
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1, 1, 1), "VALID", dimension_numbers=numbers, feature_group_count=6
        ),
        x,
        jnp.zeros((1, 1, 1, 1, 6)),
    )
    assert grouped == 2 * x.size


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("axes", [{"data": 1}, {"sequence": 4}, {"sequence": 8}])
def test_attention_is_the_same_work_in_every_form(platform: str, axes: dict[str, int]):
    """Blocks, the TPU's kernel, all-to-all and a ring: 4 N^2 d a head, forward, of a whole number of blocks."""
    n, heads, width = 4096, 4, 128
    q, ids = jax.ShapeDtypeStruct((2, n, heads, width), jnp.float32), jax.ShapeDtypeStruct((2, n), jnp.int32)
    devices = next(iter(axes.values()))
    with jax.set_mesh(make_mesh(axes, jax.devices()[:devices])):
        counted = program_flops(lambda q, i: attention(q, q, q, q_ids=i, kv_ids=i), q, ids, platform=platform)
    assert counted == 2 * heads * 4 * n**2 * width
