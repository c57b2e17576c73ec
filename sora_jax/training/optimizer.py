"""AdamW and Muon, learning-rate schedules, and which parameter gets which treatment.

- AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101. Weight decay falls on kernels and not on biases, norms, embeddings
  and modulation tables.
- Muon: Jordan et al. 2024 (kellerjordan.github.io/posts/muon): the momentum of a hidden matrix is replaced by the
  nearest orthogonal matrix, found by a few Newton-Schulz iterations. Every other parameter, and the first and last
  matrix of a model, are trained by AdamW. With `rms_match` an update is scaled by 0.2 sqrt(max(in, out)), so that its
  elements have the size that AdamW's usually have, and learning rate and weight decay carry over from it (Liu et al.
  2025, arXiv:2502.16982).

Parameters are told apart by the names in their path and the number of axes they have without the stacked layer axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sora_jax.errors import UserError
from sora_jax.training.muon import StackedAxes, scale_by_muon

# The modules that touch data space. Their matrices have rows of unlike meaning, which orthogonalising would mix.
BORDER_MODULES = frozenset({"patch_embed", "head", "conv_in", "conv_out"})


@dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates are peaks, reached after `warmup_steps`; the schedule ends at `final_fraction` of them at
    `train.steps`."""

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    adam_learning_rate: float = 0.0  # with muon: of the parameters that AdamW trains; 0 = the same
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_steps: int = 100
    final_fraction: float = 0.1
    weight_decay: float = 0.01  # times the learning rate, per step
    clip_norm: float = 1.0  # global norm of the gradients; 0 = no clipping
    spike_sigmas: float = 6.0  # a step is skipped when log(norm) is so far above its mean (`spikes`); 0 = never
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    muon_momentum: float = 0.95
    muon_iterations: int = 5  # Newton-Schulz iterations
    rms_match: bool = True

    def __post_init__(self) -> None:
        for name in (
            "learning_rate",
            "adam_learning_rate",
            "weight_decay",
            "clip_norm",
            "spike_sigmas",
            "warmup_steps",
        ):
            if not getattr(self, name) >= 0:
                raise UserError(f"optimizer.{name} must be >= 0, not {getattr(self, name)}")
        for name in ("b1", "b2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name} must be in [0, 1), not {getattr(self, name)}")
        if not 0 <= self.final_fraction <= 1:
            raise UserError(f"optimizer.final_fraction must be in [0, 1], not {self.final_fraction}")
        if self.muon_iterations < 1:
            raise UserError(f"optimizer.muon_iterations must be >= 1, not {self.muon_iterations}")


def make_schedule(config: OptimizerConfig, steps: int, peak: float) -> optax.Schedule:
    """The learning rate of step s = 0, 1, ... of `steps`, with p = clip((s - warmup) / (steps - warmup), 0, 1):

    A Python int gives a numpy value, without a device; a traced step gives a traced one.

    warm-up (s < warmup): peak (s + 1) / warmup
    constant: peak    linear: peak (1 - (1 - final) p)    cosine: peak (final + (1 - final) (1 + cos(pi p)) / 2)
    """
    warmup, final = config.warmup_steps, config.final_fraction

    def schedule(step: Any) -> Any:
        xp: Any = jnp if isinstance(step, jax.Array) else np
        s = xp.asarray(step, np.float32)
        p = xp.clip((s - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        shapes = {
            "constant": xp.ones_like(p),
            "linear": 1.0 - (1.0 - final) * p,
            "cosine": final + (1.0 - final) * 0.5 * (1.0 + xp.cos(np.pi * p)),
        }
        return peak * xp.where(s < warmup, (s + 1.0) / max(warmup, 1), shapes[config.schedule])

    return schedule


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The update rule for trees of NNX parameters; clipping is done before it, by `state.apply_gradients`."""
    main_rate = make_schedule(config, steps, config.learning_rate)

    def adamw(rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decay_mask)

    if config.name == "adamw":
        return adamw(main_rate)
    orthogonal = optax.chain(
        scale_by_muon(stacked_axes, config.muon_momentum, config.muon_iterations, config.eps, config.rms_match),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(main_rate),
    )
    rest = adamw(make_schedule(config, steps, config.adam_learning_rate or config.learning_rate))

    def label(params: Any) -> Any:
        axes = stacked_axes(params)
        return jax.tree.map(lambda n: "rest" if n is None else "muon", axes, is_leaf=lambda leaf: leaf is None)

    return optax.partition({"muon": orthogonal, "rest": rest}, label)


def stacked_axes(params: Any) -> Any:
    """A tree like `params`: for each hidden kernel, which Muon trains, how many stacked axes it begins with, else None.

    Stacked layers are matrices of their own. A convolution kernel [time, height, width, in, out] counts as one matrix
    of time * height * width * in rows.
    """

    def label(path: tuple[str, ...], variable: nnx.Variable) -> StackedAxes:
        if path[-1] != "kernel" or BORDER_MODULES & set(path) or not jax.tree.leaves(variable):
            return None  # a Variable without leaves is one that optax has masked out
        return variable.get_value().ndim - len(variable.get_metadata()["axes"])

    return _map_variables(label, params)


def decay_mask(params: Any) -> Any:
    """A tree like `params`: True where weight decay falls, which is on kernels."""
    return _map_variables(lambda path, variable: path[-1] == "kernel", params)


def _map_variables(function: Callable[[tuple[str, ...], nnx.Variable], Any], params: Any) -> Any:
    """The tree of `function(names in the path, variable)`, one leaf per parameter: a prefix of `params`."""

    def at(path: tuple[Any, ...], variable: nnx.Variable) -> Any:
        return function(tuple(str(getattr(entry, "key", entry)) for entry in path), variable)

    return jax.tree_util.tree_map_with_path(at, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def count_parameters(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
