"""Latents <-> tokens: a token is one patch of spacetime (Sora's "spacetime patch"; Peebles & Xie 2023,
arXiv:2212.09748).

Pure reshapes by einops, so they take numpy and JAX arrays alike.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from einops import rearrange
from jaxtyping import Int

from sora_jax.errors import UserError
from sora_jax.shapes import Extent, Stride

AnyArray = TypeVar("AnyArray")


def patchify(latents: AnyArray, patch: Stride) -> AnyArray:
    """`[..., F, h, w, C]` -> `[..., N, pt * ph * pw * C]`; tokens run frame by frame, row by row.

    Raises `UserError` when the patch does not divide the latents.
    """
    extent = Extent(*latents.shape[-4:-1])  # type: ignore[attr-defined]
    if any(size % step for size, step in zip(extent, patch, strict=True)):
        raise UserError(f"latents of (F, h, w) = {tuple(extent)} cannot be cut into patches of {tuple(patch)}")
    return rearrange(
        latents,
        "... (F pt) (h ph) (w pw) C -> ... (F h w) (pt ph pw C)",
        pt=patch.time,
        ph=patch.height,
        pw=patch.width,
    )


def unpatchify(tokens: AnyArray, latents: Extent, patch: Stride) -> AnyArray:
    """The inverse of `patchify`, for latents of (F, h, w) = `latents`."""
    return rearrange(
        tokens,
        "... (F h w) (pt ph pw C) -> ... (F pt) (h ph) (w pw) C",
        F=latents.frames // patch.time,
        h=latents.height // patch.height,
        w=latents.width // patch.width,
        pt=patch.time,
        ph=patch.height,
        pw=patch.width,
    )


def token_positions(tokens: Extent, start: int = 0) -> Int[np.ndarray, "N 3"]:
    """(time, height, width) of each token of a grid, in the order of `patchify`; time counts from `start`."""
    grid = np.indices(tuple(tokens), dtype=np.int32).reshape(3, -1).T
    return grid + np.array([start, 0, 0], np.int32)
