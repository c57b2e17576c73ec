"""The layers that the transformer, the autoencoder and the text encoder share.

Parameters are float32 masters; a layer computes in the dtype of what it is given and casts its parameters to it.
Norms and softmax compute in float32 whatever the dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from sora_jax.sharding import mesh_size

# Stacks of at most so many layers are unrolled: a scan copies every layer's parameters out of the stack and every
# gradient into it, and keeps what the backward pass needs in one more: 2.5 s in place of 4.2 for a step of the world
# model on a CPU. Deep models are scanned, to compile fast.
UNROLLED = 12

PRODUCT = "product"  # what `matmul` gives, by which policies of `jax.checkpoint` know it

Initializer = Callable[..., jax.Array]

zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones
lecun_normal = jax.nn.initializers.lecun_normal()


def normal(stddev: float) -> Initializer:
    return jax.nn.initializers.normal(stddev)


def param(rngs: nnx.Rngs, init: Initializer, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """A float32 parameter that knows the logical names of its axes (see `sora_jax.sharding.RULES`)."""
    if len(shape) != len(axes):
        raise ValueError(f"{len(shape)}-dimensional parameter with {len(axes)} axis names: {shape} {axes}")
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


@jax.custom_vjp
def matmul(x: Float[Array, "*batch n_in"], kernel: Float[Array, "n_in n_out"]) -> Float[Array, "*batch n_out"]:
    """x @ kernel, with its gradient written out.

    JAX derives d kernel as a transposed product, (dy^T x)^T, for which XLA's CPU compiler copies dy and leaves its fast
    kernels: a factor of 2.7 in the gradient of one product of 5120 x 192 x 768. The same product the other way round,
    x^T dy, is fast everywhere, in float32 after flattening the rows. In bfloat16 that would hand a transposed x to a
    product that knows no bfloat16 tiles, at a quarter of the speed; there the rows keep their axes.

    Sums are float32 whatever the dtype, which is more exact and on a CPU with bfloat16 tiles (AMX) six times as fast:
    XLA reaches them only through products that come out as float32.
    """
    return _product(x, kernel)


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return contract(x, kernel, (x.ndim - 1,), (0,)).astype(x.dtype)


def contract(x: jax.Array, y: jax.Array, x_axes: Sequence[int], y_axes: Sequence[int]) -> jax.Array:
    """The product of x and y summed over pairs of their axes; float32 at least."""
    return jax.lax.dot_general(
        x, y, ((x_axes, y_axes), ((), ())), preferred_element_type=jnp.promote_types(x.dtype, jnp.float32)
    )


def _matmul_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Named here, as policies of `jax.checkpoint` do not look into a function with a gradient of its own.
    return checkpoint_name(_product(x, kernel), PRODUCT), (x, kernel)


def _matmul_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    dx = matmul(dy, kernel.T)
    if x.dtype != jnp.bfloat16 and mesh_size("sequence") == 1:  # flattening tokens that are cut would gather them
        x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    rows = tuple(range(x.ndim - 1))
    return dx, contract(x, dy, rows, rows).astype(kernel.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


class LowRank(NamedTuple):
    """Adapters beside the kernels of a model (LoRA; Hu et al. 2021, arXiv:2106.09685): rank r, and alpha / r."""

    rank: int
    scale: float


class Linear(nnx.Module):
    """y = x W + b over the last axis, W `[in, out]`; with `low_rank`, x (W + scale A B) + b, A `[in, r]` random and B
    `[r, out]` zero at first."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        axes: tuple[str | None, str | None],
        *,
        rngs: nnx.Rngs,
        bias: bool = True,
        init: Initializer = lecun_normal,
        low_rank: LowRank | None = None,
    ):
        self.kernel = param(rngs, init, (n_in, n_out), axes)
        self.bias = param(rngs, zeros, (n_out,), axes[1:]) if bias else None
        self.scale = 0.0
        if low_rank is not None:
            self.adapter_a = param(rngs, lecun_normal, (n_in, low_rank.rank), (axes[0], None))
            self.adapter_b = param(rngs, zeros, (low_rank.rank, n_out), (None, axes[1]))
            self.scale = low_rank.scale

    def __call__(self, x: Float[Array, "*batch n_in"]) -> Float[Array, "*batch n_out"]:
        y = matmul(x, self.kernel[...].astype(x.dtype))
        if self.scale:
            narrow = matmul(x, self.adapter_a[...].astype(x.dtype))
            y = y + self.scale * matmul(narrow, self.adapter_b[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, axis: str | None = None, *, eps: float = 1e-6, rngs: nnx.Rngs):
        self.scale = param(rngs, ones, (width,), (axis,))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...]).astype(x.dtype)


def layer_norm(x: Float[Array, "*batch C"], eps: float = 1e-6) -> Float[Array, "*batch C"]:
    """(x - mean) / sqrt(var + eps) over the last axis, without parameters; always float32 out, for modulation."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
    """`layer_norm` with scale and bias, in the dtype of its input."""

    def __init__(self, width: int, axis: str | None = None, *, eps: float = 1e-6, rngs: nnx.Rngs):
        self.scale = param(rngs, ones, (width,), (axis,))
        self.bias = param(rngs, zeros, (width,), (axis,))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        return (layer_norm(x, self.eps) * self.scale[...] + self.bias[...]).astype(x.dtype)


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], n_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`n_layers` modules of one shape as a single module whose parameters carry a leading layer axis, for
    `lax.scan`."""

    @nnx.vmap(in_axes=0, out_axes=0, graph=False)
    def build(layer_rngs: nnx.Rngs) -> nnx.Module:
        return make(layer_rngs)

    return build(rngs.split(n_layers))
