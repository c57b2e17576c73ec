"""Small states whose every bit is drawn, and checkpoints of them."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.models import layers
from sora_jax.sharding import make_mesh
from sora_jax.training.checkpoint import Checkpoints
from sora_jax.training.optimizer import OptimizerConfig, make_optimizer
from sora_jax.training.state import TrainState, abstract_state, init_state, make_init

OPTIMIZER = make_optimizer(OptimizerConfig(name="muon"), 10)
KEY = jax.random.key(3)


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, width: int = 8):
        self.linear = layers.Linear(width, 16, ("embed", "mlp"), rngs=rngs)
        self.norm = layers.RMSNorm(16, "embed", rngs=rngs)


def make_params(key: jax.Array, width: int = 8) -> dict:
    return {"model": nnx.split(Model(nnx.Rngs(params=key), width), graph=False)[1]}


INIT = make_init(make_params, OPTIMIZER)


def one_device() -> jax.sharding.Mesh:
    return make_mesh({"data": 1}, jax.devices()[:1])


def shapes() -> TrainState:
    """What these checkpoints are restored into."""
    return abstract_state(INIT, KEY, one_device())


def state_at(step: int, mesh: jax.sharding.Mesh | None = None) -> TrainState:
    """A state with different bits in every array, NaN and denormals among them."""
    state = init_state(INIT, KEY, mesh or one_device())
    rng = np.random.default_rng(step)

    def fill(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf + step
        bits = rng.integers(0, 2**32, leaf.shape, np.uint32)
        return jax.device_put(jnp.asarray(bits.view(np.float32)), leaf.sharding)

    return jax.tree.map(fill, state)


def bits(state: TrainState) -> list[np.ndarray]:
    raw = [
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in jax.tree.leaves(state)
    ]
    return [np.array(leaf).view(np.uint32) for leaf in raw]  # a copy: the arrays may be donated


def same_bits(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def save_three(folder: Path) -> Path:
    """Steps 1, 2 and 3."""
    checkpoints = Checkpoints(folder)
    for step in (1, 2, 3):
        checkpoints.save(step, state_at(step), {"step": step})
    checkpoints.close()
    return folder


def data_files(step: Path) -> list[Path]:
    return sorted((p for p in (step / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
