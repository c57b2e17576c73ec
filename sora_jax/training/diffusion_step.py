"""The diffusion loss on packed rows, one step of its training, and its validation at fixed noise levels.

    rows ── draw levels and what is given ── mix with noise ── text encoder, transformer ── velocity ── loss

What learns is in the state, and what does not is handed to each step beside it (`adapters.complete`): the text encoder
learns with the world model, and is kept where an open model is tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from sora_jax.diffusion.flow import flow_loss, mix, spread, velocity_target
from sora_jax.diffusion.levels import Levels, LevelsConfig, draw_levels
from sora_jax.models.transformer import model_time
from sora_jax.shapes import Condition
from sora_jax.tokens.packing import PackedRows
from sora_jax.training.adapters import complete
from sora_jax.training.state import TrainState, apply_gradients

Step = Callable[..., tuple[TrainState, dict[str, Float[Array, ""]]]]
Validate = Callable[..., dict[str, Float[Array, ""]]]

PAD = 0  # the id of an empty place, in ByT5 and UMT5 alike
VALIDATION_LEVELS = 10  # so many, each in the middle of its share of the levels


@dataclass(frozen=True)
class DiffusionModules:
    """The structure of the two networks; their parameters travel in `TrainState.params` under the same names."""

    transformer: nnx.GraphDef
    text_encoder: nnx.GraphDef


def condition_of(rows: PackedRows, text: Float[Array, "B L E"], given: Bool[Array, "B N"]) -> Condition:
    return Condition(
        positions=rows.positions,
        segment_ids=rows.segment_ids,
        prompt_ids=rows.prompt_ids,
        level_ids=rows.level_ids,
        given=given,
        text=text,
        text_ids=rows.text_ids,
    )


def read_text(
    modules: DiffusionModules, params: Mapping[str, Any], rows: PackedRows, dtype: jnp.dtype | type
) -> Float[Array, "B L E"]:
    """The embeddings of the texts of packed rows; 0 at the empty places that a text may have (`tokenizer.places`)."""
    encoder = nnx.merge(modules.text_encoder, params["text_encoder"])
    read = jnp.where(rows.text_tokens == PAD, 0, rows.text_ids)
    return encoder(rows.text_tokens, read, dtype=dtype)


def diffusion_loss(
    modules: DiffusionModules,
    params: Mapping[str, Any],
    rows: PackedRows,
    levels: Levels,
    noise: Float[Array, "B N P"],
    dtype: jnp.dtype | type = jnp.float32,
) -> Float[Array, ""]:
    """Mean squared error of the velocity over the tokens that are neither padding nor given."""
    clean = rows.tokens.astype(jnp.float32)
    sigma = spread(levels.sigma, rows.level_ids)
    given = spread(levels.given.astype(jnp.float32), rows.level_ids) > 0.5
    noisy = mix(clean, noise, sigma)

    text = read_text(modules, params, rows, dtype)
    transformer = nnx.merge(modules.transformer, params["transformer"])
    velocity = transformer(noisy, model_time(levels.sigma), condition_of(rows, text, given), dtype=dtype)
    return flow_loss(velocity, velocity_target(clean, noise), ~given & (rows.segment_ids > 0))


def make_diffusion_step(
    modules: DiffusionModules,
    optimizer: optax.GradientTransformation,
    levels: LevelsConfig,
    *,
    clip_norm: float = 1.0,
    spike_sigmas: float = 0.0,
    ema_decay: float = 0.999,
    dtype: jnp.dtype | type = jnp.float32,
) -> Step:
    """`step(state, rows, kept={}) -> (state, metrics)`, jitted, with `state` donated; `kept` are modules that do not
    learn, by name.

    Randomness comes from `state.step_key()` alone, so a resumed run draws what the uninterrupted one would have drawn.
    Metrics: `loss`, and what `apply_gradients` reports.
    """

    def step(
        state: TrainState, rows: PackedRows, kept: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        level_key, noise_key = jax.random.split(state.step_key())
        drawn = draw_levels(
            level_key,
            levels,
            group_segment=rows.group_segment,
            group_frame=rows.group_frame,
            group_count=rows.group_count,
            segment_ids=rows.segment_ids,
        )
        noise = jax.random.normal(noise_key, rows.tokens.shape, jnp.float32)
        loss, grads = jax.value_and_grad(
            lambda params: diffusion_loss(modules, complete(kept, params), rows, drawn, noise, dtype=dtype)
        )(state.params)
        state, metrics = apply_gradients(
            state, grads, loss, optimizer, clip_norm=clip_norm, spike_sigmas=spike_sigmas, ema_decay=ema_decay
        )
        return state, {"loss": loss, **metrics}

    return jax.jit(step, donate_argnums=0)


def make_diffusion_validation(
    modules: DiffusionModules,
    levels: LevelsConfig,
    key: Key[Array, ""],
    dtype: jnp.dtype | type = jnp.float32,
) -> Validate:
    """`validate(params, rows, kept={}) -> {"loss": mean, "loss_0.05": ..., ...}`: the loss of text to video at ten
    fixed levels, evenly from `levels.low` to `levels.high`.

    The noise of a level is the same at every call, and another for each level.
    """

    middles = [
        levels.low + (levels.high - levels.low) * (i + 0.5) / VALIDATION_LEVELS for i in range(VALIDATION_LEVELS)
    ]

    def validate(
        params: Mapping[str, Any], rows: PackedRows, kept: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, jax.Array]:
        params = complete(kept, params)
        used = rows.group_segment > 0

        def at(index: jax.Array, level: jax.Array) -> jax.Array:
            noise = jax.random.normal(jax.random.fold_in(key, index), rows.tokens.shape, jnp.float32)
            table = Levels(jnp.where(used, level, 0.0), jnp.zeros_like(used), jnp.zeros(used.shape, jnp.int32))
            return diffusion_loss(modules, params, rows, table, noise, dtype=dtype)

        losses = jax.lax.map(lambda pair: at(*pair), (jnp.arange(len(middles)), jnp.asarray(middles, jnp.float32)))
        named = {f"loss_{level:.2f}": losses[i] for i, level in enumerate(middles)}
        return {"loss": jnp.mean(losses), **named}

    return jax.jit(validate)
