"""How far apart are two sets of clips? The energy distance of their features, beside what chance alone would give.

report = compare(true, also_true, model=made)
report["model"]   # {"value": .31, "low": .25, "high": .38, "n": 200}
report["floor"]   # {"value": .002, "low": -.03, "high": .04, "n": 200}: nothing within it can be told from the truth

The energy distance (Székely and Rizzo 2013, "Energy statistics") between X and Y is 2 E|x - y| - E|x - x'| - E|y - y'|:
0 for equal distributions and for no others, a maximum mean discrepancy whose kernel is the distance (Sejdinovic et al.
2013, arXiv:1207.6076), with no bandwidth to choose, and it goes on growing where bounded kernels are full. Estimated
over pairs of different clips it has no bias at any n. The Fréchet distance between two Gaussians, on which the usual
figures stand, needs a covariance of all features: between true sets of 100 clips it reads several times what it reads
at 400 (tests/test_distribution.py holds both beside each other).

Features are scaled by the spread of all true clips.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from sora_jax.errors import UserError

LEAST = 8  # clips in a set
DRAWS = 1000  # of the bootstrap and of the permutations


def energy_distance(x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "m D"]) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'|, each mean over pairs of different rows: unbiased, and so at times below 0."""
    n = len(x)
    apart = _distances(np.concatenate([x, y]))
    return float(_energy(apart, np.arange(len(apart)) < n)[0])


def compare(
    true: Float[np.ndarray, "m D"],
    also_true: Float[np.ndarray, "n D"],
    seed: int = 0,
    **sets: Float[np.ndarray, "_ D"],
) -> dict[str, dict[str, float | int]]:
    """Distances of sets of features, each as many as `also_true`, from those of a true set; and the noise floor.

    Returns:
      {name: {"value", "low", "high", "n"}} for each of `sets`, with its 95 % bootstrap interval (both sets drawn anew).
      "floor": the distance of `also_true`, with the interval in which the distance between such sets lies in 95 of 100
      cases where both are drawn from one distribution: by random division of all true clips.

    Raises:
      UserError: for fewer than `LEAST` clips in a set, of which a draw might hold one clip alone.
    """
    n, m = len(also_true), len(true)
    if min(n, m) < LEAST:
        raise UserError(f"a distance between sets needs at least {LEAST} clips in each, not {min(n, m)}")
    if any(len(one) != n for one in sets.values()):
        raise ValueError(f"the floor is that of as many clips: {n} true ones, and {[len(x) for x in sets.values()]}")
    rng = np.random.default_rng(seed)
    known = np.concatenate([also_true, true])
    spread = known.std(0)
    spread = np.where(spread > 1e-9, spread, 1.0)  # what never changes is taken as it is
    first = np.arange(n + m) < n

    apart = _distances(known / spread)
    dealt = np.stack([rng.permutation(first) for _ in range(DRAWS)])
    found = {"floor": _metric(_energy(apart, first), _energy(apart, dealt), n)}
    for name, features in sets.items():
        apart = _distances(np.concatenate([features, true]) / spread)
        again = np.concatenate([_draws(rng, n), _draws(rng, m)], axis=1)
        found[name] = _metric(_energy(apart, first), _energy(apart, first, again), n)
    return found


def _metric(value: np.ndarray, others: np.ndarray, n: int) -> dict[str, float | int]:
    low, high = np.quantile(others, (0.025, 0.975))
    return {"value": float(value[0]), "low": float(low), "high": float(high), "n": n}


def _distances(rows: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n n"]:
    squares = (rows**2).sum(1)
    found = np.sqrt(np.maximum(squares[:, None] + squares - 2 * rows @ rows.T, 0))
    np.fill_diagonal(found, 0)
    return found


def _draws(rng: np.random.Generator, n: int) -> np.ndarray:
    """How often each of `n` clips is drawn in each of the bootstrap's sets of `n`."""
    return rng.multinomial(n, np.full(n, 1 / n), size=DRAWS)


def _energy(apart: np.ndarray, first: np.ndarray, times: np.ndarray | None = None) -> np.ndarray:
    """Energy distances [K] between the rows of a matrix of distances [N, N] that are `first` (bool, [N] or [K, N]) and
    the others; with `times` [K, N], each row as often as that. A row is never compared with itself, however often it
    was drawn: the mean is that over pairs of different clips."""
    first = np.atleast_2d(first)
    times = np.ones(apart.shape[:1])[None] if times is None else times
    x, y = (times * first).astype(np.float64), (times * ~first).astype(np.float64)

    def mean(a: np.ndarray, b: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        return ((a @ apart) * b).sum(1) / pairs

    def different(a: np.ndarray) -> np.ndarray:
        return a.sum(1) ** 2 - (a**2).sum(1)

    return 2 * mean(x, y, x.sum(1) * y.sum(1)) - mean(x, x, different(x)) - mean(y, y, different(y))
