"""One video alone in a row, at one noise level: what a transformer takes, drawn at random."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.shapes import Condition, Extent
from sora_jax.tokens.patchify import token_positions


def one_video(
    rng: np.random.Generator, extent: Extent, *, channels: int, text: tuple[int, int]
) -> tuple[jax.Array, Condition]:
    """Tokens `[1, N, channels]` of a video of `extent` tokens, and its condition; `text` is (length, width)."""
    ones = jnp.ones((1, extent.volume), jnp.int32)
    condition = Condition(
        positions=jnp.asarray(token_positions(extent))[None],
        segment_ids=ones,
        prompt_ids=ones,
        level_ids=jnp.zeros_like(ones),
        given=jnp.zeros(ones.shape, bool),
        text=jnp.asarray(rng.normal(size=(1, *text)), jnp.float32),
        text_ids=jnp.ones((1, text[0]), jnp.int32),
    )
    return jnp.asarray(rng.normal(size=(1, extent.volume, channels)), jnp.float32), condition
