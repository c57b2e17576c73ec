"""The blocks of the video autoencoder: residual, attention within a frame, and one level down or up.

Called as `block(x, past) -> (y, past)`; see `causal_conv`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from sora_jax.models import layers
from sora_jax.models.causal_conv import (
    KERNEL_AXES,
    CausalConv,
    ChannelNorm,
    Downsample,
    Past,
    Upsample,
    average_down,
    duplicate_up,
    split_past,
)

ATTENTION_BLOCK = 1024  # queries a block; a frame with more positions than this is attended block by block


class ResidualBlock(nnx.Module):
    """Twice norm, SiLU, causal 3 x 3 x 3 convolution, plus a shortcut. Starts as the shortcut alone."""

    def __init__(self, n_in: int, n_out: int, *, rngs: nnx.Rngs):
        self.norm1 = ChannelNorm(n_in, rngs=rngs)
        self.conv1 = CausalConv(n_in, n_out, rngs=rngs)
        self.norm2 = ChannelNorm(n_out, rngs=rngs)
        self.conv2 = CausalConv(n_out, n_out, rngs=rngs, init=layers.zeros)
        self.shortcut = None if n_in == n_out else layers.Linear(n_in, n_out, KERNEL_AXES, rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W C"], past: Past = None) -> tuple[Float[Array, "B T H W O"], Past]:
        past1, past2 = split_past(past, 2)
        y, past1 = self.conv1(jax.nn.silu(self.norm1(x)), past1)
        y, past2 = self.conv2(jax.nn.silu(self.norm2(y)), past2)
        return y + (x if self.shortcut is None else self.shortcut(x)), (past1, past2)


class FrameAttention(nnx.Module):
    """Single-head self-attention over the positions of each frame, plus a shortcut."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm = ChannelNorm(width, rngs=rngs)
        self.qkv = layers.Linear(width, 3 * width, KERNEL_AXES, rngs=rngs)
        self.out = layers.Linear(width, width, KERNEL_AXES, rngs=rngs, init=layers.zeros)

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        q, k, v = jnp.split(rearrange(self.qkv(self.norm(x)), "b t h w c -> (b t) (h w) c"), 3, axis=-1)
        return x + self.out(attend(q, k, v, ATTENTION_BLOCK).reshape(x.shape))


def attend(
    q: Float[Array, "M N C"], k: Float[Array, "M N C"], v: Float[Array, "M N C"], block: int
) -> Float[Array, "M N C"]:
    """softmax(q k^T / sqrt(C)) v, scores and softmax in float32, holding at most [M, block, N] scores at a time."""

    def rows(q_block: jax.Array) -> jax.Array:
        scores = jnp.einsum("mqc,mnc->mqn", q_block, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores / math.sqrt(q.shape[-1]), axis=-1)
        return jnp.einsum("mqn,mnc->mqc", weights.astype(v.dtype), v)

    n = q.shape[1]
    if n <= block:
        return rows(q)
    q = jnp.pad(q, ((0, 0), (0, -n % block), (0, 0)))
    y = jax.lax.map(rows, rearrange(q, "m (blocks n) c -> blocks m n c", n=block))
    return rearrange(y, "blocks m n c -> m (blocks n) c")[:, :n]


class MiddleBlock(nnx.Module):
    """Residual block, attention within each frame, residual block, at the lowest resolution."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.resnet1 = ResidualBlock(width, width, rngs=rngs)
        self.attention = FrameAttention(width, rngs=rngs)
        self.resnet2 = ResidualBlock(width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W C"], past: Past = None) -> tuple[Float[Array, "B T H W C"], Past]:
        past1, past2 = split_past(past, 2)
        x, past1 = self.resnet1(x, past1)
        x, past2 = self.resnet2(self.attention(x), past2)
        return x, (past1, past2)


class DownBlock(nnx.Module):
    """One level of the encoder: residual blocks, then `Downsample` unless it is the last.

    With `shortcut`, `average_down` of the input is added to the output, and is all of it at first.
    """

    def __init__(
        self, n_in: int, n_out: int, n_blocks: int, *, space: bool, time: bool, shortcut: bool, rngs: nnx.Rngs
    ):
        widths = [n_in] + [n_out] * n_blocks
        self.resnets = nnx.List([ResidualBlock(widths[i], n_out, rngs=rngs) for i in range(n_blocks)])
        init = layers.zeros if shortcut else layers.lecun_normal
        self.downsample = Downsample(n_out, time=time, rngs=rngs, init=init) if space else None
        self.shortcut = (n_out, 1 + time, 1 + space) if shortcut else None

    def __call__(self, x: Float[Array, "B T H W C"], past: Past = None) -> tuple[Float[Array, "B _ _ _ O"], Past]:
        skip = None if self.shortcut is None else average_down(x, *self.shortcut, first=past is None)
        pasts = list(split_past(past, len(self.resnets) + 1))
        for i, resnet in enumerate(self.resnets):
            x, pasts[i] = resnet(x, pasts[i])
        if self.downsample is None:
            pasts[-1] = ()
        else:
            x, pasts[-1] = self.downsample(x, pasts[-1])
        return (x if skip is None else x + skip), tuple(pasts)


class UpBlock(nnx.Module):
    """One level of the decoder: residual blocks, then `Upsample` to `n_up` channels unless it is the last.

    With `shortcut`, `duplicate_up` of the input is added to the output of the upsampling, and is all of it at first.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        n_up: int,
        n_blocks: int,
        *,
        space: bool,
        time: bool,
        shortcut: bool,
        rngs: nnx.Rngs,
    ):
        widths = [n_in] + [n_out] * n_blocks
        self.resnets = nnx.List([ResidualBlock(widths[i], n_out, rngs=rngs) for i in range(n_blocks)])
        init = layers.zeros if shortcut else layers.lecun_normal
        self.upsample = Upsample(n_out, n_up, time=time, rngs=rngs, init=init) if space else None
        self.shortcut = (n_up, 1 + time, 2) if shortcut and space else None

    def __call__(self, x: Float[Array, "B T H W C"], past: Past = None) -> tuple[Float[Array, "B _ _ _ O"], Past]:
        skip = None if self.shortcut is None else duplicate_up(x, *self.shortcut, first=past is None)
        pasts = list(split_past(past, len(self.resnets) + 1))
        for i, resnet in enumerate(self.resnets):
            x, pasts[i] = resnet(x, pasts[i])
        if self.upsample is None:
            pasts[-1] = ()
        else:
            x, pasts[-1] = self.upsample(x, pasts[-1])
        return (x if skip is None else x + skip), tuple(pasts)
