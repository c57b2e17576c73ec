"""A power law through losses of runs of growing compute, and what it says of the next one.

plain       L = a C^-b         a straight line in log L over log C
saturating  L = c + a C^-b     the same above a loss c that no compute takes away (Kaplan et al. 2020,
                               arXiv:2001.08361; Hoffmann et al. 2022, arXiv:2203.15556)

The velocity of a clip has such a floor: a noised latent and a caption leave it open which clip it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class PowerLaw(NamedTuple):
    """L = c + a C^-b, C in PFLOP, with the R^2 of the losses that it was fitted to, in log L."""

    form: str  # "plain" or "saturating"
    a: float
    b: float
    c: float
    r2: float

    def loss(self, compute: float) -> float:
        """At so many operations."""
        return float(self.c + self.a * (compute / 1e15) ** -self.b)


def plain_fit(compute: Sequence[float], loss: Sequence[float]) -> PowerLaw:
    """Least squares in log L over log C."""
    return _fit("plain", np.asarray(compute), np.asarray(loss), 0.0)


def saturating_fit(compute: Sequence[float], loss: Sequence[float]) -> PowerLaw:
    """The plain fit above the floor c, from 0 to under the least loss, that gives the highest R^2, on a grid that
    closes in on it. Three values from four points leave one free: their R^2 says little, the next point says more.
    Raises `ValueError` below four points."""
    C, L = np.asarray(compute), np.asarray(loss)
    if len(C) != len(L) or len(C) < 4:
        raise ValueError(f"a fit with a floor needs four runs or more, each with a loss, not {len(C)} and {len(L)}")
    low, high = 0.0, 0.999 * float(L.min())
    for _ in range(4):
        floors = np.linspace(low, high, 200)
        best = max((_fit("saturating", C, L, floor) for floor in floors), key=lambda fit: fit.r2)
        apart = floors[1] - floors[0]
        low, high = max(low, best.c - apart), min(high, best.c + apart)
    return best


def _fit(form: str, compute: np.ndarray, loss: np.ndarray, floor: float) -> PowerLaw:
    x = np.log(compute / 1e15)
    slope, intercept = np.polyfit(x, np.log(loss - floor), 1)
    fitted = np.log(floor + np.exp(intercept + slope * x))
    left, spread = np.sum((np.log(loss) - fitted) ** 2), np.sum((np.log(loss) - np.log(loss).mean()) ** 2)
    return PowerLaw(form, float(np.exp(intercept)), float(-slope), float(floor), float(1 - left / spread))
