"""Light: what it multiplies the colours of a frame by, and which side of an object it falls on.

A light changes brightness by up to a third and hue by a few degrees only, so that colours keep their names.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

_TINTS: dict[str, tuple[float, float, float]] = {
    "dim": (0.68, 0.68, 0.71),
    "warm": (1.04, 0.99, 0.91),
    "cool": (0.95, 0.99, 1.04),
}
_NEAR, _FAR = 1.06, 0.74  # of a light from one side, at that side and at the other
SHADING = 0.16  # how much brighter the rim of an object is that faces such a light


def gain(light: str, width: int) -> Float32[np.ndarray, "#w 3"]:
    """Factors of red, green and blue in every column [width, 3]; or [1, 3] where all columns are alike."""
    if light in ("left", "right"):
        along = (np.arange(width, dtype=np.float32) + 0.5) / width
        away = along if light == "left" else 1 - along
        return np.repeat((_NEAR + (_FAR - _NEAR) * away)[:, None], 3, axis=1)
    return np.array([_TINTS[light]] if light else [(1.0, 1.0, 1.0)], np.float32)


def side(light: str) -> float:
    """-1 if it comes from the left, 1 from the right, else 0."""
    return {"left": -1.0, "right": 1.0}.get(light, 0.0)


def shine(frames: np.ndarray, light: str) -> None:
    """Lights frames [T, H, W, 3] uint8, in place."""
    if light:
        lit = frames.astype(np.float32)
        lit *= gain(light, frames.shape[2])
        lit += 0.5
        np.minimum(lit, 255.0, out=lit)
        frames[:] = lit.astype(np.uint8)
