"""Classifier-free guidance in one batched call (Ho & Salimans 2022, arXiv:2207.12598).

    v = v_empty + scale * (v_prompt - v_empty)

Rows with the prompt and rows with the empty (or negative) prompt go through the model as one batch of 2B rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sora_jax.pytrees import pytree
from sora_jax.shapes import Condition

Velocity = Callable[[Any, jax.Array, jax.Array, Any], jax.Array]
"""`velocity(params, tokens [B,N,P], levels [B,G], condition) -> [B,N,P]`, float32."""


@pytree
@dataclass(frozen=True)
class GuidedCondition:
    """A condition with its counterpart: 2B rows, the prompts' first, then the negative prompts' in the same order."""

    both: Condition
    scale: Float[Array, " B"]

    @property
    def given(self) -> Bool[Array, "B N"]:
        return self.both.given[: self.scale.shape[0]]

    @property
    def level_ids(self) -> Int[Array, "B N"]:
        return self.both.level_ids[: self.scale.shape[0]]


def guided_condition(prompt: Condition, negative: Condition, scale: Float[Array, " B"]) -> GuidedCondition:
    """Join the two conditions, which differ in their text alone, into one of 2B rows."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), prompt, negative)
    return GuidedCondition(both, scale)


def classifier_free_guidance(velocity: Velocity) -> Velocity:
    """A velocity for `GuidedCondition`s out of one for `Condition`s."""

    def guided(params: Any, tokens: jax.Array, levels: jax.Array, condition: GuidedCondition) -> jax.Array:
        doubled = velocity(params, jnp.concatenate([tokens, tokens]), jnp.concatenate([levels, levels]), condition.both)
        with_prompt, without = jnp.split(doubled, 2)
        return without + condition.scale[:, None, None] * (with_prompt - without)

    return guided
