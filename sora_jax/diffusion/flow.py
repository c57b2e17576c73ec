"""The rectified-flow path, its target and its loss (Liu et al. 2022, arXiv:2209.03003; Lipman et al. 2022,
arXiv:2210.02747).

A level sigma in [0, 1] mixes data and noise on a straight line,

    x_sigma = (1 - sigma) x_0 + sigma eps,      velocity = d x / d sigma = eps - x_0,

so sigma = 0 is data, sigma = 1 is noise, and both can be read off a velocity:
x_0 = x_sigma - sigma v and eps = x_sigma + (1 - sigma) v.

Levels come as a table with one column per group, `[B, G]`, and an index `level_ids [B, N]` (DESIGN: noise levels).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

if TYPE_CHECKING:
    AnyLevels = Any  # a schedule is made in numpy, drawn levels are JAX arrays
else:
    AnyLevels = Float[Array, "*any"] | Float[np.ndarray, "*any"]


def spread(table: Float[Array, "B G *rest"], level_ids: Int[Array, "B N"]) -> Float[Array, "B N *rest"]:
    """The row of a per-group table that each token has.

    A product with one-hot rows rather than a gather: its transpose is a product too, where a gather's is a scatter-add,
    which is slow on every backend. It is exact in float32 (one term is 1 * x, the others 0) at `highest` precision.
    """
    groups = table.shape[1]
    if groups == 1:
        return jnp.broadcast_to(table, (table.shape[0], level_ids.shape[1], *table.shape[2:]))
    chosen = jax.nn.one_hot(level_ids, groups, dtype=table.dtype)
    return jnp.einsum("bng,bg...->bn...", chosen, table, precision=jax.lax.Precision.HIGHEST)


def mix(
    clean: Float[Array, "B N P"], noise: Float[Array, "B N P"], sigma: Float[Array, "B N"]
) -> Float[Array, "B N P"]:
    """x_sigma, exact at both ends: x_0 at sigma = 0 and eps at sigma = 1."""
    sigma = sigma[..., None]
    return (1.0 - sigma) * clean + sigma * noise


def velocity_target(clean: Float[Array, "B N P"], noise: Float[Array, "B N P"]) -> Float[Array, "B N P"]:
    return noise - clean


def shift_level(sigma: AnyLevels, shift: float | Float[Array, "*any"]) -> AnyLevels:
    """sigma' = s sigma / (1 + (s - 1) sigma): more tokens hide less under the same noise, so s > 1 for larger videos
    (Esser et al. 2024, arXiv:2403.03206, section 5.3.2)."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def flow_loss(
    predicted: Float[Array, "B N P"],
    target: Float[Array, "B N P"],
    counted: Bool[Array, "B N"],
    total: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Mean squared error per counted token; given tokens and padding are not counted. 0 when nothing is. Of rows that
    are a part of a batch with `total` counted tokens: their share of its mean."""
    return mean_of_counted(token_errors(predicted, target), counted, total)


def token_errors(predicted: Float[Array, "B N P"], target: Float[Array, "B N P"]) -> Float[Array, "B N"]:
    """The squared error of each token, the mean over its values."""
    return jnp.mean(jnp.square(predicted.astype(jnp.float32) - target), axis=-1)


def mean_of_counted(
    error: Float[Array, "B N"], counted: Bool[Array, "B N"], total: Float[Array, ""] | None = None
) -> Float[Array, ""]:
    weight = counted.astype(jnp.float32)
    return jnp.sum(error * weight) / jnp.maximum(jnp.sum(weight) if total is None else total, 1.0)


def loss_by_level(
    error: Float[Array, "B N"], counted: Bool[Array, "B N"], sigma: Float[Array, "B N"], edges: Sequence[float]
) -> tuple[Float[Array, " bands"], Float[Array, " bands"]]:
    """The mean error of the counted tokens whose level lies in each band, NaN where there is none, and how many there
    are. Band k is [edges[k], edges[k + 1]); what lies outside belongs to the nearest one."""
    band = jnp.sum(sigma[..., None] >= jnp.asarray(edges[1:-1], jnp.float32), axis=-1)
    of_band = (band[..., None] == jnp.arange(len(edges) - 1)) & counted[..., None]
    tokens = jnp.sum(of_band, axis=(0, 1)).astype(jnp.float32)
    total = jnp.sum(jnp.where(of_band, error[..., None], 0.0), axis=(0, 1))
    return jnp.where(tokens > 0, total / tokens, jnp.nan), tokens
