"""Sample grids in training: what the averaged parameters make of a few fixed prompts or clips."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import UInt8

from sora_jax.diffusion.guidance import classifier_free_guidance, guided_condition
from sora_jax.diffusion.sampler import denoise, find_solver, level_schedule, schedule_table, start
from sora_jax.errors import UserError
from sora_jax.models.autoencoder import Autoencoder
from sora_jax.models.structure import structure_of
from sora_jax.models.tokenizer import Tokenizer
from sora_jax.models.transformer import model_time
from sora_jax.shapes import Condition, Extent, latent_extent, token_extent
from sora_jax.tokens.packing import Clip, PackedRows, fill_rows
from sora_jax.tokens.patchify import unpatchify
from sora_jax.training.adapters import complete
from sora_jax.training.autoencoder_step import MODULE
from sora_jax.training.diffusion_step import DiffusionModules, condition_of, read_text
from sora_jax.training.pretrained import load_autoencoder

if TYPE_CHECKING:
    from sora_jax.training.stage import Context

Sample = Callable[[Any], list[np.ndarray]]


def diffusion_sampler(
    context: Context, modules: DiffusionModules, tokenizer: Tokenizer, kept: Mapping[str, Any]
) -> Sample | None:
    """`sample(params)` makes the videos of `config.sample.prompts`; None, with a line, when there is no autoencoder."""
    config = context.config.sample
    if not config.prompts or not context.config.train.sample_every:
        return None
    try:
        autoencoder_config, autoencoder_params = load_autoencoder(context.config.data.autoencoder)
    except UserError as error:
        context.say(f"no sample grids: {error}")
        return None
    patch = context.config.transformer.patch
    autoencoder = structure_of(lambda rngs: Autoencoder(autoencoder_config, rngs=rngs))
    latents = latent_extent(Extent(config.frames, config.height, config.width), autoencoder_config.stride, patch)
    tokens = token_extent(latents, patch)
    empty = np.zeros((*latents, autoencoder_config.z_dim), np.float32)
    texts = [np.asarray(tokenizer.places(text), np.int32) for text in [*config.prompts, *[""] * len(config.prompts)]]
    length = max(map(len, texts))
    rows = [
        PackedRows(
            **fill_rows(
                [[i] for i in range(len(half))],
                [Clip(empty, text) for text in half],
                row_tokens=tokens.volume,
                row_text=length,
                row_groups=tokens.frames,
                patch=patch,
            )
        )
        for half in (texts[: len(config.prompts)], texts[len(config.prompts) :])
    ]
    solver = find_solver(config.solver)
    schedule = schedule_table(
        level_schedule(solver, config.steps, config.shift), np.zeros(rows[0].group_segment.shape, np.bool_)
    )
    noise = jax.random.normal(jax.random.key(config.seed), rows[0].tokens.shape, jnp.float32)
    scale = jnp.full((len(config.prompts),), config.guidance, jnp.float32)

    def velocity(params: Any, x: jax.Array, levels: jax.Array, condition: Condition) -> jax.Array:
        transformer = nnx.merge(modules.transformer, params)
        return transformer(x, model_time(levels, whole=solver.whole_times), condition, dtype=context.dtype)

    guided = classifier_free_guidance(velocity)

    @jax.jit
    def read(params: Any, row: PackedRows) -> Condition:
        text = read_text(modules, params, row, context.dtype)
        return condition_of(row, text, jnp.zeros(row.segment_ids.shape, jnp.bool_))

    @jax.jit
    def decode(params: Any, x: jax.Array) -> jax.Array:
        model = nnx.merge(autoencoder, params)
        video = model.decode(model.denormalize(unpatchify(x, latents, patch)))
        return jnp.round((video + 1.0) * 127.5).astype(jnp.uint8)

    def sample(params: Any) -> list[np.ndarray]:
        params = complete(kept, params)
        condition = guided_condition(read(params, rows[0]), read(params, rows[1]), scale)
        state = start(solver, noise, noise, jnp.asarray(schedule[0]), condition.given, condition.level_ids)
        state = denoise(guided, params["transformer"], condition, state, jnp.asarray(schedule), solver=solver)
        return list(np.asarray(decode(autoencoder_params, state.tokens)))

    return sample


def autoencoder_sampler(graphdef: nnx.GraphDef, clips: UInt8[np.ndarray, "B T H W 3"], dtype: jnp.dtype) -> Sample:
    """`sample(params)` gives each clip beside its reconstruction."""

    @jax.jit
    def reconstruct(params: Any, clips: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params[MODULE])
        video = model.decode(model.encode((clips.astype(jnp.float32) / 127.5 - 1.0).astype(dtype)).mean)
        return jnp.round((video.astype(jnp.float32) + 1.0) * 127.5).astype(jnp.uint8)

    def sample(params: Any) -> list[np.ndarray]:
        return [
            np.concatenate(pair, axis=2) for pair in zip(clips, np.asarray(reconstruct(params, clips)), strict=True)
        ]

    return sample


def grid(videos: list[np.ndarray]) -> UInt8[np.ndarray, "T H W 3"]:
    """Videos of one size in a near-square grid, black where there is none left."""
    columns = math.ceil(math.sqrt(len(videos)))
    blank = [np.zeros_like(videos[0])] * (-len(videos) % columns)
    rows = [np.concatenate(row, axis=2) for row in zip(*[iter([*videos, *blank])] * columns, strict=True)]
    return np.concatenate(rows, axis=1)


def film_strips(videos: list[np.ndarray], frames: int = 5) -> UInt8[np.ndarray, "H W 3"]:
    """One picture: a row a video, `frames` of its frames evenly spread."""
    rows = []
    for video in videos:
        chosen = np.linspace(0, len(video) - 1, min(frames, len(video))).round().astype(int)
        rows.append(np.concatenate(list(video[chosen]), axis=1))
    return np.concatenate(rows, axis=0)
