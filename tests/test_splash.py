"""The TPU kernel: run in interpretation on the CPU, and compiled for a real TPU topology."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.models import attention as attention_module
from sora_jax.models.attention import attention
from sora_jax.models.attention_forms import blockwise_attention, reference_attention, visible
from sora_jax.models.splash import splash_attention
from sora_jax.sharding import make_mesh


@pytest.mark.parametrize("form", ["definition", "blockwise"])
def test_kernel_equals_the_other_forms_with_its_gradients(form):
    """Segments, padding to whole blocks, and queries that see nothing."""
    rng = np.random.default_rng(0)
    n, m = 200, 150
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, 1, 128)), jnp.float32) for length in (n, m, m))
    q_ids, kv_ids = jnp.asarray(rng.integers(0, 4, (1, n))), jnp.asarray(rng.integers(0, 3, (1, m)))

    def kernel(q, k, v):
        return splash_attention(q, k, v, q_ids, kv_ids, interpret=True)

    def other(q, k, v):
        if form == "blockwise":
            return blockwise_attention(q, k, v, q_ids, kv_ids, block=64)
        return reference_attention(q, k, v, visible(q_ids, kv_ids))

    with jax.default_matmul_precision("highest"):
        out = kernel(q, k, v)
        np.testing.assert_allclose(out, other(q, k, v), atol=1e-5)
        blind = np.asarray((q_ids == 0) | (q_ids == 3))
        np.testing.assert_array_equal(np.asarray(out)[blind], 0.0)
        gradients = (jax.grad(lambda *x, f=f: jnp.sum(jnp.sin(f(*x))), (0, 1, 2))(q, k, v) for f in (kernel, other))
        for ours, theirs in zip(*gradients, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def shaken_segments(attend, n, heads):
    """Outputs and gradients before and after all segments but the first were changed, hugely; the first's tokens."""
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(1, n, heads, 128)), jnp.float32) for _ in range(3))
    ids = jnp.asarray(np.repeat([1, 2, 0], [n - 60, 50, 10]))[None]
    first = np.asarray(ids[0]) == 1
    noise = np.where(first[None, :, None, None], 0.0, 1e4).astype(np.float32)

    def run(q, k, v):
        def loss(q, k, v):
            out = attend(q, k, v, ids)
            return jnp.sum(out[:, first] ** 2), out

        (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return [np.asarray(x) for x in (out, *gradients)]

    return run(q, k, v), run(q + noise, k + noise, v + noise), first


def test_other_segments_cannot_leak():
    def kernel(q, k, v, ids):
        return splash_attention(q, k, v, ids, ids, interpret=True)

    plain, shaken, first = shaken_segments(kernel, 200, 1)
    for before, after in zip(plain, shaken, strict=True):
        np.testing.assert_array_equal(after[:, first], before[:, first])
    assert not np.array_equal(shaken[0][:, ~first], plain[0][:, ~first])
    for gradient in shaken[1:]:
        np.testing.assert_array_equal(gradient[:, ~first], 0.0)


@pytest.mark.slow
def test_nor_where_tokens_are_traded_for_heads(monkeypatch):
    """Two devices, each with half of the tokens, then with one of the two heads: as on a TPU, in interpretation."""
    monkeypatch.setattr(attention_module, "BLOCK", 64)
    monkeypatch.setattr(attention_module, "headwise_attention", partial(splash_attention, interpret=True))

    def traded(q, k, v, ids):
        return attention(q, k, v, q_ids=ids, kv_ids=ids)

    with jax.set_mesh(make_mesh({"sequence": 2}, jax.devices()[:2])), jax.default_matmul_precision("highest"):
        plain, shaken, first = shaken_segments(traded, 200, 2)
    for before, after in zip(plain, shaken, strict=True):
        np.testing.assert_array_equal(after[:, first], before[:, first])
    assert not np.array_equal(shaken[0][:, ~first], plain[0][:, ~first])


@pytest.mark.plans
@pytest.mark.parametrize(
    ("topology", "sizes"),
    [("v5e:2x2", {"data": 2, "tensor": 2}), ("v5p:2x2x1", {"fsdp": 4}), ("v5p:2x2x1", {"sequence": 4})],
)
def test_long_rows_compile_to_the_kernel_on_a_tpu_mesh(topology, sizes):
    """Forward and backward of 4,096 tokens in bfloat16, sharded over rows, heads or tokens."""
    pytest.importorskip("libtpu", reason="the TPU compiler comes with the tpu extra")
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(sizes, devices)
    whole = NamedSharding(mesh, PartitionSpec())
    rows = jax.ShapeDtypeStruct((4, 4096, 4, 128), jnp.bfloat16, sharding=whole)
    ids = jax.ShapeDtypeStruct((4, 4096), jnp.int32, sharding=whole)

    def loss(q, k, v, ids):
        return jnp.sum(attention(q, k, v, q_ids=ids, kv_ids=ids).astype(jnp.float32))

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(rows, rows, rows, ids).compile()
    program = compiled.as_text()
    assert program.count("tpu_custom_call") >= 3  # forward, dq, dkv
    assert ("all-to-all" in program) == ("sequence" in sizes)
    scores = 4 * 4 * 4096 * 4096 * 4 // len(devices)
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 2, "scores are never materialised"


@pytest.mark.plans
def test_a_minute_of_720p_compiles_to_the_kernel():
    """867,600 tokens of 5 heads, forward and backward: nothing is described block by block in scalar memory."""
    pytest.importorskip("libtpu", reason="the TPU compiler comes with the tpu extra")
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[:1]
    whole = NamedSharding(make_mesh({"data": 1}, devices), PartitionSpec())
    row = jax.ShapeDtypeStruct((1, 867_600, 5, 128), jnp.bfloat16, sharding=whole)
    ids = jax.ShapeDtypeStruct((1, 867_600), jnp.int32, sharding=whole)

    def loss(q, k, v, ids):
        return jnp.sum(splash_attention(q, k, v, ids, ids).astype(jnp.float32))

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(row, row, row, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 10 * 2**30
