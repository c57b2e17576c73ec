"""Attention by ids against softmax written out in float64 numpy, on every path."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.models.attention import attention
from sora_jax.models.attention_forms import (
    BLOCK,
    blockwise_attention,
    headwise_attention,
    reference_attention,
    visible,
)

B, N, M, K, D = 2, 37, 21, 3, 8


def by_hand(q, k, v, seen):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, n, h in np.ndindex(q.shape[:3]):
        keys = np.flatnonzero(seen[b, n])
        if len(keys):
            scores = k[b, keys, h] @ q[b, n, h] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[b, n, h] = weights @ v[b, keys, h] / weights.sum()
    return out


def draw(seed, n=N, m=M):
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.normal(size=(B, length, K, D)), jnp.float32) for length in (n, m, m))
    return q, k, v, rng


def in_blocks(q, k, v, *, q_ids, kv_ids, block_ids=None):
    """Of 16 queries, which do not divide N."""
    return blockwise_attention(q, k, v, q_ids, kv_ids, block_ids, block_ids, block=16)


def by_head(q, k, v, *, q_ids, kv_ids):
    return headwise_attention(q, k, v, q_ids, kv_ids)


every_form = pytest.mark.parametrize("form", [attention, in_blocks, by_head])


@every_form
def test_tokens_meet_where_ids_are_equal_and_not_0(form):
    q, k, v, rng = draw(0)
    q_ids, kv_ids = rng.integers(0, 4, (B, N)), rng.integers(0, 3, (B, M))  # id 3 has no keys at all
    seen = (q_ids[:, :, None] == kv_ids[:, None, :]) & (q_ids[:, :, None] > 0)
    out = form(q, k, v, q_ids=jnp.asarray(q_ids), kv_ids=jnp.asarray(kv_ids))
    np.testing.assert_allclose(out, by_hand(q, k, v, seen), atol=2e-6)
    blind = (q_ids == 0) | (q_ids == 3)
    assert blind.any()
    np.testing.assert_array_equal(np.asarray(out)[blind], 0.0)


def test_long_rows_meet_too():
    """As `attention` takes them on the machine at hand: on a CPU head by head, in blocks that do not divide N."""
    long = BLOCK + 13
    q, k, v, rng = draw(5, n=long)
    q_ids, kv_ids = rng.integers(0, 4, (B, long)), rng.integers(0, 3, (B, M))
    seen = (q_ids[:, :, None] == kv_ids[:, None, :]) & (q_ids[:, :, None] > 0)
    out = attention(q, k, v, q_ids=jnp.asarray(q_ids), kv_ids=jnp.asarray(kv_ids))
    np.testing.assert_allclose(out, by_hand(q, k, v, seen), atol=2e-6)


@pytest.mark.parametrize("form", [attention, in_blocks])
def test_causal_over_blocks_of_frames(form):
    q, k, v, rng = draw(1, m=N)
    ids, blocks = rng.integers(1, 3, (B, N)), np.sort(rng.integers(0, 5, (B, N)))
    seen = (ids[:, :, None] == ids[:, None, :]) & (blocks[:, None, :] <= blocks[:, :, None])
    out = form(q, k, v, q_ids=jnp.asarray(ids), kv_ids=jnp.asarray(ids), block_ids=jnp.asarray(blocks))
    np.testing.assert_allclose(out, by_hand(q, k, v, seen), atol=2e-6)


@every_form
def test_other_segments_cannot_leak(form):
    """Perturbing one segment, hugely, changes no bit of another's output or of the gradient that reaches it."""
    q, k, v, _ = draw(2, m=N)
    ids = jnp.asarray(np.tile(np.repeat([1, 2, 0], [20, 15, 2]), (B, 1)))
    first = np.asarray(ids[0]) == 1
    noise = np.where(first[None, :, None, None], 0.0, 1e4).astype(np.float32)

    def run(q, k, v):
        return form(q, k, v, q_ids=ids, kv_ids=ids)

    def gradient(q, k, v):
        return jax.grad(lambda *qkv: jnp.sum(run(*qkv)[:, first] ** 2), argnums=(0, 1, 2))(q, k, v)

    plain, shaken = run(q, k, v), run(q + noise, k + noise, v + noise)
    np.testing.assert_array_equal(np.asarray(plain)[:, first], np.asarray(shaken)[:, first])
    for a, b in zip(gradient(q, k, v), gradient(q + noise, k + noise, v + noise), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[:, first], np.asarray(b)[:, first])
        np.testing.assert_array_equal(np.asarray(b)[:, ~first], 0.0)


def test_gradients_of_all_forms_agree():
    q, k, v, rng = draw(3, m=N)
    ids = jnp.asarray(rng.integers(0, 3, (B, N)))

    def loss(form):
        return jax.grad(lambda *qkv: jnp.sum(jnp.sin(form(*qkv))), argnums=(0, 1, 2))(q, k, v)

    one = loss(lambda q, k, v: reference_attention(q, k, v, visible(ids, ids)))
    blocks = loss(lambda q, k, v: blockwise_attention(q, k, v, ids, ids, block=16))
    heads = loss(lambda q, k, v: headwise_attention(q, k, v, ids, ids))
    for a, b, c in zip(one, blocks, heads, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(b, a, atol=1e-5)
        np.testing.assert_allclose(c, a, atol=1e-5)


def test_bias_is_added_to_the_scores():
    q, k, v, rng = draw(4)
    bias = rng.normal(size=(K, N, M)).astype(np.float32)
    seen = np.ones((B, N, M), bool)
    out = reference_attention(q, k, v, jnp.asarray(seen), bias=jnp.asarray(bias), scale=1.0)
    scores = np.einsum("bnkd,bmkd->bknm", q, k) + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bknm,bmkd->bnkd", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(out, expected, atol=1e-5)
