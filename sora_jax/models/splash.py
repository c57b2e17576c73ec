"""Attention by ids on TPU: the Pallas splash kernel that ships with JAX, made to keep this package's promises.

The kernel wants lengths in blocks of 128, heads of 128 channels and queries scaled beforehand, and gives a query that
sees nothing the mean of v. Rows are padded with id 0 to whole blocks, and such queries are set to 0.

The backward pass uses the unfused kernels: fused, they need 17.7 GB of temporaries at 75,776 tokens against 0.98 GB.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask_info as masks,
)
from jaxtyping import Array, Float, Int

LANES = 128  # rows and heads come in multiples of this
BLOCK = 512  # of queries and of keys
# Ids say all. The kernel's makers would have a mask described block by block, even one that hides nothing: two numbers
# for each of (N / 512)^2 blocks in a megabyte of scalar memory, too many from some 290,000 tokens on.
NO_MASK = masks.MaskInfo(*[None] * 5)


def splash_attention(
    q: Float[Array, "B N K d"],
    k: Float[Array, "B M K d"],
    v: Float[Array, "B M K d"],
    q_ids: Int[Array, "B N"],
    kv_ids: Int[Array, "B M"],
    *,
    kept_as: str | None = None,
    interpret: bool = False,
) -> Float[Array, "B N K d"]:
    """`attention` for d a multiple of 128. A policy of `jax.checkpoint` that keeps the name `kept_as` keeps all that
    the backward pass needs of the kernel. `interpret` runs the kernel on any device, for tests."""
    n, m = q.shape[1], k.shape[1]
    block_q, block_kv = (min(BLOCK, _round_up(length, LANES)) for length in (n, m))

    def heads_first(x: jax.Array, block: int) -> jax.Array:  # [B, N, K, d] -> [B, K, whole blocks, d]
        return jnp.swapaxes(_pad(x, block), 1, 2)

    sizes = kernels.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    kernel: Any = kernels.SplashAttentionKernel(
        *[NO_MASK] * 3,  # forward, and the two kernels of the backward pass
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=kernels.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=kept_as,
        mask_function=None,
        interpret=interpret,
    )
    # The kernel lets id 0 meet id 0; padding must meet nothing, so padded keys get an id that no query has.
    kv_padded = _pad(kv_ids, block_kv)
    ids = kernels.SegmentIds(q=_pad(q_ids, block_q), kv=jnp.where(kv_padded == 0, -1, kv_padded))
    scaled = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    out = jax.vmap(kernel)(heads_first(scaled, block_q), heads_first(k, block_kv), heads_first(v, block_kv), ids)
    sees = jnp.any((q_ids[:, :, None] == kv_ids[:, None, :]) & (q_ids[:, :, None] != 0), axis=-1)
    return jnp.where(sees[..., None, None], jnp.swapaxes(out, 1, 2)[:, :n], 0.0).astype(v.dtype)


def _round_up(length: int, block: int) -> int:
    return -(-length // block) * block


def _pad(x: jax.Array, block: int) -> jax.Array:
    """Zeros after axis 1, up to whole blocks."""
    extra = _round_up(x.shape[1], block) - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, extra), *((0, 0),) * (x.ndim - 2)))
