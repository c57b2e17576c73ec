"""A step's gradients from its rows in several passes: as much memory as a pass needs, and the loss of the whole batch.

A batch's loss is a sum of its passes' shares, and not the mean of their means: passes whose videos fill fewer tokens
weigh less. So a loss here divides by what the whole batch has, which is known before its first pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sora_jax.sharding import constrain

Loss = Callable[[Any, Any], tuple[jax.Array, Any]]
"""`loss(params, rows) -> (share, terms)`: these rows' share of the loss of the batch, and of whatever else is told."""


def accumulated(loss: Loss, params: Any, batch: Any, passes: int) -> tuple[tuple[jax.Array, Any], Any]:
    """((loss, terms), gradients) of the whole batch, a tree of arrays whose first axis is its rows, of which each pass
    takes an equal share; as `jax.value_and_grad(loss, has_aux=True)` in one.

    Rows are dealt out in turn, so that every device has its share of each pass where it has one of the batch.
    """
    gradients = jax.value_and_grad(loss, has_aux=True)
    if passes == 1:
        return gradients(params, batch)

    def deal(x: jax.Array) -> jax.Array:  # [B, ...] -> [passes, B / passes, ...]
        dealt = jnp.swapaxes(x.reshape(x.shape[0] // passes, passes, *x.shape[1:]), 0, 1)
        return constrain(dealt, (None, "batch", *(None,) * (x.ndim - 1)))

    def one(total: Any, rows: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradients(params, rows)), None

    shares = jax.tree.map(deal, batch)
    first = jax.tree.map(lambda x: x[0], shares)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradients, params, first))
    return jax.lax.scan(one, zeros, shares)[0]
