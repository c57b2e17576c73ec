"""A deeper transformer that computes what a shallower one does, to train on from there (Net2Net, Chen et al. 2016,
arXiv:1511.05641).

Every block is followed by copies of itself that pass their input on: what each part of a block adds goes through an
output projection, and those of the copies are zero. They learn at once, and the rest of a copy is already of use.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.errors import UserError

OUTPUTS = (("self_attn", "out"), ("cross_attn", "out"), ("ffn", "out_proj"))


def deepen(transformer: nnx.State, n_layers: int) -> nnx.State:
    """The parameters of a transformer with `n_layers` blocks, a multiple of those it has; raises `UserError`."""
    there = jax.tree.leaves(transformer["blocks"])[0].shape[0]
    if n_layers % there:
        raise UserError(
            f"train.deepen makes {there} layers {2 * there} or {3 * there}, not {n_layers}: "
            f"set transformer.n_layers to a multiple of {there}"
        )
    copies = n_layers // there
    passing = jnp.arange(n_layers) % copies != 0

    def grow(path: tuple[Any, ...], leaf: nnx.Variable) -> nnx.Variable:
        if path[0] != "blocks":
            return leaf
        value = jnp.repeat(leaf.get_value(), copies, axis=0)
        if path[1:3] in OUTPUTS:
            value = jnp.where(passing.reshape(-1, *[1] * (value.ndim - 1)), 0.0, value)
        return leaf.replace(value)

    return nnx.from_flat_state([(path, grow(path, leaf)) for path, leaf in nnx.to_flat_state(transformer)])
