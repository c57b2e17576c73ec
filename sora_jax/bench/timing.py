"""How a row is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

SPENT = 2.0  # seconds of repetitions, at least
LEAST = 5  # repetitions, at least


def median_seconds(work: Callable[[], object], *, warm: int = 1, least: int = LEAST) -> float:
    """The median time of `work`, which must have finished when it returns; the first `warm` calls do not count."""
    for _ in range(warm):
        work()
    times: list[float] = []
    while len(times) < least or sum(times) < SPENT:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
