"""The text stage: captions -> what they say; the text encoder learns to read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from sora_jax import sharding
from sora_jax.data.world.questions import answer_counts
from sora_jax.errors import UserError
from sora_jax.models.structure import parameters_of, shapes_of, structure_of
from sora_jax.models.text_encoder import TextEncoder
from sora_jax.training.numbered_batches import NumberedBatches
from sora_jax.training.pretrained import load_modules
from sora_jax.training.stage import Context, Stage, mean_over
from sora_jax.training.text_step import (
    Anchor,
    Captions,
    Reader,
    TextModules,
    make_text_step,
    reading_loss,
    world_captions,
)

if TYPE_CHECKING:
    from sora_jax.config import DataConfig


@dataclass(frozen=True)
class CaptionBatch:
    """`caption_batch(number)` is this part of a batch: `rows` captions and what they say."""

    data: DataConfig
    rows: int
    part: int
    parts: int

    def __call__(self, number: int) -> Captions:
        data, first = self.data, (number * self.parts + self.part) * self.rows
        return world_captions(data.seed, first, self.rows, data.row_text, data.mix)


def text_stage(context: Context) -> Stage:
    config, data = context.config, context.config.data
    if data.source != "world":
        raise UserError(f"only captions of the world come with what they say: data.source is {data.source}, not world")
    counts = answer_counts(data.mix)
    modules = TextModules(
        text_encoder=structure_of(lambda rngs: TextEncoder(config.text_encoder, rngs=rngs)),
        reader=structure_of(lambda rngs: Reader(config.text_encoder.d_model, counts, rngs=rngs)),
    )

    def make_params(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key)
        return {
            "text_encoder": parameters_of(TextEncoder(config.text_encoder, rngs=nnx.Rngs(params=keys[0]))),
            "reader": parameters_of(Reader(config.text_encoder.d_model, counts, rngs=nnx.Rngs(params=keys[1]))),
        }

    anchor = None
    if config.reading.anchor:
        if not config.train.init:
            raise UserError("reading.anchor holds embeddings near those of another text encoder: name it in train.init")
        shapes = {"text_encoder": shapes_of(lambda rngs: TextEncoder(config.text_encoder, rngs=rngs))}
        there = load_modules(config.train.init, shapes, context.mesh).params
        anchor = Anchor(there["text_encoder"], config.reading.anchor)

    validate = None
    if data.held_out:
        rows = config.train.batch_size
        placed = [
            jax.device_put(
                world_captions(data.seed, first, rows, data.row_text, data.mix, split="heldout", dense=False),
                sharding.batch_sharding(context.mesh),
            )
            for first in range(0, data.held_out, rows)
        ]

        @jax.jit
        def read(params: Any, captions: Captions, anchor: Anchor | None) -> dict[str, jax.Array]:
            loss, shares = reading_loss(modules, params, captions, anchor=anchor, dtype=context.dtype)
            return {"loss": loss, **shares}

        validate = mean_over(partial(read, anchor=anchor), placed)
    step = make_text_step(
        modules,
        context.optimizer,
        clip_norm=config.optimizer.clip_norm,
        spike_sigmas=config.optimizer.spike_sigmas,
        ema_decay=config.train.ema,
        dtype=context.dtype,
        accumulate=config.train.accumulate,
    )
    return Stage(
        make_params=make_params,
        step=partial(step, anchor=anchor),
        batches=NumberedBatches(
            CaptionBatch(data, context.local_rows, *context.part),
            {"world": data.seed},
            workers=data.workers,
            stalled_seconds=data.stalled_seconds,
        ),
        data=[{"world": "train", "seed": data.seed, **({} if data.mix.plain else {"mix": data.mix.identity})}],
        describe=f"{config.train.batch_size} captions x {data.row_text} bytes",
        tokens_per_step=config.train.batch_size * data.row_text,
        validate=validate,
    )
