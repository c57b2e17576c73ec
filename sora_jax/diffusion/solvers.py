"""Solvers of the flow's ODE, dx / d sigma = v(x, sigma), from noise (sigma = 1) to data (sigma = 0).

A solver is a function named after its algorithm,

    x, history = solver(model, x, level_from, level_to, level_ids, history),

where `model(x, levels)` is the velocity and levels are tables `[B, G]` with one column per noise-level group:
coefficients, multistep history and warm-up order are per group, so frames of one row may be at different points of
their way. A group with level_from == level_to is left exactly as it is, its history too. Everything is finite at
levels 0 and 1.

Arithmetic is float32. `h` below is a step in lambda = log((1 - sigma) / sigma), half the log signal-to-noise ratio
squared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sora_jax.diffusion.flow import shift_level, spread
from sora_jax.pytrees import pytree

Model = Callable[[jax.Array, jax.Array], jax.Array]
"""`model(x [B,N,P], levels [B,G]) -> velocity [B,N,P]`."""


def _per_token(table: Float[Array, "B G"], level_ids: Int[Array, "B N"]) -> Float[Array, "B N 1"]:
    return spread(table, level_ids)[..., None]


# ------------------------------------------------------------------------------------------------ one-step solvers


def euler(
    model: Model,
    x: Float[Array, "B N P"],
    level_from: Float[Array, "B G"],
    level_to: Float[Array, "B G"],
    level_ids: Int[Array, "B N"],
    history: None = None,
) -> tuple[Float[Array, "B N P"], None]:
    """x + (to - from) v: order 1, one evaluation. The same as DDIM on this path."""
    return x + _per_token(level_to - level_from, level_ids) * model(x, level_from), history


def heun(
    model: Model,
    x: Float[Array, "B N P"],
    level_from: Float[Array, "B G"],
    level_to: Float[Array, "B G"],
    level_ids: Int[Array, "B N"],
    history: None = None,
) -> tuple[Float[Array, "B N P"], None]:
    """The trapezoid rule: order 2, two evaluations (Karras et al. 2022, arXiv:2206.00364, algorithm 1).

    A group's last step, to level 0, is Euler's: a model is not asked about pure data, on which it is not trained.
    """
    step = _per_token(level_to - level_from, level_ids)
    first = model(x, level_from)
    second = model(x + step * first, level_to)
    last = _per_token((level_to == 0).astype(x.dtype), level_ids)
    return x + step * (first + (1.0 - last) * 0.5 * (second - first)), history


# ------------------------------------------------------------------------------------------------ UniPC


@pytree
@dataclass(frozen=True)
class UniPCHistory:
    """What UniPC remembers: the last two predictions of the data and the levels they were made at."""

    x: Float[Array, "B N P"]  # corrected sample at `level_1`
    clean_1: Float[Array, "B N P"]  # the last prediction of x_0 ...
    clean_2: Float[Array, "B N P"]  # ... and the one before it
    level_1: Float[Array, "B G"]
    level_2: Float[Array, "B G"]
    steps: Int[Array, "B G"]  # steps taken: the predictor has order 2 from the second on
    order: Int[Array, "B G"]  # of the last predictor step, which the corrector repeats


def unipc_history(x: Float[Array, "B N P"], levels: Float[Array, "B G"]) -> UniPCHistory:
    # Every field is a buffer of its own, since `denoise` donates them.
    return UniPCHistory(
        x=jnp.array(x),
        clean_1=jnp.zeros_like(x),
        clean_2=jnp.zeros_like(x),
        level_1=jnp.array(levels),
        level_2=jnp.array(levels),
        steps=jnp.zeros(levels.shape, jnp.int32),
        order=jnp.zeros(levels.shape, jnp.int32),
    )


def _log_snr(sigma: jax.Array) -> jax.Array:
    """lambda, with sigma held 1e-6 away from both ends, where it is infinite."""
    sigma = jnp.clip(sigma, 1e-6, 1.0 - 1e-6)
    return jnp.log1p(-sigma) - jnp.log(sigma)


def _corrector_targets(h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """b_1 and b_2 of the order conditions of UniPC with B(h) = e^-h - 1 ("bh2"), h > 0.

        b_1 = phi_2 / phi_1,   b_2 = 2 phi_3 / phi_1,   phi_1 = (e^z - 1) / z,  phi_{k+1} = (phi_k - 1/k!) / z,  z = -h

    The recursion cancels for small h, where Taylor series stand in.
    """
    z = -h
    small = jnp.abs(z) < 0.5
    safe = jnp.where(small, 1.0, z)
    phi_1 = jnp.expm1(safe) / safe
    phi_2 = (phi_1 - 1.0) / safe
    phi_3 = (phi_2 - 0.5) / safe

    def taylor(k: int) -> jax.Array:  # phi_k = sum_j z^j / (j + k)!
        factorial = 1.0
        for i in range(2, k + 1):
            factorial *= i
        term = total = jnp.full_like(z, 1.0 / factorial)
        for j in range(1, 9):
            term = term * z / (j + k)
            total = total + term
        return total

    phi_1, phi_2, phi_3 = (jnp.where(small, taylor(k), phi) for k, phi in ((1, phi_1), (2, phi_2), (3, phi_3)))
    return phi_2 / phi_1, 2.0 * phi_3 / phi_1


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """numerator / denominator, and 0 where the denominator is 0 (groups that do not move)."""
    zero = denominator == 0
    return jnp.where(zero, 0.0, numerator / jnp.where(zero, 1.0, denominator))


def _extrapolate(
    x: jax.Array,
    clean: jax.Array,
    clean_1: jax.Array,
    level_from: jax.Array,
    level_to: jax.Array,
    level_1: jax.Array,
    order: jax.Array,
    level_ids: jax.Array,
) -> jax.Array:
    """x at `level_to` from the prediction of the data here and, where `order` is 2, the one before it at `level_1`.

    The exponential integrator's step, r x + (1 - r) x_0 with r = to / from, with x_0 moved along the line through both
    predictions to the middle of the step in lambda.
    """
    h = _log_snr(level_to) - _log_snr(level_from)
    k = _ratio(_log_snr(level_1) - _log_snr(level_from), h)  # where the prediction before lies, in steps
    slope = jnp.where(order == 2, 0.5 * _ratio(jnp.ones_like(k), k), 0.0)
    r = _per_token(_ratio(level_to, level_from), level_ids)
    return r * x + (1.0 - r) * (clean + _per_token(slope, level_ids) * (clean_1 - clean))


def unipc(
    model: Model,
    x: Float[Array, "B N P"],
    level_from: Float[Array, "B G"],
    level_to: Float[Array, "B G"],
    level_ids: Int[Array, "B N"],
    history: UniPCHistory,
) -> tuple[Float[Array, "B N P"], UniPCHistory]:
    """UniPC of order 2, B(h) = "bh2", predicting data (Zhao et al. 2023, arXiv:2302.04867, algorithms 5-8).

    One evaluation a step: the velocity at `level_from` first corrects the sample that the last step predicted there,
    then predicts the next. On this path the exponential integrator's linear part is r x + (1 - r) x_0 with r = to /
    from. A group's first step and its last, to level 0, have order 1.
    """

    def tokens(table: jax.Array) -> jax.Array:
        return _per_token(table, level_ids)

    moves = level_from != level_to
    velocity = model(x, level_from)
    clean = x - tokens(level_from) * velocity

    # Correct x: repeat the step that led here, now knowing the prediction at its end.
    began = history.steps > 0
    h = _log_snr(level_from) - _log_snr(history.level_1)
    h = jnp.where(began, h, 1.0)
    k = _ratio(_log_snr(history.level_2) - _log_snr(history.level_1), h)  # where the prediction before lies, in steps
    b_1, b_2 = _corrector_targets(h)
    second_order = history.order == 2
    weight_2 = jnp.where(second_order, (b_1 - b_2) / (1.0 - k), 0.0)
    weight_0 = jnp.where(second_order, b_1 - weight_2, 0.5)
    weight_2 = _ratio(weight_2, k)
    r = _ratio(level_from, history.level_1)
    change = tokens(weight_2) * (history.clean_2 - history.clean_1) + tokens(weight_0) * (clean - history.clean_1)
    corrected = tokens(r) * history.x + tokens(1.0 - r) * (history.clean_1 + change)
    x_now = jnp.where(tokens((began & moves).astype(x.dtype)) > 0, corrected, x)

    # Predict x at `level_to` from the two newest predictions of the data.
    order = jnp.where(began & (level_to > 0), 2, 1)
    predicted = _extrapolate(x_now, clean, history.clean_1, level_from, level_to, history.level_1, order, level_ids)

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        """Groups that do not move keep what they have."""
        mask = moves if new.ndim == 2 else tokens(moves.astype(x.dtype)) > 0
        return jnp.where(mask, new, old)

    return keep(predicted, x), UniPCHistory(
        x=keep(x_now, history.x),
        clean_1=keep(clean, history.clean_1),
        clean_2=keep(history.clean_1, history.clean_2),
        level_1=keep(level_from, history.level_1),
        level_2=keep(history.level_1, history.level_2),
        steps=keep(history.steps + 1, history.steps),
        order=keep(order, history.order),
    )


# ------------------------------------------------------------------------------------------------ DPM-Solver++


@pytree
@dataclass(frozen=True)
class DPMHistory:
    """What DPM-Solver++(2M) remembers: the last prediction of the data and the level it was made at."""

    clean_1: Float[Array, "B N P"]
    level_1: Float[Array, "B G"]
    steps: Int[Array, "B G"]  # steps taken


def dpm_history(x: Float[Array, "B N P"], levels: Float[Array, "B G"]) -> DPMHistory:
    return DPMHistory(jnp.zeros_like(x), jnp.array(levels), jnp.zeros(levels.shape, jnp.int32))


def dpmpp_2m(
    model: Model,
    x: Float[Array, "B N P"],
    level_from: Float[Array, "B G"],
    level_to: Float[Array, "B G"],
    level_ids: Int[Array, "B N"],
    history: DPMHistory,
) -> tuple[Float[Array, "B N P"], DPMHistory]:
    """DPM-Solver++(2M), midpoint form (Lu et al. 2022, arXiv:2211.01095, algorithm 2): UniPC's predictor without its
    corrector. A group's first step and its last, to level 0, have order 1."""
    clean = x - _per_token(level_from, level_ids) * model(x, level_from)
    order = jnp.where((history.steps > 0) & (level_to > 0), 2, 1)
    predicted = _extrapolate(x, clean, history.clean_1, level_from, level_to, history.level_1, order, level_ids)
    moves = level_from != level_to
    moving = _per_token(moves.astype(x.dtype), level_ids) > 0
    return jnp.where(moving, predicted, x), DPMHistory(
        clean_1=jnp.where(moving, clean, history.clean_1),
        level_1=jnp.where(moves, level_from, history.level_1),
        steps=jnp.where(moves, history.steps + 1, history.steps),
    )


