"""A frozen encoder of clips: a fixed bank of filters, pooled. No weights, numpy only, the same on every machine.

It looks for what a video model gets wrong, one family of numbers for each:

    color    how much of the picture has which hue (24 bins, by saturation) and which lightness (8 bins)
    layout   the mean colour of the upper, middle and lower third
    form     at three scales: edges, their orientation (8 bins), corners, and detail (difference of Gaussians)
    motion   at two scales, in each third of the clip: movement in 8 directions, from the products of derivatives in
             space and time (normal flow; the gradients of Lucas and Kanade 1981), and the change from frame to frame
    pace     how evenly things change: change of change, and the stillest and the wildest step

Blur takes detail and edges away, noise adds them; frozen frames have no change, shuffled ones too much of it, reversed
ones move in other directions at other times; wrong colours fall into other bins. Pooled latents of a world model's own
encoder (means and spreads over places and frames, and their steps) were tried in their place, on 100 clips: blur, noise
of 10 levels, shuffled frames and a hue turned by 20 degrees all stayed within the floor. They see what that encoder was
made to keep, and go when its model goes.

All numbers are square roots of means over the clip, so that they grow evenly. Figures are comparable only for clips of
one size and with the same `NAME` and `fingerprint()`.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
from jaxtyping import Float, UInt8

from sora_jax.errors import UserError

NAME = "filters-1"  # whoever changes what comes out gives it another
HUES, LIGHTNESSES, ORIENTATIONS, DIRECTIONS, SCALES, PARTS = 24, 8, 8, 8, 3, 3
_TAPS = np.array([1, 4, 6, 4, 1]) / 16


def encode(frames: UInt8[np.ndarray, "T H W 3"]) -> Float[np.ndarray, " D"]:
    """The numbers of one clip, float64. Raises `UserError` below 4 frames or 16 pixels: there is too little to see."""
    if len(frames) < 4 or min(frames.shape[1:3]) < 16:
        size = f"{len(frames)} frames of {frames.shape[2]}x{frames.shape[1]}"
        raise UserError(f"clips of at least 4 frames and 16 pixels can be compared, not {size}")
    rgb = frames.astype(np.float64) / 255
    levels = [np.stack([rgb.mean(-1), rgb[..., 0] - rgb[..., 1], rgb[..., 2] - (rgb[..., 0] + rgb[..., 1]) / 2], -1)]
    for _ in range(SCALES):
        levels.append(_blur(levels[-1])[:, ::2, ::2])
    features = [_color(rgb), _layout(levels[0])]
    features += [_form(level) for level in levels[:SCALES]]
    features += [_motion(level) for level in levels[1:SCALES]]
    return np.concatenate(features)


def encode_all(clips: UInt8[np.ndarray, "n T H W 3"]) -> Float[np.ndarray, "n D"]:
    """A row for each clip."""
    return np.stack([encode(clip) for clip in clips])


@functools.cache
def fingerprint() -> str:
    """Eight hexadecimal digits that change with what the encoder makes of a fixed clip, and so with the encoder."""
    t, y, x, c = np.ogrid[:9, :32, :32, :3]
    clip = (127.5 + 127 * np.sin(0.3 * x + 0.2 * y * (c + 1) - 0.7 * t + np.maximum(x - 2 * t, 0))).astype(np.uint8)
    digits = ",".join(f"{value:.5e}" for value in encode(clip) + 1.0)
    return hashlib.sha256(digits.encode()).hexdigest()[:8]


# ---- the families ----


def _color(rgb: Float[np.ndarray, "T H W 3"]) -> np.ndarray:
    red, green, blue = np.moveaxis(rgb, -1, 0)
    angle = np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * np.pi)
    hue = _histogram(angle, rgb.max(-1) - rgb.min(-1), HUES)
    light = rgb.mean(-1) * (LIGHTNESSES - 1) / LIGHTNESSES  # of a turn, so that white does not meet black
    return np.sqrt(np.concatenate([hue.mean(0), _histogram(light, np.ones_like(light), LIGHTNESSES).mean(0)]))


def _layout(level: Float[np.ndarray, "T H W 3"]) -> np.ndarray:
    return np.concatenate([part.mean((0, 1, 2)) for part in np.array_split(level, PARTS, axis=1)])


def _form(level: Float[np.ndarray, "T H W 3"]) -> np.ndarray:
    down, across = (np.gradient(level, axis=axis) for axis in (1, 2))
    xx, yy, xy = ((a * b).sum(-1) for a, b in ((across, across), (down, down), (across, down)))
    edge = np.sqrt(xx + yy)
    turn = np.arctan2(2 * xy, xx - yy) / (2 * np.pi)  # of the doubled angle: opposite gradients are one orientation
    xx, yy, xy = (_blur(product[..., None])[..., 0] for product in (xx, yy, xy))
    corner = (xx * yy - xy**2) / (xx + yy + 1e-6)  # large where edges of two orientations meet
    detail = np.abs(level - _blur(level)).mean((0, 1, 2))
    pooled = [*_histogram(turn, edge, ORIENTATIONS).mean(0), edge.mean(), np.maximum(corner, 0).mean(), *detail]
    return np.sqrt(np.array(pooled))


def _motion(level: Float[np.ndarray, "T H W 3"]) -> np.ndarray:
    middle = (level[1:] + level[:-1]) / 2
    change = np.diff(level, axis=0)
    across, down = (_blur(-change * np.gradient(middle, axis=axis)).sum(-1) for axis in (2, 1))
    moved = _histogram(np.arctan2(down, across) / (2 * np.pi), np.sqrt(np.hypot(across, down)), DIRECTIONS)
    step = np.abs(change).mean((1, 2, 3))
    parts = [
        np.append(where.mean(0), much.mean())
        for where, much in zip(np.array_split(moved, PARTS), np.array_split(step, PARTS), strict=True)
    ]
    pace = [np.abs(np.diff(change, axis=0)).mean(), step.min(), step.max()]
    return np.sqrt(np.concatenate([*parts, pace]))


# ---- helpers ----


def _histogram(
    turns: Float[np.ndarray, "T H W"], weight: Float[np.ndarray, "T H W"], count: int
) -> Float[np.ndarray, "T _"]:
    """How much weight lies, per pixel of each frame, at each of `count` angles: each pixel's is shared by the two
    nearest to its own, so that nothing jumps."""
    place = turns * count
    low = np.floor(place)
    share = place - low
    frame = np.arange(len(turns))[:, None, None] * count
    total = np.zeros(len(turns) * count)
    for step, part in ((0, 1 - share), (1, share)):
        index = frame + (low.astype(np.int64) + step) % count
        total += np.bincount(index.ravel(), (weight * part).ravel(), len(total))
    return total.reshape(len(turns), count) / turns[0].size


def _blur(level: Float[np.ndarray, "T H W C"]) -> Float[np.ndarray, "T H W C"]:
    """A binomial window of 5 x 5 over height and width, edges repeated."""
    for axis in (1, 2):
        size = level.shape[axis]
        padded = np.concatenate([level.take([0, 0], axis), level, level.take([-1, -1], axis)], axis)
        level = sum(tap * padded.take(np.arange(k, k + size), axis) for k, tap in enumerate(_TAPS))
    return level
