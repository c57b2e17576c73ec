"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): the momentum of a matrix, made nearly orthogonal.

The quintic Newton-Schulz iteration X <- a X + (b G + c G^2) X, G = X X^T, multiplies X from the left by polynomials of
the first G alone. So they are iterated on the Gram matrix, which is as small as the shorter side, and X is multiplied
once, at the end: the same result, at 2 products with the long side instead of 2 in every iteration. The kernel of a
3 x 3 x 3 convolution of 128 channels, 3456 x 128, takes a quarter of the operations, a square matrix a quarter more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

# Of the post: they lift small singular values fastest, and leave them all between about .7 and 1.2.
LINEAR, CUBIC, QUINTIC = 3.4445, -4.7750, 2.0315

StackedAxes = int | None  # of a kernel [*stacked, *inputs, output]: how many are stacked; None: not Muon's


class MuonState(NamedTuple):
    """Of `scale_by_muon`."""

    step: jax.Array  # how many were taken
    momentum: Any  # a tree like the parameters


def orthogonalized(x: Float[Array, "*stack m n"], iterations: int = 5, eps: float = 1e-8) -> Float[Array, "*stack m n"]:
    """Each matrix of `x` with its singular values brought near 1, by `iterations` of Newton-Schulz; float32 in and out.

    Products are float32: the Gram matrix squares the singular values, and bfloat16 would lose the small ones.
    """
    if x.shape[-2] > x.shape[-1]:
        return jnp.swapaxes(orthogonalized(jnp.swapaxes(x, -1, -2), iterations, eps), -1, -2)
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + eps)
    multiply = _float32_product
    gram = multiply(x, jnp.swapaxes(x, -1, -2))
    unit = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    total = unit
    for i in range(iterations):
        factor = LINEAR * unit + CUBIC * gram + QUINTIC * multiply(gram, gram)
        total = factor if i == 0 else multiply(factor, total)
        if i < iterations - 1:  # polynomials of one matrix commute and are symmetric
            gram = multiply(factor, multiply(gram, factor))
    return multiply(total, x)


def _float32_product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def scale_by_muon(
    stacked_axes: Callable[[Any], Any], momentum: float, iterations: int, eps: float, rms_match: bool
) -> optax.GradientTransformation:
    """Gradients to directions: Nesterov momentum with its bias corrected, then `orthogonalized`, then a scale.

    `stacked_axes(tree)` is a prefix of `tree` with a number of axes for each kernel. With `rms_match` the scale is 0.2
    sqrt(max(in, out)) (Liu et al. 2025, arXiv:2502.16982), else sqrt(max(1, out / in)).
    """

    def direction(update: jax.Array, stacked: int) -> jax.Array:
        columns = update.shape[-1]
        matrices = update.reshape(*update.shape[:stacked], -1, columns)
        rows = matrices.shape[-2]
        scale = 0.2 * math.sqrt(max(rows, columns)) if rms_match else math.sqrt(max(1.0, columns / rows))
        return (scale * orthogonalized(matrices, iterations, eps)).reshape(update.shape)

    def init(params: Any) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        del params
        step = state.step + 1
        mean = optax.tree.update_moment(updates, state.momentum, momentum, 1)
        ahead = jax.tree.map(
            lambda m, g: momentum * m + (1.0 - momentum) * g,
            optax.tree.bias_correction(mean, momentum, step + 1),
            optax.tree.bias_correction(updates, momentum, step),
        )
        turned = jax.tree.map(
            lambda stacked, tree: jax.tree.map(lambda x: direction(x, stacked), tree),
            stacked_axes(updates),
            ahead,
            is_leaf=lambda leaf: leaf is None,
        )
        return turned, MuonState(step, mean)

    return optax.GradientTransformation(init, update)
