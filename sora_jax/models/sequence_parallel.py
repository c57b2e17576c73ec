"""Self-attention over tokens that lie cut along the mesh axis `sequence`.

    heads to spare        all-to-all: trade tokens for heads, attend, trade back (DeepSpeed-Ulysses, arXiv:2309.14509)
    no heads left         ring: keys and values travel round, softmax is put together (Ring Attention, arXiv:2310.01889)
    12 heads on 8         both, 4 x 2 (USP, arXiv:2405.07719)
    40 heads on 16        all-to-all of 48, of which 8 are empty: a fifth more work, where a ring would be slower

S devices of the axis are U x R: device s = r U + u has, after the all-to-all, head group u and the tokens of the U
devices of its r; U is the greatest divisor of S that the heads allow. Everything here is what one device does, inside
`shard_map`; queries and keys come normalised and rotated.

Axes: b rows, n tokens, k heads of this device; d head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from sora_jax.models.attention_forms import ATTENDED, BLOCK, MASKED, in_query_blocks, visible

SEQUENCE = "sequence"  # the mesh axis

MOST_EMPTY = (
    0.25  # of the heads, so many more may be empty: a ring's scores go through memory, those of a kernel do not
)

Kernel = Callable[..., jax.Array]
"""`kernel(q, k, v, q_ids, kv_ids) -> out` on arrays that lie whole."""


class Partial(NamedTuple):
    """Softmax over a part of the keys, unfinished: sum_m exp(s_m - top) v_m, sum_m exp(s_m - top), and top."""

    weighted: Float[Array, "b n k d"]
    total: Float[Array, "b n k"]
    top: Float[Array, "b n k"]


def heads_across(heads: int, size: int) -> tuple[int, int]:
    """How many heads are traded, empty ones included, and over how many of `size` devices; the rest is a ring.

    >>> heads_across(40, 8), heads_across(12, 8), heads_across(40, 16)
    ((40, 8), (12, 4), (48, 16))
    """
    filled = -(-heads // size) * size
    return (filled, size) if filled <= (1 + MOST_EMPTY) * heads else (heads, math.gcd(heads, size))


def sequence_parallel(kernel: Kernel, size: int) -> Kernel:
    """`kernel` for one device's n = N / size tokens of every head; a ring does without the kernel."""

    def local(
        q: Float[Array, "b n k d"],
        k: Float[Array, "b n k d"],
        v: Float[Array, "b n k d"],
        q_ids: Int[Array, "b n"],
        kv_ids: Int[Array, "b n"],
    ) -> Float[Array, "b n k d"]:
        heads = q.shape[2]
        traded, across = heads_across(heads, size)
        groups = [[r * across + u for u in range(across)] for r in range(size // across)]

        def trade(x: jax.Array, given: int, gained: int) -> jax.Array:
            return jax.lax.all_to_all(x, SEQUENCE, given, gained, axis_index_groups=groups, tiled=True)

        def gather(ids: jax.Array) -> jax.Array:
            return jax.lax.all_gather(ids, SEQUENCE, axis=1, axis_index_groups=groups, tiled=True)

        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, traded - heads), (0, 0))) for x in (q, k, v))
        q, k, v = (trade(x, 2, 1) for x in (q, k, v))  # [b, n U, k / U, d]
        q_ids, kv_ids = gather(q_ids), gather(kv_ids)
        if across == size:
            out = kernel(q, k, v, q_ids, kv_ids)
        else:
            out = checkpoint_name(ring_attention(q, k, v, q_ids, kv_ids, size=size, hop=across), ATTENDED)
        return trade(out, 1, 2)[:, :, :heads]

    return local


def ring_attention(
    q: Float[Array, "b n k d"],
    k: Float[Array, "b n k d"],
    v: Float[Array, "b n k d"],
    q_ids: Int[Array, "b n"],
    kv_ids: Int[Array, "b n"],
    *,
    size: int,
    hop: int,
) -> Float[Array, "b n k d"]:
    """Every device's queries against all keys, which are passed on `hop` devices ahead until they have been round.

    A query that sees nothing anywhere gets 0. Memory is linear in n: scores are made of BLOCK queries at a time, and
    made anew in the backward pass.
    """
    ahead = [(device, (device + hop) % size) for device in range(size)]
    seen = attend_part(q, k, v, q_ids, kv_ids)
    for _ in range(size // hop - 1):
        k, v, kv_ids = (jax.lax.ppermute(x, SEQUENCE, ahead) for x in (k, v, kv_ids))
        seen = join(seen, attend_part(q, k, v, q_ids, kv_ids))
    blind = seen.top == MASKED
    out = seen.weighted / jnp.where(blind, 1.0, seen.total)[..., None]
    return jnp.where(blind[..., None], 0.0, out).astype(v.dtype)


def join(a: Partial, b: Partial) -> Partial:
    """Softmax over the keys of both."""
    top = jnp.maximum(a.top, b.top)
    left, right = jnp.exp(a.top - top), jnp.exp(b.top - top)
    weighted = a.weighted * left[..., None] + b.weighted * right[..., None]
    return Partial(weighted, a.total * left + b.total * right, top)


def attend_part(
    q: Float[Array, "b n k d"],
    k: Float[Array, "b m k d"],
    v: Float[Array, "b m k d"],
    q_ids: Int[Array, "b n"],
    kv_ids: Int[Array, "b m"],
) -> Partial:
    """Queries against these keys alone, in float32; `top` is MASKED where a query sees none of them."""

    def one(queries: tuple[jax.Array, jax.Array]) -> Partial:
        q_block, ids = queries
        return _softmax_part(q_block, k, v, visible(ids, kv_ids))

    return in_query_blocks(one, (q, q_ids), min(BLOCK, q.shape[1]))


def _softmax_part(
    q: Float[Array, "b n k d"], k: Float[Array, "b m k d"], v: Float[Array, "b m k d"], seen: Bool[Array, "b n m"]
) -> Partial:
    scores = jnp.einsum("bnkd,bmkd->bknm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(seen[:, None], scores, MASKED)
    # The result does not depend on `top`: it cancels when parts are joined, and so carries no gradient.
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
    weights = jnp.where(seen[:, None], jnp.exp(scores - top[..., None]), 0.0)
    weighted = jnp.einsum("bknm,bmkd->bnkd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return Partial(weighted, jnp.moveaxis(jnp.sum(weights, axis=-1), 1, 2), jnp.moveaxis(top, 1, 2))
