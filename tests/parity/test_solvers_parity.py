"""Whole trajectories of each solver against the reference's scheduler, on one nonlinear velocity."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion.sampler import denoise, find_solver, level_schedule, schedule_table, start
from sora_jax.models.transformer import model_time
from sora_jax.shapes import Condition

TOKENS, WIDTH = 6, 5


def condition() -> Condition:
    ones = jnp.ones((1, TOKENS), jnp.int32)
    return Condition(
        positions=jnp.zeros((1, TOKENS, 3), jnp.int32),
        segment_ids=ones,
        prompt_ids=ones,
        level_ids=jnp.zeros((1, TOKENS), jnp.int32),
        given=jnp.zeros((1, TOKENS), bool),
        text=jnp.zeros((1, 1, 2)),
        text_ids=jnp.ones((1, 1), jnp.int32),
    )


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("steps", [2, 3, 4, 10, 25, 50])
@pytest.mark.parametrize("name", ["unipc", "dpmpp_2m", "euler"])
def test_a_trajectory_is_the_references(name: str, steps: int, shift: float):
    import torch
    from reference import scheduler

    noise = np.random.default_rng(0).normal(size=(1, TOKENS, WIDTH)).astype(np.float32)
    mix = np.random.default_rng(1).normal(size=(WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5
    solver = find_solver(name)
    times = []

    def velocity(params, x, levels, _):
        t = model_time(levels, whole=solver.whole_times)[..., None] / 1000.0
        return jnp.tanh(x @ mix) + t * x - 0.3

    levels = level_schedule(solver, steps, shift)
    schedule = schedule_table(levels, np.zeros((1, 1), bool))
    arrays = (jnp.zeros(noise.shape), jnp.asarray(noise), jnp.ones((1, 1)))
    state = start(solver, *arrays, condition().given, condition().level_ids)
    ours = [noise]
    for i in range(steps):
        state = denoise(velocity, None, condition(), state, schedule[i : i + 2], solver=solver)
        ours.append(np.asarray(state.tokens))

    reference = scheduler(name, shift)
    reference.set_timesteps(steps)
    x = torch.from_numpy(noise)
    theirs = [noise]
    for t in reference.timesteps:
        times.append(float(t))
        v = torch.tanh(x @ torch.from_numpy(mix)) + t.float() / 1000.0 * x - 0.3
        x = reference.step(v, t, x, return_dict=False)[0]
        theirs.append(x.numpy())
    told = np.asarray(model_time(jnp.asarray(levels[None, :-1]), whole=solver.whole_times))[0]
    np.testing.assert_allclose(told, times, rtol=1e-6)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert np.abs(a - b).max() <= 1e-5 * b.std(), f"after step {step}"
