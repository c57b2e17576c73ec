"""Sampling: lower the noise levels of a canvas, step by step, until everything is data.

    schedule = level_schedule(solver, steps, shift)               [S + 1], from about 1 down to 0
    state = start(solver, tokens, levels)
    state = denoise(velocity, params, condition, state, schedule[i : j + 1], solver=...)      for each chunk of steps

`denoise` is one compiled scan over a chunk of static length; the state is a donated pytree that is carried across
chunks, so progress, previews and interruption live between chunks, outside the compiled function.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sora_jax.diffusion.flow import mix, spread
from sora_jax.diffusion.guidance import Velocity
from sora_jax.diffusion.solvers import SOLVERS, TRAIN_STEPS, Solver
from sora_jax.errors import UserError, nearest
from sora_jax.pytrees import pytree


@pytree
@dataclass(frozen=True)
class SamplerState:
    """Tokens on their way from noise to data."""

    tokens: Float[Array, "B N P"]
    history: Any  # the solver's


def find_solver(name: str) -> Solver:
    if name not in SOLVERS:
        raise UserError(f"unknown solver {name!r}: {nearest(name, SOLVERS)}")
    return SOLVERS[name]


def level_schedule(solver: Solver, steps: int, shift: float = 1.0) -> Float[np.ndarray, " S"]:
    """The level before each of `steps` steps and 0 after the last, as the reference spaces them for `solver`, moved
    towards noise by `shift` (see `shift_level`); float32.

    Raises `UserError` for steps < 1 or shift <= 0.
    """
    if steps < 1:
        raise UserError(f"steps must be at least 1, not {steps}")
    if not shift > 0 or not np.isfinite(shift):
        raise UserError(f"shift must be a finite number > 0, not {shift}")
    exact = np.append(solver.levels(steps, shift), 0.0)
    levels = exact.astype(np.float32)
    # Where the model's time is cut to a whole number, rounding a level must not carry it over the edge.
    for toward in (np.float32(0), np.float32(1)):
        wrong = np.floor(levels * np.float32(TRAIN_STEPS)) - np.floor(exact * TRAIN_STEPS)
        levels = np.where((wrong > 0) if toward == 0 else (wrong < 0), np.nextafter(levels, toward), levels)
    return levels


def schedule_table(
    levels: Float[np.ndarray, " S"], given_groups: Bool[np.ndarray, "B G"]
) -> Float[np.ndarray, "S B G"]:
    """The level of every group before and after each step: `levels`, and 0 throughout for groups that are given."""
    return np.where(given_groups[None], np.float32(0), levels[:, None, None].astype(np.float32))


def start(
    solver: Solver,
    clean: Float[Array, "B N P"],
    noise: Float[Array, "B N P"],
    levels: Float[Array, "B G"],
    given: Bool[Array, "B N"],
    level_ids: Int[Array, "B N"],
) -> SamplerState:
    """Mix data and noise to the first levels; given tokens are `clean` exactly."""
    tokens = mix(clean, noise, spread(levels, level_ids))
    tokens = jnp.where(given[..., None], clean, tokens)
    return SamplerState(tokens, solver.history(tokens, levels))


@functools.partial(jax.jit, static_argnames=("velocity", "solver"), donate_argnames=("state",))
def denoise(
    velocity: Velocity,
    params: Any,
    condition: Any,
    state: SamplerState,
    schedule: Float[Array, "S B G"],
    *,
    solver: Solver,
) -> SamplerState:
    """Take the S - 1 steps of `schedule`, a table of levels `[S, B, G]`; donates `state`.

    `condition` is a `Condition` or a `GuidedCondition`, as `velocity` expects. Given tokens come out bit for bit.
    """

    def model(x: jax.Array, levels: jax.Array) -> jax.Array:
        return velocity(params, x, levels, condition)

    def step(state: SamplerState, levels: tuple[jax.Array, jax.Array]) -> tuple[SamplerState, None]:
        level_from, level_to = levels
        moved, history = solver.step(model, state.tokens, level_from, level_to, condition.level_ids, state.history)
        return SamplerState(jnp.where(condition.given[..., None], state.tokens, moved), history), None

    state, _ = jax.lax.scan(step, state, (schedule[:-1], schedule[1:]))
    return state
