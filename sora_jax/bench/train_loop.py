"""What a run costs besides its steps: `sora-jax bench train-loop`.

Both rows take the same jitted step of the config world. "bare-loop" is that step on one batch that lies on the device,
again and again; "train-loop" is `sora-jax train` with everything on: the loader, metrics, averages, TensorBoard and a
checkpoint every 50 steps, of which one is written while it is timed.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from sora_jax.bench.programs import full_rows, training_program
from sora_jax.bench.rows import noise_cache
from sora_jax.config import Config, load_config
from sora_jax.runtime import compute_dtype
from sora_jax.sharding import batch_sharding, make_mesh
from sora_jax.training.diffusion_stage import diffusion_stage
from sora_jax.training.loop import train
from sora_jax.training.stage import Batches, Context, Stage

WARM, STEPS, CHECKPOINT_EVERY = 25, 50, 50  # timed are the steps from 26 to 75


def _config(*more: str) -> Config:
    return load_config("world", ["data.held_out=0", *more])


def bare_loop(model: str) -> float:
    """Seconds a step of the jitted step alone."""
    del model
    config = _config()
    program = training_program(config, make_mesh(), compute_dtype())
    rows, state = jax.device_put(full_rows(config), batch_sharding(program.mesh)), program.start()
    began = 0.0
    with jax.set_mesh(program.mesh):
        for step in range(WARM + STEPS):
            if step == WARM:
                jax.block_until_ready(state)
                began = time.perf_counter()
            state, _ = program.step(state, rows, {})
        jax.block_until_ready(state)
    return (time.perf_counter() - began) / STEPS


class _Timed:
    """Batches, and when each was asked for."""

    def __init__(self, batches: Batches):
        self._batches, self.asked = batches, list[float]()
        self.state, self.restore, self.close = batches.state, batches.restore, batches.close

    def __next__(self) -> Any:
        self.asked.append(time.perf_counter())
        return next(self._batches)


def train_loop(model: str) -> float:
    """Seconds a step of a run."""
    del model
    timed: list[_Timed] = []

    def stage(context: Context) -> Stage:
        made = diffusion_stage(context)
        timed.append(_Timed(made.batches))
        return dataclasses.replace(made, batches=timed[0])

    with tempfile.TemporaryDirectory() as folder:
        noise_cache(Path(folder) / "latents", clips=512)
        config = _config(
            f"data.latents={folder}/latents",
            f"train.steps={WARM + STEPS + 1}",
            f"train.checkpoint_every={CHECKPOINT_EVERY}",
            "train.validate_every=0",
            "train.sample_every=0",
        )
        train(config, Path(folder) / "run", say=lambda line: None, make_stage=stage)
    asked = timed[0].asked
    return (asked[WARM + STEPS] - asked[WARM]) / STEPS


ROWS: dict[str, Callable[[str], float]] = {"train-loop": train_loop, "bare-loop": bare_loop}
