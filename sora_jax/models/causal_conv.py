"""Convolutions, norms and resampling that look only into the past: the parts of the causal video autoencoder.

Every module with a memory is called as `module(x, past) -> (y, past)`. `past` is a pytree of the last frames the module
has seen, or None at the start of a clip; the returned one is handed to the next call. A clip given whole, or given as
its first frame and then in chunks, makes the same output, so training (all at once) and streaming share this code.

At the start of a clip the modules that change the frame rate treat the first frame apart, which is why videos have
1 + 2^n k frames: the first frame is neither merged with nor expanded into others (Wan, arXiv:2503.20314, section 4.1).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from sora_jax.models import layers
from sora_jax.models.convolution import causal_conv, conv_frames, same_padding

Past = Any  # None, an array [B, frames, H, W, C], or a tuple of pasts

KERNEL_AXES = ("channels_in", "channels_out")


def image_init(init: layers.Initializer) -> layers.Initializer:
    """Start a kernel [taps, ...] as `init` of the current frame's tap, the earlier ones zero: an untrained network
    treats every frame as an image, and a network trained on images starts right on video."""

    def make(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.zeros(shape, dtype).at[-1].set(init(key, shape[1:], dtype))

    return make


def pass_through(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The matrix [n, m n] that repeats n channels m times."""
    del key
    return jnp.tile(jnp.eye(shape[0], dtype=dtype), (1, shape[1] // shape[0]))


def split_past(past: Past, count: int) -> tuple[Past, ...]:
    """The pasts of `count` children; all None at the start of a clip."""
    return (None,) * count if past is None else past


def last_frames(x: Float[Array, "B T H W C"], past: Past, count: int) -> Float[Array, "B _ H W C"]:
    """The last `count` frames seen so far; frames before the start of the clip are zero."""
    if x.shape[1] >= count:
        return x[:, x.shape[1] - count :]
    if past is None:
        return jnp.pad(x, ((0, 0), (count - x.shape[1], 0), (0, 0), (0, 0), (0, 0)))
    return jnp.concatenate([past[:, x.shape[1] :], x], axis=1)


class CausalConv(nnx.Module):
    """A kt x kh x kw convolution with bias over [B, T, H, W, C] that never reads a later frame."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        size: tuple[int, int, int] = (3, 3, 3),
        *,
        rngs: nnx.Rngs,
        init: layers.Initializer = layers.lecun_normal,
    ):
        self.kernel = layers.param(rngs, image_init(init), (*size, n_in, n_out), (None, None, None, *KERNEL_AXES))
        self.bias = layers.param(rngs, layers.zeros, (n_out,), KERNEL_AXES[1:])

    def __call__(self, x: Float[Array, "B T H W C"], past: Past = None) -> tuple[Float[Array, "B T H W O"], Past]:
        y = causal_conv(x, self.kernel[...].astype(x.dtype), past) + self.bias[...].astype(x.dtype)
        return y, last_frames(x, past, self.kernel.shape[0] - 1)


class FrameConv(nnx.Module):
    """A 3 x 3 convolution with bias of every frame by itself."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        stride: int = 1,
        rngs: nnx.Rngs,
        init: layers.Initializer = layers.lecun_normal,
    ):
        self.kernel = layers.param(rngs, init, (3, 3, n_in, n_out), (None, None, *KERNEL_AXES))
        self.bias = layers.param(rngs, layers.zeros, (n_out,), KERNEL_AXES[1:])
        self.stride = stride

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T _ _ O"]:
        # A strided convolution pads below and to the right only, as the open weights were trained.
        pad = same_padding((3, 3)) if self.stride == 1 else ((0, 1), (0, 1))
        return conv_frames(x, self.kernel[...].astype(x.dtype), self.stride, pad) + self.bias[...].astype(x.dtype)


class TimeConv(nnx.Module):
    """Three taps along time and none in space, as one matrix product over [..., 3 C]; no padding: T frames make
    (T - 3) // stride + 1. Starts by copying the current frame, `n_out // n_in` times."""

    def __init__(self, n_in: int, n_out: int, *, stride: int = 1, rngs: nnx.Rngs):
        self.kernel = layers.param(rngs, image_init(pass_through), (3, n_in, n_out), (None, *KERNEL_AXES))
        self.bias = layers.param(rngs, layers.zeros, (n_out,), KERNEL_AXES[1:])
        self.stride = stride

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B _ H W O"]:
        last = x.shape[1] - 2
        taps = jnp.concatenate([x[:, i : last + i : self.stride] for i in range(3)], axis=-1)
        kernel = rearrange(self.kernel[...], "tap c o -> (tap c) o")
        return layers.matmul(taps, kernel.astype(x.dtype)) + self.bias[...].astype(x.dtype)


# --- norm ----------------------------------------------------------------------------------------------------------


class ChannelNorm(nnx.Module):
    """x / |x| * sqrt(C) * scale over the channels, in float32: an RMS norm whose floor is on |x| (1e-12), not added to
    the mean square, as the open weights were trained."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.scale = layers.param(rngs, layers.ones, (width,), KERNEL_AXES[:1])

    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        wide = x.astype(jnp.float32)
        square = jnp.maximum(jnp.sum(wide * wide, axis=-1, keepdims=True), 1e-24)
        return (wide * (jax.lax.rsqrt(square) * math.sqrt(x.shape[-1])) * self.scale[...]).astype(x.dtype)


# --- resampling ----------------------------------------------------------------------------------------------------


class Downsample(nnx.Module):
    """Halve height and width, and with `time` the frame rate: 1 + 2n frames make 1 + n (a later chunk: 2n make n)."""

    def __init__(self, width: int, *, time: bool, rngs: nnx.Rngs, init: layers.Initializer = layers.lecun_normal):
        self.space_conv = FrameConv(width, width, stride=2, rngs=rngs, init=init)
        self.time_conv = TimeConv(width, width, stride=2, rngs=rngs) if time else None

    def __call__(self, x: Float[Array, "B T H W C"], past: Past = None) -> tuple[Float[Array, "B _ _ _ C"], Past]:
        x = self.space_conv(x)
        if self.time_conv is None:
            return x, ()
        if past is not None:
            y = self.time_conv(jnp.concatenate([past, x], axis=1))
        elif x.shape[1] == 1:
            y = x
        else:
            y = jnp.concatenate([x[:, :1], self.time_conv(x)], axis=1)
        return y, x[:, -1:]


class Upsample(nnx.Module):
    """Double height and width, and with `time` the frame rate: 1 + n frames make 1 + 2n (a later chunk: n make 2n).

    The first frame of a clip neither passes the time convolution nor enters its memory.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        time: bool,
        rngs: nnx.Rngs,
        init: layers.Initializer = layers.lecun_normal,
    ):
        self.space_conv = FrameConv(n_in, n_out, rngs=rngs, init=init)
        self.time_conv = TimeConv(n_in, 2 * n_in, rngs=rngs) if time else None

    def __call__(self, x: Float[Array, "B T H W C"], past: Past = None) -> tuple[Float[Array, "B _ _ _ O"], Past]:
        new_past: Past = ()
        if self.time_conv is not None:
            first, rest = (x[:, :1], x[:, 1:]) if past is None else (x[:, :0], x)
            if past is None:
                past = jnp.zeros_like(x, shape=(x.shape[0], 2, *x.shape[2:]))
            new_past = last_frames(rest, past, 2)
            if rest.shape[1]:
                doubled = self.time_conv(jnp.concatenate([past, rest], axis=1))
                doubled = rearrange(doubled, "b t h w (two c) -> b (t two) h w c", two=2)
                x = jnp.concatenate([first, doubled], axis=1)
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        return self.space_conv(x), new_past


