"""The loss of held-out clips at fixed noise levels: of text to video, and of each skill that is trained.

    loss, loss_0.05, ...               text to video, at the middles of ten bands of levels
    first_loss, first_loss_0.05, ...   a mode of `diffusion.levels`, over ten draws of its levels, and in each band
    caption_worth                      how much worse text to video at the noisiest of the levels gets with the captions
                                       of the row before: about 0 is a transformer that does not read

Noise, and what of a clip is given, are the same at every validation of every run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from sora_jax.diffusion.flow import loss_by_level, mean_of_counted, spread
from sora_jax.diffusion.levels import MODES, Levels, LevelsConfig, fixed_levels
from sora_jax.tokens.packing import PackedRows
from sora_jax.training.adapters import complete
from sora_jax.training.diffusion_step import (
    BANDS,
    DiffusionModules,
    diffusion_errors,
    diffusion_loss,
    index_of,
    level_bands,
)
from sora_jax.training.metrics import WEIGHT

Validate = Callable[..., dict[str, Float[Array, ""]]]

_NOTHING: Mapping[str, Any] = MappingProxyType({})


def make_diffusion_validation(
    modules: DiffusionModules, levels: LevelsConfig, key: Key[Array, ""], dtype: jnp.dtype | type = jnp.float32
) -> Validate:
    """`validate(params, rows, kept={})` -> the losses above; those of modes come with how many tokens they are the mean
    over (`metrics.WEIGHT`), and are NaN where no clip can have the mode; so is `caption_worth` of one row."""
    text_to_video = _text_to_video(modules, levels, key, dtype)
    skills = [mode for mode in levels.trained_modes if mode != "uniform"]
    by_mode = _by_mode(modules, levels, skills, key, dtype) if skills else None

    def validate(
        params: Mapping[str, Any], rows: PackedRows, kept: Mapping[str, Any] = _NOTHING
    ) -> dict[str, jax.Array]:
        kept = dict(kept)
        return text_to_video(params, rows, kept) | (by_mode(params, rows, kept) if by_mode else {})

    return validate


def _text_to_video(modules: DiffusionModules, levels: LevelsConfig, key: Key[Array, ""], dtype: Any) -> Validate:
    """At each level the mean over all tokens, but those of windows that begin inside a span: they are never made from
    text alone. The noise of a level is another for each level."""
    _, middles = level_bands(levels)

    def validate(params: Mapping[str, Any], own: PackedRows, kept: Mapping[str, Any]) -> dict[str, jax.Array]:
        params = complete(kept, params)
        used, several = own.group_segment > 0, len(own.tokens) > 1
        others = {name: jnp.roll(getattr(own, name), 1, axis=0) for name in ("text_tokens", "text_ids")}

        def at(index: jax.Array, level: jax.Array, exchanged: jax.Array) -> jax.Array:
            """The loss at a level; where `exchanged`, each row reads the captions of the row before it."""
            rows = own.replace(**{name: jnp.where(exchanged, x, getattr(own, name)) for name, x in others.items()})
            noise = jax.random.normal(jax.random.fold_in(key, index), rows.tokens.shape, jnp.float32)
            mode = jnp.zeros(used.shape, jnp.int32)
            table = Levels(jnp.where(used, level, 0.0), jnp.zeros_like(used), mode, rows.level_ids)
            if levels.modes.rolling <= 0:  # then there are no windows
                return diffusion_loss(modules, params, rows, table, noise, dtype=dtype)
            errors = diffusion_errors(modules, params, rows, table, noise, dtype)
            whole = fixed_levels(key, levels, index_of(rows), "uniform", 0.0).mode
            return mean_of_counted(errors.error, errors.counted & _has_mode("uniform", whole, rows))

        numbers = [*range(BANDS), *[BANDS - 1] * several]
        exchanged = jnp.arange(len(numbers)) >= BANDS
        asked = (jnp.asarray(numbers), jnp.asarray([middles[k] for k in numbers], jnp.float32), exchanged)
        found = jax.lax.map(lambda one: at(*one), asked)
        losses = found[:BANDS]
        named = {f"loss_{level:.2f}": loss for level, loss in zip(middles, losses, strict=True)}
        worth = found[-1] - losses[-1] if several else jnp.float32(jnp.nan)
        named |= {"caption_worth": worth, "caption_worth" + WEIGHT: jnp.float32(several)}
        return {"loss": jnp.mean(losses), **named}

    return jax.jit(validate)


def _by_mode(
    modules: DiffusionModules, levels: LevelsConfig, skills: list[str], key: Key[Array, ""], dtype: Any
) -> Validate:
    """Of each mode `BANDS` draws, from one part of the levels to the next, over the clips that can have it."""
    edges, middles = level_bands(levels)

    def validate(params: Mapping[str, Any], rows: PackedRows, kept: Mapping[str, Any]) -> dict[str, jax.Array]:
        params = complete(kept, params)
        groups = rows.group_segment.shape[1]

        def levels_of(mode: str, index: jax.Array) -> tuple[Levels, jax.Array]:
            fixed = jax.random.fold_in(key, MODES.index(mode))
            drawn = fixed_levels(fixed, levels, index_of(rows), mode, (index + 0.5) / BANDS)
            return _with_column(drawn, groups), _has_mode(mode, drawn.mode, rows)

        def errors_of(skill: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
            drawn, can = jax.lax.switch(skill, [partial(levels_of, mode) for mode in skills], index)
            noise = jax.random.normal(jax.random.fold_in(key, index), rows.tokens.shape, jnp.float32)
            errors = diffusion_errors(modules, params, rows, drawn, noise, dtype)
            means, tokens = loss_by_level(errors.error, errors.counted & can, errors.sigma, edges)
            return jnp.where(tokens > 0, means * tokens, 0.0), tokens

        draws = jnp.divmod(jnp.arange(len(skills) * BANDS), BANDS)
        by_draw = jax.lax.map(lambda draw: errors_of(*draw), draws)
        sums, tokens = (x.reshape(len(skills), BANDS, BANDS).sum(axis=1) for x in by_draw)
        found: dict[str, jax.Array] = {}
        for number, mode in enumerate(skills):
            of_band = [
                (f"{mode}_loss_{middle:.2f}", sums[number, k], tokens[number, k]) for k, middle in enumerate(middles)
            ]
            for name, total, count in [(f"{mode}_loss", sums[number].sum(), tokens[number].sum()), *of_band]:
                found |= {name: jnp.where(count > 0, total / jnp.maximum(count, 1.0), jnp.nan), name + WEIGHT: count}
        return found

    return jax.jit(validate)


def _has_mode(mode: str, of_group: jax.Array, rows: PackedRows) -> Bool[Array, "B N"]:
    """Whether a token's video has the mode."""
    return spread((of_group == MODES.index(mode)).astype(jnp.float32), rows.level_ids) > 0.5


def _with_column(levels: Levels, groups: int) -> Levels:
    """With the group that modes with masks have for what they give, so that the levels of all modes have one shape."""
    missing = ((0, 0), (0, groups + 1 - levels.sigma.shape[1]))
    return levels._replace(
        sigma=jnp.pad(levels.sigma, missing), given=jnp.pad(levels.given, missing, constant_values=True)
    )
