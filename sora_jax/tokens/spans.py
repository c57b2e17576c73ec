"""Latents of several spans, one after the other, <-> one row of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sora_jax.shapes import Extent, Stride
from sora_jax.tokens.patchify import patchify, unpatchify


def spans_to_tokens(
    latents: Float[np.ndarray, "B F h w C"], extents: Sequence[Extent], patch: Stride
) -> Float[np.ndarray, "B N P"]:
    """`extents` are the (F, h, w) of each span."""
    spans = np.split(latents, np.cumsum([extent.frames for extent in extents])[:-1], axis=1)
    return np.concatenate([patchify(span, patch) for span in spans], axis=1)


def tokens_to_spans(tokens: Any, extents: Sequence[Extent], patch: Stride) -> list[Any]:
    """The latents [B, F, h, w, C] of each span, of tokens [B, N, P] in numpy or JAX."""
    volume = patch.time * patch.height * patch.width
    ends = np.cumsum([extent.volume // volume for extent in extents])[:-1]
    spans = (jnp if isinstance(tokens, jax.Array) else np).split(tokens, ends, axis=1)
    return [unpatchify(span, extent, patch) for span, extent in zip(spans, extents, strict=True)]
