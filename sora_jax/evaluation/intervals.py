"""Figures with their 95 % intervals: {"value", "low", "high", "n"}."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

_Z = 1.959963984540054  # the normal quantile of a two-sided 95 % interval
_DRAWS = 2000

Metric = dict[str, float | int]


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927): (low, high) in [0, 1]; (0, 1) when n is 0.

    centre = (p + z^2 / 2n) / (1 + z^2 / n), half width = z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n).
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, _Z**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # rounding must not put the share itself outside
    return max(0.0, min(p, float(centre - half))), min(1.0, max(p, float(centre + half)))


def share(answers: Sequence[bool]) -> Metric:
    """How many are true, with its Wilson interval."""
    low, high = wilson_interval(sum(answers), len(answers))
    return {"value": sum(answers) / len(answers), "low": low, "high": high, "n": len(answers)}


def mean(values: Sequence[float] | Float[np.ndarray, " n"], seed: int = 0) -> Metric:
    """The mean of one value a clip, with its bootstrap interval (Efron 1979, percentiles)."""
    given = np.array(values, np.float64)
    drawn = np.random.default_rng(seed).integers(len(given), size=(_DRAWS, len(given)))
    low, high = np.quantile(given[drawn].mean(1), (0.025, 0.975))
    return {"value": float(given.mean()), "low": float(low), "high": float(high), "n": len(given)}
