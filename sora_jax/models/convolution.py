"""The causal convolution in the form that each platform runs fastest, with gradients written out for the CPU.

`causal_conv` and `conv_frames` choose by the platform that a program is compiled for: a native 3-D convolution, or on
the CPU a sum over time taps of 2-D ones, or there in bfloat16 matrix products.
"""

from __future__ import annotations

import functools
import operator
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from sora_jax.models import layers

Padding = tuple[tuple[int, int], tuple[int, int]]  # above and below, left and right


def same_padding(size: tuple[int, ...]) -> Padding:
    return (size[0] // 2, size[0] // 2), (size[1] // 2, size[1] // 2)


def _shift(x: jax.Array, before: int, after: int) -> jax.Array:
    """Zero frames put before and after x; a negative number takes frames away."""
    still = ((0, 0, 0),) * (x.ndim - 2)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (before, after, 0), *still))


def _beside_in_time(dy: jax.Array, taps: int, lead: int) -> jax.Array:
    """For each tap of a kernel, dy at the time of the input frame that it reads; side by side in the
    channels, so that one product serves all taps."""
    return jnp.concatenate([_shift(dy, lead - back, back) for back in reversed(range(taps))], axis=-1)


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
        y = _conv_2d(x[:, start:stop], kernel[kernel.shape[0] - 1 - back], 1, same_padding(kernel.shape[1:3]))
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
    size = kernel.shape[1:3]
    d_kernel = _kernel_gradient(x, _beside_in_time(dy, taps, lead), size, 1, same_padding(size))
    return dx, rearrange(d_kernel, "kh kw c (kt o) -> kt kh kw c o", kt=taps).astype(kernel.dtype)


conv_2d_sum.defvjp(_conv_2d_sum_forward, _conv_2d_sum_backward)


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
        return layers.contract(read, rows, (0,), (0,))

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
    return _shifted_sum(_tap_products(x, kernel, stride, padding), lead).astype(x.dtype)


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


def _shifted_sum(products: Float[Array, "B T h w kt O"], lead: int) -> Float[Array, "B _ h w O"]:
    taps = products.shape[4]
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
        (dx,) = jax.linear_transpose(lambda x: _shifted_sum(_tap_products(x, kernel, stride, padding), lead), x)(
            dy.astype(jnp.promote_types(dy.dtype, jnp.float32))
        )
    late = _beside_in_time(dy, taps, lead)
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
    x: Float[Array, "B T H W C"], kernel: Float[Array, "kt kh kw C O"], past: Float[Array, "B _ H W C"] | None = None
) -> Float[Array, "B T H W O"]:
    """y[t] = sum over taps i of conv2d(x[t - (kt - 1) + i], kernel[i]), zero padded in space.

    `past` [B, kt - 1, H, W, C] are the frames before x[0]; None means zeros. The form follows the platform the
    computation is compiled for, not the one it is traced on.
    """
    lead = 0 if past is None else kernel.shape[0] - 1
    frames = x if past is None else jnp.concatenate([past, x], axis=1)

    def on_cpu(x: jax.Array, k: jax.Array) -> jax.Array:
        if x.dtype == jnp.bfloat16:
            return conv_by_products(x, k, lead, 1, same_padding(k.shape[1:3]))
        return conv_2d_sum(x, k, lead)

    return jax.lax.platform_dependent(frames, kernel, cpu=on_cpu, default=partial(conv_3d, lead=lead))