# ------------------------------------------------------------------------------------------------ levels

TRAIN_STEPS = 1000  # levels that the reference knows: 1 / 1000, ..., 1

Grid = Callable[[int, float], Float[np.ndarray, " S"]]
"""`grid(steps, shift)`: the level before each of `steps` steps, from noise on; float64."""


def unipc_levels(steps: int, shift: float) -> Float[np.ndarray, " S"]:
    """From 1 towards 1 / 1000, which is left out; the first is held 1e-6 away from pure noise."""
    levels = shift_level(np.linspace(1.0, 1.0 / TRAIN_STEPS, steps + 1)[:-1], shift)
    return np.minimum(levels, 1.0 - 1e-6)


def dpm_levels(steps: int, shift: float) -> Float[np.ndarray, " S"]:
    """From 1 - 1 / 1000 towards 0, which is left out."""
    # As the reference writes it: the model's time is cut to a whole number, and may lie on the edge of one.
    return np.flip(shift_level(1.0 - np.linspace(1.0, 1.0 / TRAIN_STEPS, steps + 1), shift))[:-1]


def euler_levels(steps: int, shift: float) -> Float[np.ndarray, " S"]:
    """From 1 to the shifted 1 / 1000, both taken, and then shifted (the last of them a second time)."""
    (lowest,) = shift_level(np.array([1.0 / TRAIN_STEPS]), shift)
    return shift_level(np.linspace(1.0, lowest, steps), shift)


# ------------------------------------------------------------------------------------------------ by name


def no_history(x: Float[Array, "B N P"], levels: Float[Array, "B G"]) -> None:
    """One-step solvers remember nothing."""


@dataclass(frozen=True)
class Solver:
    """A solver with the empty history it starts from, what it costs, and the levels that the reference gives it."""

    step: Callable[..., tuple[jax.Array, Any]]
    history: Callable[[jax.Array, jax.Array], Any]
    evaluations: int  # of the model, per step
    levels: Grid
    whole_times: bool  # whether the reference cuts the model's time, 1000 sigma, down to a whole number


SOLVERS: Mapping[str, Solver] = {
    "unipc": Solver(unipc, unipc_history, 1, unipc_levels, True),
    "dpmpp_2m": Solver(dpmpp_2m, dpm_history, 1, dpm_levels, True),
    "euler": Solver(euler, no_history, 1, euler_levels, False),
    "heun": Solver(heun, no_history, 2, euler_levels, False),
}
