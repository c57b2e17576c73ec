"""Patterns of floors: checks, dots and wooden planks, seen from the front and a little above.

The projection is oblique: lines that lead away from the viewer are parallel and lean to the right, and a camera that
moves shifts all of the floor by as much as what stands on it.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

_LEAN = 0.8  # pixels to the right for one up
_CHECK = 9.0  # units, width of a check; half as high
_PLANK = 4.0  # units, height of a plank
_JOINT = 18.0  # units from joint to joint in a row of planks
_DOT = 7.0  # units from dot to dot; half as far upwards
_DEPTH = 0.14  # of the colour, from dark to light


def _square_wave(phase: np.ndarray, sharp: np.ndarray | float) -> np.ndarray:
    """-1 or 1 by turns, a turn of 2 pi, with a soft edge."""
    return np.clip(sharp * np.cos(phase), -1, 1)


def texture(
    name: str, height: int, width: int, contact: float, moved: np.ndarray, phase: float
) -> Float32[np.ndarray, "t {height} {width}"]:
    """Factors of the floor's colour, round 1, in frames whose camera is at `moved` [t] (pixels)."""
    unit = min(height, width) / 64
    y = ((np.arange(height, dtype=np.float32) + 0.5) - np.float32(contact)) / np.float32(unit)
    x = (np.arange(width, dtype=np.float32) + 0.5 + np.float32(phase)) / np.float32(unit)
    across = x + (moved.astype(np.float32) / np.float32(unit))[:, None, None] + np.float32(_LEAN) * y[:, None]
    if name == "checkered":
        pattern = _square_wave(across * np.float32(np.pi / _CHECK), 4.0)
        pattern = pattern * _square_wave(y * np.float32(np.pi / (_CHECK / 2)), 2.5)[:, None]
    elif name == "dotted":
        row = np.floor(2 * y / _DOT)
        dx = (across / _DOT + 0.5 * (row % 2)[:, None]) % 1 - 0.5
        dy = (2 * y / _DOT - row - 0.5)[:, None]
        pattern = 0.35 - 2.4 * np.clip(0.5 + (0.3 - np.hypot(dx, dy)) * 5, 0, 1)
        pattern = np.clip(pattern, -1.4, 0.35)
    else:  # wooden: every row of planks has its joints and its tone
        row = np.floor(y / _PLANK)
        inside = y / _PLANK - row
        seam = np.clip(1.8 * np.abs(inside - 0.5) * _PLANK - (0.9 * _PLANK - 1.1), 0, 1)[:, None]
        along = (across + (row * 9.7 % _JOINT)[:, None]) / _JOINT
        board = np.floor(along)
        joint = np.clip(1.2 - np.abs((along - board - 0.5) * _JOINT), 0, 1)
        tone = np.sin((board * 2.4 + row[:, None] * 1.7) * np.float32(2.1))
        pattern = 0.35 * tone + 0.3 - 1.5 * np.maximum(seam, joint)
    return (1 + (_DEPTH / 2) * pattern).astype(np.float32)
