"""Convolutions, norms and resampling that look only into the past: the parts of the causal video autoencoder.

Every module with a memory is called as `module(x, past) -> (y, past)`. `past` is a pytree of the last frames the module
has seen, or None at the start of a clip; the returned one is handed to the next call. A clip given whole, or given as
its first frame and then in chunks, makes the same output, so training (all at once) and streaming share this code.

At the start of a clip the modules that change the frame rate treat the first frame apart, which is why videos have
1 + 2^n k frames: the first frame is neither merged with nor expanded into others (Wan, arXiv:2503.20314, section 4.1).
"""

from __future__ import annotations

import functools
import math
import operator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from sora_jax.models import layers

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


# --- convolution ---------------------------------------------------------------------------------------------------


def conv_3d(x: Float[Array, "B T H W C"], kernel: Float[Array, "kt kh kw C O"], lead: int) -> Float[Array, "B _ H W O"]:
    """Causal convolution as one 3-D convolution; the first `lead` < kt frames of x are past, and make no output."""
    kt, kh, kw = kernel.shape[:3]
    pad = ((kt - 1 - lead, 0), (kh // 2, kh // 2), (kw // 2, kw // 2))
    return jax.lax.conv_general_dilated(x, kernel, (1, 1, 1), pad, dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv_2d_sum(
    x: Float[Array, "B T H W C"], kernel: Float[Array, "kt kh kw C O"], lead: int
) -> Float[Array, "B _ H W O"]:
    """`conv_3d` as a sum over time taps of 2-D convolutions; taps that would read the zeros before a clip are left out.

    XLA on the CPU runs this 2 to 4 times as fast as a 3-D convolution; on TPU the 3-D form is the fast one.
    """
    return _sum_of_taps(x, kernel, lead)


def _sum_of_taps(x: jax.Array, kernel: jax.Array, lead: int) -> jax.Array:
    frames = x.shape[1] - lead
    total: jax.Array | None = None
    for back in range(kernel.shape[0]):  # the tap that reads `back` frames earlier
        start, stop = max(lead - back, 0), lead - back + frames
        if stop <= 0:
            continue
        y = _conv_2d(x[:, start:stop], kernel[kernel.shape[0] - 1 - back], 1, _same(kernel.shape[1:3]))
        if y.shape[1] < frames:
            y = jnp.pad(y, ((0, 0), (frames - y.shape[1], 0), (0, 0), (0, 0), (0, 0)))
        total = y if total is None else total + y
    assert total is not None  # back = 0 always reads the frame itself
    return total


def _conv_2d_sum_forward(x: jax.Array, kernel: jax.Array, lead: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _sum_of_taps(x, kernel, lead), (x, kernel)


def _conv_2d_sum_backward(lead: int, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    taps = kernel.shape[0]
    (dx,) = jax.linear_transpose(lambda x: _sum_of_taps(x, kernel, lead), x)(dy)
    # For each tap, dy at the time of the input frame that it reads; side by side, so that one product serves all taps.
    zero = jnp.zeros((), dy.dtype)
    still = (0, 0, 0)
    shifted = [
        jax.lax.pad(dy, zero, (still, (lead - back, back, 0), still, still, still)) for back in reversed(range(taps))
    ]
    d_kernel = _kernel_gradient(x, jnp.concatenate(shifted, axis=-1), kernel.shape[1:3], 1, _same(kernel.shape[1:3]))
    return dx, rearrange(d_kernel, "kh kw c (kt o) -> kt kh kw c o", kt=taps).astype(kernel.dtype)


conv_2d_sum.defvjp(_conv_2d_sum_forward, _conv_2d_sum_backward)

Padding = tuple[tuple[int, int], tuple[int, int]]  # above and below, left and right


def _same(size: tuple[int, ...]) -> Padding:
    return (size[0] // 2, size[0] // 2), (size[1] // 2, size[1] // 2)


def _conv_2d(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """A 2-D convolution of every frame of [B, T, H, W, C]."""
    y = jax.lax.conv_general_dilated(
        x.reshape(-1, *x.shape[2:]), kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _kernel_gradient(
    x: Float[Array, "B T H W C"], dy: Float[Array, "B T h w O"], size: tuple[int, ...], stride: int, padding: Padding
) -> Float[Array, "kh kw C O"]:
    """The gradient of a 2-D convolution's kernel, one matrix product per tap.

    XLA's CPU compiler makes one convolution of it whose window is the whole frame, which takes four times as long at
    16x16 pixels.
    """
    x = jnp.pad(x, ((0, 0), (0, 0), *padding, (0, 0)))
    rows = dy.reshape(-1, dy.shape[-1])

    def tap(i: int, j: int) -> jax.Array:
        high, wide = (stride * (n - 1) + 1 for n in dy.shape[2:4])
        read = x[:, :, i : i + high : stride, j : j + wide : stride].reshape(-1, x.shape[-1])
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        return jax.lax.dot_general(read, rows, (((0,), (0,)), ((), ())), preferred_element_type=dtype)

    return jnp.stack([jnp.stack([tap(i, j) for j in range(size[1])]) for i in range(size[0])])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_frames_by_taps(
    x: Float[Array, "B T H W C"], kernel: Float[Array, "kh kw C O"], stride: int, padding: Padding
) -> Float[Array, "B T _ _ O"]:
    """A 2-D convolution of every frame, with the gradient of its kernel tap by tap."""
    return _conv_2d(x, kernel, stride, padding)


def _by_taps_forward(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _conv_2d(x, kernel, stride, padding), (x, kernel)


def _by_taps_backward(
    stride: int, padding: Padding, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    (dx,) = jax.linear_transpose(lambda x: _conv_2d(x, kernel, stride, padding), x)(dy)
    return dx, _kernel_gradient(x, dy, kernel.shape[:2], stride, padding).astype(kernel.dtype)


conv_frames_by_taps.defvjp(_by_taps_forward, _by_taps_backward)


# --- bfloat16 on a CPU: products in place of convolutions ----------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def conv_by_products(
    x: Float[Array, "B T H W C"], kernel: Float[Array, "kt kh kw C O"], lead: int, stride: int, padding: Padding
) -> Float[Array, "B _ _ _ O"]:
    """Causal in time, strided in space: kh matrix products of kw C by kt O, and their shifted sum.

    XLA's CPU compiler has no bfloat16 convolution, while its products run at 4 times the float32 rate on a CPU with
    bfloat16 tiles (AMX). Sums are float32. A clip of 17 frames of 16x16 trains at 1.7 times the speed at 48 channels,
    of 9 frames of 8x8 at 2.4 times at 96.
    """
    return _shifted_sum(_tap_products(x, kernel, stride, padding), lead, x.shape[1]).astype(x.dtype)


def _beside(x: jax.Array, width: int, stride: int, padding: Padding) -> jax.Array:
    """The `width` neighbours along W of each position side by side in the channels; H is padded and whole."""
    x = jnp.pad(x, ((0, 0), (0, 0), *padding, (0, 0)))
    wide = x.shape[3] - width + 1
    return jnp.concatenate([x[:, :, :, j : j + wide : stride] for j in range(width)], axis=-1)


def _strips(x: jax.Array, size: tuple[int, ...], stride: int, padding: Padding) -> list[jax.Array]:
    """For each row of a kernel what it reads: [B, T, h, w, kw C]."""
    columns = _beside(x, size[1], stride, padding)
    high = columns.shape[2] - size[0] + 1
    return [columns[:, :, i : i + high : stride] for i in range(size[0])]


def _tap_products(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> Float[Array, "B T h w kt O"]:
    rows = rearrange(kernel, "kt kh kw c o -> kh (kw c) (kt o)")
    strips = _strips(x, kernel.shape[1:3], stride, padding)
    total = _sum([layers.contract(strip, row, (4,), (0,)) for strip, row in zip(strips, rows, strict=True)])
    return rearrange(total, "b t h w (kt o) -> b t h w kt o", kt=kernel.shape[0])


def _shift(x: jax.Array, before: int, after: int) -> jax.Array:
    """Zero frames put before and after x; a negative number takes frames away."""
    still = ((0, 0, 0),) * (x.ndim - 2)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (before, after, 0), *still))


def _shifted_sum(products: Float[Array, "B T h w kt O"], lead: int, frames: int) -> Float[Array, "B _ h w O"]:
    taps = products.shape[4]
    assert products.shape[1] == frames
    return _sum([_shift(products[..., taps - 1 - back, :], back - lead, -back) for back in range(taps)])


def _sum(arrays: list[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, arrays)


def _by_products_forward(
    x: jax.Array, kernel: jax.Array, lead: int, stride: int, padding: Padding
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return conv_by_products(x, kernel, lead, stride, padding), (x, kernel)


def _by_products_backward(
    lead: int, stride: int, padding: Padding, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    taps, size = kernel.shape[0], kernel.shape[1:3]
    if stride == 1:  # the same products of dy with the kernel turned round, shifted the other way
        turned = rearrange(kernel[:, ::-1, ::-1], "kt kh kw c o -> kt kh kw o c")
        products = _tap_products(dy, turned, 1, padding)
        dx = _sum([_shift(products[..., taps - 1 - back, :], lead - back, back) for back in range(taps)])
    else:
        (dx,) = jax.linear_transpose(
            lambda x: _shifted_sum(_tap_products(x, kernel, stride, padding), lead, x.shape[1]), x
        )(dy.astype(jnp.promote_types(dy.dtype, jnp.float32)))
    late = jnp.concatenate([_shift(dy, lead - back, back) for back in reversed(range(taps))], axis=-1)
    axes = (0, 1, 2, 3)
    d_kernel = jnp.stack([layers.contract(strip, late, axes, axes) for strip in _strips(x, size, stride, padding)])
    d_kernel = rearrange(d_kernel, "kh (kw c) (kt o) -> kt kh kw c o", kw=size[1], kt=taps)
    return dx.astype(x.dtype), d_kernel.astype(kernel.dtype)


conv_by_products.defvjp(_by_products_forward, _by_products_backward)


# --- one form for each platform --------------------------------------------------------------------------------------


def conv_frames(
    x: Float[Array, "B T H W C"], kernel: Float[Array, "kh kw C O"], stride: int, padding: Padding
) -> Float[Array, "B T _ _ O"]:
    """A 2-D convolution of every frame; on the CPU with a gradient of its own."""

    def on_cpu(x: jax.Array, k: jax.Array) -> jax.Array:
        if x.dtype == jnp.bfloat16:
            return conv_by_products(x, k[None], 0, stride, padding)
        return conv_frames_by_taps(x, k, stride, padding)

    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=on_cpu,
        default=lambda x, k: _conv_2d(x, k, stride, padding),
    )


def causal_conv(
    x: Float[Array, "B T H W C"], kernel: Float[Array, "kt kh kw C O"], past: Past = None
) -> Float[Array, "B T H W O"]:
    """y[t] = sum over taps i of conv2d(x[t - (kt - 1) + i], kernel[i]), zero padded in space.

    `past` [B, kt - 1, H, W, C] are the frames before x[0]; None means zeros. The form follows the platform the
    computation is compiled for, not the one it is traced on.
    """
    lead = 0 if past is None else kernel.shape[0] - 1
    frames = x if past is None else jnp.concatenate([past, x], axis=1)

    def on_cpu(x: jax.Array, k: jax.Array) -> jax.Array:
        if x.dtype == jnp.bfloat16:
            return conv_by_products(x, k, lead, 1, _same(k.shape[1:3]))
        return conv_2d_sum(x, k, lead)

    return jax.lax.platform_dependent(frames, kernel, cpu=on_cpu, default=partial(conv_3d, lead=lead))


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
        pad = _same((3, 3)) if self.stride == 1 else ((0, 1), (0, 1))
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
