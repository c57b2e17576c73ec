"""What a training run carries from step to step, and the one place where it changes.

`TrainState` is a pytree. A step computes gradients any way it likes and hands them to `apply_gradients`, which clips,
updates, averages, and leaves everything as it was when the gradients are not finite or a spike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sora_jax import sharding
from sora_jax.sharding import AnyMesh
from sora_jax.training.spikes import is_spike, no_statistics, observe


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """`params` and `ema` map a trained module's name to its NNX state: {"transformer": ..., "text_encoder": ...}."""

    # Fields are Any because the same tree also holds shapes and shardings.
    step: Any  # int32: steps taken, skipped ones included
    params: Any  # float32 masters
    ema: Any  # exponential moving average of params, float32
    opt_state: Any
    key: Any  # the run's key; a step draws from fold_in(key, step), so resuming needs no key history
    skipped: Any  # int32: steps whose gradients were not finite or a spike, since the start
    skipped_in_a_row: Any  # int32: the same, since the last good step
    norms: Any  # NormStatistics: what gradient norms have been like

    def replace(self, **changes: Any) -> TrainState:
        return dataclasses.replace(self, **changes)

    def step_key(self) -> PRNGKeyArray:
        """The key of the step about to be taken."""
        return jax.random.fold_in(self.key, self.step)


def ema_decay_at(step: Int[Array, ""], decay: float) -> Float[Array, ""]:
    """The decay after `step` earlier updates: min(decay, (1 + step) / (10 + step)), so that an average over a short run
    does not remember its initialisation (as in TensorFlow's ExponentialMovingAverage with `num_updates`)."""
    count = step.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + count) / (10.0 + count))


def ema_update(ema: Any, params: Any, decay: Float[Array, ""] | float) -> Any:
    """ema + (1 - decay) (params - ema), leaf by leaf."""
    return jax.tree.map(lambda average, value: average + (1.0 - decay) * (value - average), ema, params)


def make_init(
    make_params: Callable[[PRNGKeyArray], Mapping[str, Any]], optimizer: optax.GradientTransformation
) -> Callable[[PRNGKeyArray], TrainState]:
    """The function from the run's seed key to the state of step 0; half of the key makes parameters, half the steps."""

    def init(key: PRNGKeyArray) -> TrainState:
        params_key, run_key = jax.random.split(key)
        params = dict(make_params(params_key))
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, params, optimizer.init(params), run_key, zero, zero, no_statistics())

    return init


def abstract_state(init: Callable[[PRNGKeyArray], TrainState], key: PRNGKeyArray, mesh: AnyMesh) -> TrainState:
    """Shapes, dtypes and shardings of what `init` makes, without making it; what a checkpoint is restored into."""
    shapes = jax.eval_shape(init, key)
    shardings = jax.tree.broadcast(state_shardings(shapes, mesh), shapes)
    return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, shardings)


def init_state(init: Callable[[PRNGKeyArray], TrainState], key: PRNGKeyArray, mesh: Mesh) -> TrainState:
    """The state of step 0, born sharded: no device ever holds more than its part of it."""
    with jax.set_mesh(mesh):
        return jax.jit(init, out_shardings=state_shardings(jax.eval_shape(init, key), mesh))(key)


def state_shardings(state: Any, mesh: AnyMesh) -> Any:
    """A prefix tree of `state` with the sharding of each array: that of its parameter for parameters, averages and
    moments (they carry the same axis names), replicated for everything else."""

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return sharding.replicated(mesh)
        # A moment that its optimiser does not keep is an empty node inside its Variable, and needs no place.
        return sharding.param_shardings(leaf, mesh) if jax.tree.leaves(leaf) else leaf

    return jax.tree.map(place, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def apply_gradients(
    state: TrainState,
    grads: Any,
    loss: Float[Array, ""],
    optimizer: optax.GradientTransformation,
    *,
    clip_norm: float,
    ema_decay: float,
    spike_sigmas: float = 0.0,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """The state after one step with `grads` (a tree like `state.params`), and {"grad_norm", "update_norm",
    "update_ratio", "skipped_in_a_row"}: the norm of what was added to the parameters, and its ratio to theirs (NaN for
    a step that is skipped).

    Gradients are scaled to a global norm of at most `clip_norm` (0 = no clipping). When the loss or that norm is not
    finite, or the norm is a spike (`spikes.is_spike`), the step is skipped: parameters, average, moments and statistics
    stay as they are to the bit, only the counters move (`optax.apply_if_finite` would take the bad step after its
    limit; the loop stops the run instead).
    """
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(norm) & jnp.isfinite(loss) & ~is_spike(state.norms, norm, spike_sigmas)
    if clip_norm:
        scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))
        grads = jax.tree.map(lambda g: g * scale, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = ema_update(state.ema, params, ema_decay_at(state.step - state.skipped, ema_decay))

    def keep_if_bad(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

    bad = 1 - good.astype(jnp.int32)
    new_state = state.replace(
        step=state.step + 1,
        params=keep_if_bad(params, state.params),
        ema=keep_if_bad(ema, state.ema),
        opt_state=keep_if_bad(opt_state, state.opt_state),
        skipped=state.skipped + bad,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
        norms=keep_if_bad(observe(state.norms, norm), state.norms),
    )
    update_norm = jnp.where(good, optax.tree.norm(updates), jnp.nan)
    return new_state, {
        "grad_norm": norm,
        "update_norm": update_norm,
        "update_ratio": update_norm / jnp.maximum(optax.tree.norm(state.params), 1e-12),
        "skipped_in_a_row": new_state.skipped_in_a_row.astype(jnp.float32),
    }
