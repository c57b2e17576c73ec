"""The one attention function of the package.

    out[n] = sum_m softmax_m(q[n] . k[m] / sqrt(d)) v[m]     over the m that token n may see

Token n sees token m when `q_ids[n] == kv_ids[m]` and neither is 0, and, where `block_ids` are given, when
`block_ids[m] <= block_ids[n]` (causal over blocks of frames). A query that sees nothing gets 0 on every backend:
softmax over an empty set would otherwise be NaN, or the mean of v.

    at most BLOCK queries   in one piece                                                attention_forms
    longer, on a CPU        head by head, in blocks of queries                          attention_forms
    longer, on a TPU        the splash kernel                                           splash
    tokens cut over devices one of these on each, tokens traded for heads, or a ring    sequence_parallel

Axes: B batch row, N queries, M keys, K heads, d head width.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from sora_jax.models.attention_forms import (
    ATTENDED,
    BLOCK,
    blockwise_attention,
    headwise_attention,
    reference_attention,
    visible,
)
from sora_jax.models.sequence_parallel import Kernel, sequence_parallel
from sora_jax.sharding import mesh_size, shard_over_mesh, spec

SPLASH_WIDTH = 128  # head widths that the TPU kernel takes are multiples of this


def attention(
    q: Float[Array, "B N K d"],
    k: Float[Array, "B M K d"],
    v: Float[Array, "B M K d"],
    *,
    q_ids: Int[Array, "B N"],
    kv_ids: Int[Array, "B M"],
    block_ids: Int[Array, "B N"] | None = None,
) -> Float[Array, "B N K d"]:
    """Attention by ids; self-attention passes `segment_ids` twice, cross-attention `prompt_ids` against `text_ids`.

    `block_ids` (self-attention only) makes it causal over blocks: a token sees blocks up to its own. Queries lie cut
    over the mesh's `sequence` axis; keys do too where `kv_ids` is `q_ids` itself, and lie whole where it is not.
    The choice of form follows the platform the program is compiled for, not the one it is traced on.
    """
    shared = kv_ids is not q_ids

    def kept(form: Kernel) -> Kernel:
        """`form`, whose result a policy of `jax.checkpoint` may know by name; that of a text is soon made again."""
        return form if shared else lambda *arrays: checkpoint_name(form(*arrays), ATTENDED)

    if q.shape[1] <= BLOCK:
        return kept(reference_attention)(q, k, v, visible(q_ids, kv_ids, block_ids, block_ids))
    if block_ids is not None:
        return kept(blockwise_attention)(q, k, v, q_ids, kv_ids, block_ids, block_ids)

    def splash(*arrays: jax.Array) -> jax.Array:
        from sora_jax.models.splash import splash_attention  # imports Pallas: half a second that only long rows pay

        return splash_attention(*arrays, kept_as=None if shared else ATTENDED)

    on_tpu = splash if q.shape[-1] % SPLASH_WIDTH == 0 else kept(blockwise_attention)
    by_device = partial(_on_each_device, shared=shared)
    return jax.lax.platform_dependent(
        *(q, k, v, q_ids, kv_ids),
        cpu=partial(by_device, kept(headwise_attention)),
        tpu=partial(by_device, on_tpu),
        default=partial(by_device, kept(blockwise_attention)),
    )


def _on_each_device(kernel: Kernel, *arrays: jax.Array, shared: bool) -> jax.Array:
    """`kernel` on each device's rows, heads and queries. Keys are `shared` by all devices of the sequence axis, or are
    cut like the queries; tokens that the axis does not divide are padded with ones that nobody sees."""
    size, tokens = mesh_size("sequence"), arrays[0].shape[1]
    if size > 1 and not shared:
        kernel = sequence_parallel(kernel, size)
    extra = -tokens % size

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, extra), *((0, 0),) * (x.ndim - 2))) if extra else x

    q, k, v, q_ids, kv_ids = arrays
    q, q_ids = pad(q), pad(q_ids)
    if not shared:
        k, v, kv_ids = pad(k), pad(v), pad(kv_ids)
    rows, heads = _cut_evenly(q.shape[0], q.shape[2])
    queries, ids = spec((rows, "tokens", heads, None)), spec((rows, "tokens"))
    keys, key_ids = (spec((rows, None, heads, None)), spec((rows, None))) if shared else (queries, ids)
    out = shard_over_mesh(kernel, (queries, keys, keys, ids, key_ids), queries)(q, k, v, q_ids, kv_ids)
    return out[:, :tokens]


def _cut_evenly(rows: int, heads: int) -> tuple[str | None, str | None]:
    """The logical axes of rows and heads; None for what the mesh does not cut evenly. Every device computes that whole,
    as the two rows of one guided video where eight devices hold the parameters (`fsdp`)."""
    by_rows = rows % (mesh_size("data") * mesh_size("fsdp")) == 0
    return "batch" if by_rows else None, "heads" if heads % mesh_size("tensor") == 0 else None
