"""Solvers against the closed-form flow of a Gaussian, for which velocity and trajectory are known exactly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import sampler
from sora_jax.diffusion.sampler import SamplerState, denoise, level_schedule, schedule_table
from sora_jax.diffusion.solvers import SOLVERS, _corrector_targets
from sora_jax.errors import UserError
from sora_jax.models.transformer import model_time
from sora_jax.shapes import Condition

MEAN, STD = 0.7, 0.4  # of the data, x_0 ~ N(MEAN, STD^2)


def gaussian_velocity(params, x, levels, condition):
    """E[eps - x_0 | x_sigma] for Gaussian data: linear regression on x_sigma ~ N((1 - s) m, (1 - s)^2 S^2 + s^2)."""
    s = jnp.take_along_axis(levels, condition.level_ids, axis=1)[..., None]
    variance = (1 - s) ** 2 * STD**2 + s**2
    covariance = s - (1 - s) * STD**2  # of (eps - x_0) with x_sigma
    return -MEAN + covariance / variance * (x - (1 - s) * MEAN)


def exact(x: np.ndarray, level_from: float, level_to: float) -> np.ndarray:
    """The flow keeps quantiles: (x - mean) / deviation is the same at every level."""

    def moments(s):
        return (1 - s) * MEAN, np.sqrt((1 - s) ** 2 * STD**2 + s**2)

    (mean, std), (mean_to, std_to) = moments(level_from), moments(level_to)
    return mean_to + std_to / std * (x - mean)


def rows(n_groups: int, tokens: int = 6) -> Condition:
    ids = jnp.tile(jnp.arange(tokens) % n_groups, (2, 1))
    ones = jnp.ones((2, tokens), jnp.int32)
    return Condition(
        positions=jnp.zeros((2, tokens, 3), jnp.int32),
        segment_ids=ones,
        prompt_ids=ones,
        level_ids=ids,
        given=jnp.zeros((2, tokens), bool),
        text=jnp.zeros((2, 1, 4)),
        text_ids=jnp.ones((2, 1), jnp.int32),
    )


def run(name: str, schedule: np.ndarray, noise: np.ndarray, condition: Condition, chunk: int | None = None):
    solver = SOLVERS[name]
    state = sampler.start(
        solver,
        jnp.zeros(noise.shape),
        jnp.asarray(noise),
        jnp.ones(schedule[0].shape),
        condition.given,
        condition.level_ids,
    )
    steps = len(schedule) - 1
    chunk = chunk or steps
    for i in range(0, steps, chunk):
        state = denoise(gaussian_velocity, None, condition, state, schedule[i : i + chunk + 1], solver=solver)
    return np.asarray(state.tokens)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("unipc", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(name, order):
    """Halving the step divides the error by 2^order, with a different schedule in each group.

    Between levels .95 and .05: UniPC steps in log-SNR, in which the ends 1 and 0 are infinitely far.
    """
    x = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
    condition = rows(2)
    group = np.asarray(condition.level_ids)[..., None]
    expected = np.where(group == 0, exact(x, 0.95, 0.05), exact(x, 0.9, 0.2))
    errors = []
    for steps in (16, 32, 64):
        levels = np.stack([np.linspace(0.95, 0.05, steps + 1), np.linspace(0.9, 0.2, steps + 1)], axis=-1)
        schedule = np.repeat(levels[:, None], 2, axis=1).astype(np.float32)
        state = SamplerState(jnp.asarray(x), SOLVERS[name].history(jnp.asarray(x), jnp.asarray(schedule[0])))
        out = denoise(gaussian_velocity, None, condition, state, schedule, solver=SOLVERS[name])
        errors.append(np.abs(np.asarray(out.tokens) - expected).max())
    rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(rates > order - 0.3), (errors, rates)


@pytest.mark.parametrize(("name", "tolerance"), [("euler", 0.06), ("heun", 0.006), ("unipc", 0.01), ("dpmpp_2m", 0.02)])
def test_from_pure_noise_to_pure_data(name, tolerance):
    noise = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
    out = run(name, schedule_table(level_schedule(SOLVERS[name], 40, 1.0), np.zeros((2, 2), bool)), noise, rows(2))
    np.testing.assert_allclose(out, exact(noise, 1.0, 0.0), atol=tolerance)


@pytest.mark.parametrize("name", list(SOLVERS))
def test_chunks_change_nothing(name):
    noise = np.random.default_rng(1).normal(size=(2, 6, 3)).astype(np.float32)
    schedule = schedule_table(level_schedule(SOLVERS[name], 9, 3.0), np.zeros((2, 2), bool))
    whole = run(name, schedule, noise, rows(2))
    np.testing.assert_allclose(run(name, schedule, noise, rows(2), chunk=3), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", list(SOLVERS))
def test_held_groups_are_left_exactly_and_cost_the_others_nothing(name):
    """A group that waits, then moves, ends where it ends when it moves from the start."""
    noise = np.random.default_rng(2).normal(size=(2, 6, 3)).astype(np.float32)
    levels = level_schedule(SOLVERS[name], 8, 1.0)
    hold = np.full(4, levels[0])
    early = np.concatenate([levels, np.zeros(4, np.float32)])
    late = np.concatenate([hold, levels])
    schedule = np.repeat(np.stack([early, late], axis=-1)[:, None], 2, axis=1)
    both = run(name, schedule, noise, rows(2))
    alone = run(name, schedule_table(levels, np.zeros((2, 2), bool)), noise, rows(2))
    np.testing.assert_allclose(both, alone, rtol=0, atol=1e-6)

    waiting = run(name, schedule[:5], noise, rows(2))
    late_tokens = np.asarray(rows(2).level_ids[0]) == 1
    np.testing.assert_array_equal(waiting[:, late_tokens], noise[:, late_tokens])


@pytest.mark.parametrize("name", list(SOLVERS))
def test_given_tokens_pass_bit_exactly_and_nothing_is_nan(name):
    rng = np.random.default_rng(3)
    clean, noise = rng.normal(size=(2, 2, 6, 3)).astype(np.float32)
    condition = rows(2)
    given = np.asarray(condition.level_ids) == 0
    condition = condition.replace(given=jnp.asarray(given))
    schedule = schedule_table(level_schedule(SOLVERS[name], 5, 1.0), np.array([[True, False]] * 2))
    solver = SOLVERS[name]
    state = sampler.start(
        solver,
        jnp.asarray(clean),
        jnp.asarray(noise),
        jnp.asarray(schedule[0]),
        condition.given,
        condition.level_ids,
    )
    out = np.asarray(denoise(gaussian_velocity, None, condition, state, schedule, solver=solver).tokens)
    np.testing.assert_array_equal(out[given], clean[given])
    assert np.isfinite(out).all()


def test_identity_step_is_exact_at_both_ends():
    for name, solver in SOLVERS.items():
        for level in (0.0, 0.3, 1.0):
            x = jax.random.normal(jax.random.key(0), (2, 6, 3))
            table = np.full((3, 2, 2), level, np.float32)
            state = SamplerState(jnp.array(x), solver.history(x, jnp.asarray(table[0])))
            out = denoise(gaussian_velocity, None, rows(2), state, table, solver=solver)
            np.testing.assert_array_equal(np.asarray(out.tokens), np.asarray(x), err_msg=f"{name} at {level}")


def test_corrector_targets_against_float64():
    """b_k from their definition in float64, over steps from tiny to huge."""
    h = np.array([1e-3, 0.02, 0.3, 0.49, 0.51, 2.0, 13.0])
    z = -h
    phi_1 = np.expm1(z) / z
    series_2 = sum(z**j / np.prod(np.arange(1, j + 3, dtype=float)) for j in range(60))
    series_3 = sum(z**j / np.prod(np.arange(1, j + 4, dtype=float)) for j in range(60))
    b_1, b_2 = _corrector_targets(jnp.asarray(h, jnp.float32))
    np.testing.assert_allclose(b_1, series_2 / phi_1, rtol=2e-5)
    np.testing.assert_allclose(b_2, 2 * series_3 / phi_1, rtol=2e-5)


def test_unipc_matches_a_scalar_transcription_of_the_paper():
    """The multistep predictor-corrector, transcribed for one scalar in float64."""

    def lam(s):
        return np.log1p(-s) - np.log(s)

    levels = level_schedule(SOLVERS["unipc"], 7, 3.0).astype(np.float64)
    x = 0.8

    def velocity(x, s):
        variance = (1 - s) ** 2 * STD**2 + s**2
        return -MEAN + (s - (1 - s) * STD**2) / variance * (x - (1 - s) * MEAN)

    past: list[tuple[float, float]] = []  # (level, predicted x_0), newest last
    last_x, last_order = None, 0
    for i in range(7):
        s, t = levels[i], levels[i + 1]
        clean = x - s * velocity(x, s)
        if past:
            s0, m0 = past[-1]
            h = lam(s) - lam(s0)
            phi = np.expm1(-h)
            base = s / s0 * last_x - (1 - s) * phi * m0
            if last_order == 1:
                residue = 0.5 * (clean - m0)
            else:
                s1, m1 = past[-2]
                rk = (lam(s1) - lam(s0)) / h
                f = phi / -h - 1
                b = [f / phi, 2 * (f / -h - 0.5) / phi]
                rho = np.linalg.solve([[1, 1], [rk, 1]], b)
                residue = rho[0] * (m1 - m0) / rk + rho[1] * (clean - m0)
            x = base - (1 - s) * phi * residue
        past.append((s, clean))
        last_order = 1 if len(past) == 1 or t == 0 else 2
        last_x = x
        if t == 0:
            x = clean
        else:
            h = lam(t) - lam(s)
            x = t / s * last_x - (1 - t) * np.expm1(-h) * clean
            if last_order == 2:
                s1, m1 = past[-2]
                x -= (1 - t) * np.expm1(-h) * 0.5 * (m1 - clean) / ((lam(s1) - lam(s)) / h)

    noise = np.full((2, 6, 3), 0.8, np.float32)
    ours = run(
        "unipc", schedule_table(level_schedule(SOLVERS["unipc"], 7, 3.0), np.zeros((2, 1), bool)), noise, rows(1)
    )
    np.testing.assert_allclose(ours, x, rtol=0, atol=2e-5)


def test_levels_are_those_of_the_reference():
    """By hand, from the formulas of `diffusers`' schedulers: UniPC runs over 1 ... 1/1000 without its end, DPM-Solver
    over 999/1000 ... 0 without its end, Euler from 1 to the shifted 1/1000, which is then shifted again."""

    def shifted(sigma: float, s: float) -> float:
        return s * sigma / (1 + (s - 1) * sigma)

    expected = {
        "unipc": {1.0: [0.999999, 0.5005, 0], 3.0: [0.999999, shifted(0.5005, 3), 0]},
        "dpmpp_2m": {1.0: [0.999, 0.4995, 0], 3.0: [shifted(0.999, 3), shifted(0.4995, 3), 0]},
        "euler": {1.0: [1, 0.001, 0], 3.0: [1, shifted(shifted(0.001, 3), 3), 0]},
    }
    for name, of_shift in expected.items():
        for shift, levels in of_shift.items():
            np.testing.assert_allclose(level_schedule(SOLVERS[name], 2, shift), levels, rtol=1e-6)


@pytest.mark.parametrize("name", ["unipc", "dpmpp_2m"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
def test_rounding_a_level_does_not_change_the_whole_time_that_the_model_is_told(name: str, shift: float):
    for steps in range(1, 101):
        if name == "unipc":
            exact = np.linspace(1, 1 / 1000, steps + 1)[:-1]
        else:
            exact = np.flip(1 - np.linspace(1, 1 / 1000, steps + 1))[:-1]
        exact = shift * exact / (1 + (shift - 1) * exact)
        exact[0] = min(exact[0], 1 - 1e-6)
        told = model_time(jnp.asarray(level_schedule(SOLVERS[name], steps, shift)[None]), whole=True)
        np.testing.assert_array_equal(told[0, :-1], (exact * 1000).astype(np.int64), err_msg=f"{steps} steps")


@pytest.mark.parametrize("bad", [0, -3])
def test_steps_below_one_are_refused(bad):
    with pytest.raises(UserError, match="steps must be at least 1"):
        level_schedule(SOLVERS["unipc"], bad)
