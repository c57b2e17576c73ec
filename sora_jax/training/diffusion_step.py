"""The diffusion loss on packed rows, and one step of its training.

    rows ── draw levels and what is given ── mix with noise ── text encoder, transformer ── velocity ── loss

What learns is in the state, and what does not is handed to each step beside it (`adapters.complete`): the text encoder
learns with the world model, and is kept where an open model is tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sora_jax.diffusion.flow import (
    loss_by_level,
    mean_of_counted,
    mix,
    spread,
    token_errors,
    velocity_target,
)
from sora_jax.diffusion.levels import Levels, LevelsConfig, RowIndex, draw_levels
from sora_jax.models.routing import draw_through
from sora_jax.models.transformer import model_time
from sora_jax.shapes import Condition
from sora_jax.tokens.packing import PackedRows
from sora_jax.training.accumulation import accumulated
from sora_jax.training.adapters import complete
from sora_jax.training.metrics import WEIGHT
from sora_jax.training.state import TrainState, apply_gradients

Step = Callable[..., tuple[TrainState, dict[str, Float[Array, ""]]]]

PAD = 0  # the id of an empty place, in ByT5 and UMT5 alike
ROUTES = 1  # what the key of a step's routes is folded with
BANDS = 10  # equal shares of the levels that are trained: one validated in the middle of each, and a loss of each


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


def index_of(rows: PackedRows) -> RowIndex:
    return RowIndex(**{name: getattr(rows, name) for name in RowIndex._fields})


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
    total: Float[Array, ""] | None = None,
    through: Int[Array, "B M"] | None = None,
) -> Float[Array, ""]:
    """Mean squared error of the velocity over the tokens that are neither padding nor given; with `total`, the share of
    these rows in the mean over so many; `through` as in `diffusion_errors`."""
    errors = diffusion_errors(modules, params, rows, levels, noise, dtype, through)
    return mean_of_counted(errors.error, errors.counted, total)


class TokenErrors(NamedTuple):
    """Of each token of packed rows."""

    error: Float[Array, "B N"]  # squared, of the velocity
    counted: Bool[Array, "B N"]  # neither padding nor given
    sigma: Float[Array, "B N"]  # its noise level


def diffusion_errors(
    modules: DiffusionModules,
    params: Mapping[str, Any],
    rows: PackedRows,
    levels: Levels,
    noise: Float[Array, "B N P"],
    dtype: jnp.dtype | type = jnp.float32,
    through: Int[Array, "B M"] | None = None,
) -> TokenErrors:
    """What the transformer gets wrong about `rows` mixed with `noise` at `levels`; with `through`, where the other
    tokens pass by its middle (`models.routing`)."""
    rows = rows.replace(level_ids=levels.level_ids)
    clean = rows.tokens.astype(jnp.float32)
    sigma = spread(levels.sigma, rows.level_ids)
    given = given_tokens(levels)
    noisy = mix(clean, noise, sigma)

    text = read_text(modules, params, rows, dtype)
    transformer = nnx.merge(modules.transformer, params["transformer"])
    condition = condition_of(rows, text, given)
    velocity = transformer(noisy, model_time(levels.sigma), condition, through=through, dtype=dtype)
    error = token_errors(velocity, velocity_target(clean, noise))
    return TokenErrors(error, ~given & (rows.segment_ids > 0), sigma)


def level_bands(levels: LevelsConfig) -> tuple[list[float], list[float]]:
    """The edges of `BANDS` equal shares of the levels from `levels.low` to `levels.high`, and their middles."""

    def at(share: float) -> float:
        return levels.low + (levels.high - levels.low) * share / BANDS

    return [at(k) for k in range(BANDS + 1)], [at(k + 0.5) for k in range(BANDS)]


def given_tokens(levels: Levels) -> Bool[Array, "B N"]:
    return spread(levels.given.astype(jnp.float32), levels.level_ids) > 0.5


def make_diffusion_step(
    modules: DiffusionModules,
    optimizer: optax.GradientTransformation,
    levels: LevelsConfig,
    *,
    clip_norm: float = 1.0,
    spike_sigmas: float = 0.0,
    ema_decay: float = 0.999,
    dtype: jnp.dtype | type = jnp.float32,
    accumulate: int = 1,
    route_share: float = 0.0,
) -> Step:
    """`step(state, rows, kept={}) -> (state, metrics)`, jitted, with `state` donated; `kept` are modules that do not
    learn, by name. The rows are taken in `accumulate` passes. `route_share` of the tokens pass by the blocks in the
    middle.

    Randomness comes from `state.step_key()` alone, so a resumed run draws what the uninterrupted one would have drawn.
    Metrics: `loss`; `loss_0.05`, ...: the mean over the tokens of each band of levels, by its middle, with how many
    there are as its weight; and what `apply_gradients` reports.
    """
    edges, middles = level_bands(levels)

    def step(
        state: TrainState, rows: PackedRows, kept: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = state.step_key()
        level_key, noise_key = jax.random.split(key)
        drawn = draw_levels(level_key, levels, index_of(rows))
        noise = jax.random.normal(noise_key, rows.tokens.shape, jnp.float32)
        through = None
        if route_share:
            through = draw_through(jax.random.fold_in(key, ROUTES), rows.segment_ids, route_share)

        total = jnp.sum(~given_tokens(drawn) & (rows.segment_ids > 0), dtype=jnp.float32)

        def share(params: Any, batch: tuple[Any, ...]) -> tuple[jax.Array, Any]:
            rows, drawn, noise, through = batch
            errors = diffusion_errors(modules, complete(kept, params), rows, drawn, noise, dtype, through)
            means, tokens = loss_by_level(errors.error, errors.counted, errors.sigma, edges)
            sums = jnp.where(tokens > 0, means * tokens, 0.0)
            return mean_of_counted(errors.error, errors.counted, total), (sums, tokens)

        (loss, (sums, tokens)), grads = accumulated(share, state.params, (rows, drawn, noise, through), accumulate)
        state, metrics = apply_gradients(
            state, grads, loss, optimizer, clip_norm=clip_norm, spike_sigmas=spike_sigmas, ema_decay=ema_decay
        )
        banded: dict[str, jax.Array] = {}
        means = jnp.where(tokens > 0, sums / jnp.maximum(tokens, 1.0), jnp.nan)
        for middle, mean, count in zip(middles, means, tokens, strict=True):
            banded |= {f"loss_{middle:.2f}": mean, f"loss_{middle:.2f}{WEIGHT}": count}
        return state, {"loss": loss, **banded, **metrics}

    return jax.jit(step, donate_argnums=0)
