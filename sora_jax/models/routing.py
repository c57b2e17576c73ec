"""Token routing in training (TREAD; Krause et al. 2025, arXiv:2501.04765): some tokens pass by the middle blocks.

A share of a row's tokens, drawn anew at each step, waits after the first blocks and comes back to its places before the
last. A step costs less, and what the first blocks make has a short way to the loss. Sampling takes all tokens through
all blocks. From the paper this differs in that rows are packed: padding is the first to pass by.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from sora_jax.shapes import Condition


def draw_through(key: Key[Array, ""], segment_ids: Int[Array, "B N"], share: float) -> Int[Array, "B M"]:
    """Which tokens of each row go through the middle: M = N - round(share N) of them at random, in their order; 0 <=
    share < 1."""
    tokens = segment_ids.shape[1]
    luck = jax.random.uniform(key, segment_ids.shape) + (segment_ids == 0)
    return jnp.sort(jnp.argsort(luck, axis=1)[:, : tokens - round(share * tokens)], axis=1)


def take(x: Shaped[Array, "B N *rest"], through: Int[Array, "B M"]) -> Shaped[Array, "B M *rest"]:
    return jnp.take_along_axis(x, through.reshape(*through.shape, *(1,) * (x.ndim - 2)), axis=1)


def put_back(
    x: Float[Array, "B N D"], part: Float[Array, "B M D"], through: Int[Array, "B M"]
) -> Float[Array, "B N D"]:
    """`x` with the tokens `through` as they are in `part`."""
    rows = jnp.arange(x.shape[0])[:, None]
    return x.at[rows, through].set(part, unique_indices=True)


def condition_of_part(condition: Condition, through: Int[Array, "B M"]) -> Condition:
    """What is known about these tokens alone; the text is that of the row."""
    per_token = ("positions", "segment_ids", "prompt_ids", "level_ids", "given")
    return condition.replace(**{name: take(getattr(condition, name), through) for name in per_token})
