"""A run of the loop on a model of a few numbers, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.config import Config, load_config, override
from sora_jax.models import layers
from sora_jax.training.checkpoint import Checkpoints
from sora_jax.training.loop import Summary, train
from sora_jax.training.profiler import StepRange
from sora_jax.training.stage import Context, Stage
from sora_jax.training.state import TrainState, apply_gradients

ROWS = 8


class Counting:
    """Batch b is b times the counting matrix; poisoned batches are that times `poisoned`, NaN by default. Calls
    `at[b]()` when batch b is taken."""

    def __init__(
        self,
        poison: Collection[int] = (),
        at: dict[int, Callable[[], Any]] | None = None,
        poisoned: float = np.nan,
    ):
        self._next, self._poison, self._poisoned, self._at = 0, poison, poisoned, at or {}

    def __next__(self) -> np.ndarray:
        number, self._next = self._next, self._next + 1
        self._at.get(number, lambda: None)()
        batch = np.arange(ROWS * 3, dtype=np.float32).reshape(ROWS, 3) * (number % 5) / 10
        with np.errstate(invalid="ignore"):
            return batch * self._poisoned if number in self._poison else batch

    def state(self) -> dict[str, Any]:
        return {"next": self._next}

    def restore(self, state: Any) -> None:
        self._next = state["next"]

    def close(self) -> None:
        self.closed = True


def make_params(key: jax.Array) -> dict[str, Any]:
    return {"model": nnx.split(layers.Linear(3, 2, ("embed", "mlp"), rngs=nnx.Rngs(params=key)), graph=False)[1]}


def stage_of(batches: Counting, seen: list[Any] | None = None) -> Callable[[Context], Stage]:
    def make(context: Context) -> Stage:
        graphdef = nnx.split(
            nnx.eval_shape(lambda: layers.Linear(3, 2, ("embed", "mlp"), rngs=nnx.Rngs(0))), graph=False
        )[0]

        def step(state: TrainState, batch: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
            noise = jax.random.normal(state.step_key(), (batch.shape[0], 2))

            def loss_of(params: Any) -> jax.Array:
                return jnp.mean(jnp.square(nnx.merge(graphdef, params["model"])(batch) - noise))

            loss, grads = jax.value_and_grad(loss_of)(state.params)
            state, metrics = apply_gradients(
                state,
                grads,
                loss,
                context.optimizer,
                clip_norm=1.0,
                spike_sigmas=context.config.optimizer.spike_sigmas,
                ema_decay=0.9,
            )
            return state, {"loss": loss, **metrics}

        def validate(params: Any) -> dict[str, jax.Array]:
            return {"loss": jnp.sum(params["model"]["kernel"][...])}

        def sample(params: Any) -> list[np.ndarray]:
            return [np.full((5, 16, 16, 3), shade, np.uint8) for shade in (0, 100, 200)]

        if seen is not None:
            seen.append(context)
        return Stage(
            make_params, jax.jit(step, donate_argnums=0), batches, "8 rows", 100, 1e6, validate=validate, sample=sample
        )

    return make


def config_of(*overrides: str) -> Config:
    fast = [
        "train.steps=6",
        "train.batch_size=8",
        "train.log_every=1",
        "train.checkpoint_every=0",
        "train.validate_every=0",
    ]
    fast += [
        "train.sample_every=0",
        "optimizer.name=adamw",
        "optimizer.warmup_steps=0",
        "optimizer.learning_rate=0.01",
        "train.mesh.data=1",
    ]
    return override(load_config("world"), [*fast, *overrides])


class Run:
    """Runs in one workdir, and what they left there."""

    def __init__(self, workdir: Path):
        self.workdir = workdir
        self.said: list[str] = []

    def __call__(
        self,
        *overrides: str,
        batches: Counting | None = None,
        force: bool = False,
        profile: StepRange | None = None,
    ) -> Summary:
        make, config = stage_of(batches or Counting()), config_of(*overrides)
        return train(config, self.workdir, force=force, profile=profile, say=self.said.append, make_stage=make)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.workdir / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in self.lines}

    @property
    def steps(self) -> list[int]:
        checkpoints = Checkpoints(self.workdir / "checkpoints", read_only=True)
        steps = checkpoints.steps()
        checkpoints.close()
        return steps
