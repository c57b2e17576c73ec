"""Rotary position embedding over (time, height, width) (Su et al. 2021, arXiv:2104.09864; the 3-axis split of Wan).

A head of width d turns d/2 pairs of neighbouring channels. Height and width own 2 * (d // 6) channels each and time the
rest, so d = 128 splits 44 / 42 / 42. Pair i of an axis with c channels turns by position * theta^(-2i / c).
Cosines and sines are tabulated in float64 on the host, as the reference computes them, and kept in float32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Rotation(NamedTuple):
    """Per token, the cosine and sine of the angle that each pair of head channels turns by."""

    cos: Float[Array, "B N half"]
    sin: Float[Array, "B N half"]


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that (time, height, width) turn."""
    space = 2 * (head_dim // 6)
    return head_dim - 2 * space, space, space


@functools.lru_cache
def _table(width: int, positions: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    frequencies = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    angles = np.outer(np.arange(positions, dtype=np.float64), frequencies)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotation(
    positions: Int[Array, "B N 3"], head_dim: int, *, max_positions: int = 1024, theta: float = 10000.0
) -> Rotation:
    """Angles of every token, from its coordinates 0 <= position < `max_positions`."""
    cosines, sines = [], []
    for axis, width in enumerate(axis_widths(head_dim)):
        cos, sin = _table(width, max_positions, theta)
        cosines.append(jnp.asarray(cos)[positions[..., axis]])
        sines.append(jnp.asarray(sin)[positions[..., axis]])
    return Rotation(jnp.concatenate(cosines, axis=-1), jnp.concatenate(sines, axis=-1))


def rotate(x: Float[Array, "B N K d"], by: Rotation) -> Float[Array, "B N K d"]:
    """Turn neighbouring channel pairs (x[2i], x[2i+1]) of each head; computed in float32."""
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    cos, sin = by.cos[:, :, None, :], by.sin[:, :, None, :]  # one angle for all heads
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)  # [B, N, K, d/2, 2]
    return turned.reshape(x.shape).astype(x.dtype)