def average_down(
    x: Float[Array, "B T H W C"], n_out: int, time: int, space: int, *, first: bool
) -> Float[Array, "B _ _ _ O"]:
    """Fold windows of time x space x space pixels into channels, then average neighbouring channels to `n_out`.

    At the start of a clip (`first`) zero frames are put in front, so that the first frame shares its window with zeros.
    No parameters; the shortcut of the 2.2 autoencoder's encoder.
    """
    if first and x.shape[1] % time:
        x = jnp.pad(x, ((0, 0), (time - x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    x = rearrange(x, "b (t ft) (h fh) (w fw) c -> b t h w (c ft fh fw)", ft=time, fh=space, fw=space)
    return jnp.mean(x.reshape(*x.shape[:-1], n_out, -1), axis=-1)


def duplicate_up(
    x: Float[Array, "B T H W C"], n_out: int, time: int, space: int, *, first: bool
) -> Float[Array, "B _ _ _ O"]:
    """Repeat channels, then unfold them into windows of time x space x space pixels with `n_out` channels.

    At the start of a clip (`first`) only the last frame of the first window is kept. The shortcut of the 2.2 decoder.
    """
    x = jnp.repeat(x, n_out * time * space * space // x.shape[-1], axis=-1)
    x = rearrange(x, "b t h w (c ft fh fw) -> b (t ft) (h fh) (w fw) c", ft=time, fh=space, fw=space)
    return x[:, time - 1 :] if first else x
