"""Gradient spikes: norms far beyond what the run has seen so far, as a torn batch or a device in error makes them.

Clipping bounds how far such a step goes and not where, and Adam remembers it in its moments; so the step is left out.
What is far is told by a z-score, as ZClip does (Kumar et al. 2025, arXiv:2504.02507, section 3). It differs in three
things: the score is of the logarithm of the norm, whose spread does not depend on its scale; a spike is skipped and not
scaled down; and it takes both a high score and a norm `LEAST_FACTOR` times the usual one, so that neither a run whose
norms hardly vary nor one whose norms vary widely is disturbed.

Mean and variance are those of the good steps: of all of them at first, later exponentially weighted (Finch 2009,
"Incremental calculation of weighted mean and variance", section 9).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

MEMORY = 100  # steps; the mean reaches about so far back
LEAST_FACTOR = 10.0  # times the geometric mean of the norms: what is below is no spike, however even they are


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NormStatistics:
    """Of log(gradient norm), over the good steps; all zeros before the first."""

    # Fields are Any because the same tree also holds shapes and shardings.
    count: Any  # int32
    mean: Any  # float32
    variance: Any  # float32


def no_statistics() -> NormStatistics:
    return NormStatistics(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


def is_spike(seen: NormStatistics, norm: Float[Array, ""], sigmas: float) -> Bool[Array, ""]:
    """Whether `norm` is a spike: more than `sigmas` standard deviations above the mean (0: never), and more than
    `LEAST_FACTOR` times the usual. Never before `MEMORY` good steps."""
    if not sigmas:
        return jnp.zeros((), bool)
    far = jnp.maximum(sigmas * jnp.sqrt(seen.variance), jnp.log(LEAST_FACTOR))
    return (seen.count >= MEMORY) & (_log(norm) - seen.mean > far)


def observe(seen: NormStatistics, norm: Float[Array, ""]) -> NormStatistics:
    """The statistics with one more norm: weights 1 / n up to `MEMORY` norms, 1 / `MEMORY` from then on."""
    count = seen.count + 1
    weight = 1.0 / jnp.minimum(count, MEMORY).astype(jnp.float32)
    difference = _log(norm) - seen.mean
    mean = seen.mean + weight * difference
    variance = (1.0 - weight) * (seen.variance + weight * difference * difference)
    return NormStatistics(count, mean, variance)


def _log(norm: Float[Array, ""]) -> Float[Array, ""]:
    """Finite where the norm is: gradients of a batch without tokens are all zeros."""
    return jnp.log(jnp.maximum(norm, 1e-12))
