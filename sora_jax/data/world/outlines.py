"""Signed distances to the outlines of the world's shapes, and how much of one another hides."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sora_jax.data.world.scene import OUTLINES, SQUARE_HALF, STAR_REACH, TRIANGLE_REACH

_GRID = 32  # points a side over an object's box, by which is measured how much of it is covered


def _ball(dx: np.ndarray, dy: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.sqrt(dx * dx + dy * dy) - r


def _square(dx: np.ndarray, dy: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(dx), np.abs(dy)) - SQUARE_HALF * r


def _triangle(dx: np.ndarray, dy: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Equilateral, tip up, centred on its centroid: the largest distance to its three sides."""
    side = 0.8660254 * np.abs(dx) - 0.5 * dy
    return np.maximum(side, dy) - (TRIANGLE_REACH / 2) * r


def _star(dx: np.ndarray, dy: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Five tips, one up; inner corners at half the outer radius. Each tenth is folded onto one straight edge."""
    x, y = np.abs(dx), -dy
    cos, sin = np.float32(np.cos(np.pi / 5)), np.float32(np.sin(np.pi / 5))
    for normal_x in (cos, -cos):  # mirror on the lines 36 degrees right, then left, of the upper tip's axis
        across = np.maximum(normal_x * x - sin * y, 0) * 2
        x, y = x - across * normal_x, y + across * sin
    x = np.abs(x)
    # edge from the tip (0, R) to the inner corner R/2 (sin 36, cos 36)
    edge_x, edge_y = 0.5 * np.sin(np.pi / 5), 0.5 * np.cos(np.pi / 5) - 1
    length = np.hypot(edge_x, edge_y)
    return (x * np.float32(-edge_y / length) + y * np.float32(edge_x / length)) - np.float32(
        edge_x / length * STAR_REACH
    ) * r


_DISTANCE: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "ball": _ball,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
}


def shape_distance(shape: str, dx: np.ndarray, dy: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Signed distance in pixels (inside < 0) of points at (dx, dy) from the centre of a shape of radius `r`.

    Exact near the outline, which is all that coverage needs. All arrays float32, broadcast against each other.
    """
    return _DISTANCE[shape](dx, dy, r)


def covered(back: str, back_radius: float, front: str, front_radius: float, offsets: np.ndarray) -> np.ndarray:
    """Share of one shape [T] that another hides whose centre lies at `offsets` [T, 2] from its own; pixels."""
    reach = OUTLINES[back].reach * back_radius
    line = ((np.arange(_GRID) + 0.5) / _GRID * 2 - 1) * reach
    x, y = line[None, None, :], line[None, :, None]
    inside = shape_distance(back, x, y, np.array(back_radius)) < 0
    dx, dy = x - offsets[:, 0, None, None], y - offsets[:, 1, None, None]
    hidden = inside & (shape_distance(front, dx, dy, np.array(front_radius)) < 0)
    return hidden.sum((1, 2)) / inside.sum()
