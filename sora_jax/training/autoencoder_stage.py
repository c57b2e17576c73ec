"""The autoencoder stage: clips -> reconstruction loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax import sharding
from sora_jax.errors import UserError
from sora_jax.models.autoencoder import Autoencoder
from sora_jax.models.structure import parameters_of, structure_of
from sora_jax.shapes import Extent, latent_extent
from sora_jax.training.autoencoder_step import DECODER, MODULE, make_autoencoder_step
from sora_jax.training.clip_batches import ClipBatches, ClipSource, clip_source
from sora_jax.training.files import write_text
from sora_jax.training.pretrained import LATENT_STATISTICS, load_autoencoder
from sora_jax.training.samples import autoencoder_sampler
from sora_jax.training.stage import Context, Stage, mean_over

STATISTICS_CLIPS = 128
VALIDATION_CLIPS = 32  # or so: whole batches, so that runs of small and large ones compare


def autoencoder_stage(context: Context) -> Stage:
    config, data = context.config, context.config.data
    if not config.reconstruction.train_encoder and not config.train.init:
        raise UserError("reconstruction.train_encoder=False keeps an encoder as it is: name its model in train.init")
    graphdef = structure_of(lambda rngs: Autoencoder(config.autoencoder, rngs=rngs))
    source = clip_source(data, config.autoencoder.stride.time)
    latent_extent(Extent(data.frames, data.height, data.width), config.autoencoder.stride)
    batches = ClipBatches(
        source,
        data,
        context.local_rows,
        time_stride=config.autoencoder.stride.time,
        **context.part._asdict(),
    )
    step = make_autoencoder_step(
        graphdef,
        config.autoencoder,
        context.optimizer,
        config.reconstruction,
        clip_norm=config.optimizer.clip_norm,
        spike_sigmas=config.optimizer.spike_sigmas,
        ema_decay=config.train.ema,
        dtype=context.dtype,
        accumulate=config.train.accumulate,
    )
    validate = sample = None
    if data.held_out:
        rows = config.train.batch_size
        count = -(-min(data.held_out, VALIDATION_CLIPS) // rows)
        clips = source.held_out(count * rows)
        placed = [jax.device_put(part, sharding.batch_sharding(context.mesh)) for part in np.split(clips, count)]
        validate = mean_over(_make_autoencoder_validation(graphdef, context.dtype), placed)
        sample = autoencoder_sampler(graphdef, clips[:4], context.dtype)
    return Stage(
        make_params=lambda key: {MODULE: parameters_of(Autoencoder(config.autoencoder, rngs=nnx.Rngs(params=key)))},
        step=step,
        batches=batches,
        data=[source.manifest],
        describe=f"{config.train.batch_size} clips of {data.frames} frames, {data.height}x{data.width}",
        validate=validate,
        sample=sample,
        may_start_anew=() if config.reconstruction.train_encoder else DECODER,
        describe_checkpoint=_make_statistics(context, graphdef, source),
    )


def _make_statistics(context: Context, graphdef: nnx.GraphDef, source: ClipSource) -> Callable[[Any], None]:
    """`write(params)` measures mean and standard deviation of each latent channel over `STATISTICS_CLIPS` clips and
    writes them to WORKDIR/latents.json, from where `load_autoencoder` takes them: the diffusion stage wants latents of
    unit scale. An encoder that is not trained keeps the statistics it came with."""
    rows, kept = context.config.train.batch_size, {}
    if not context.config.reconstruction.train_encoder:
        before, _ = load_autoencoder(context.config.train.init)
        kept = {"mean": before.latents_mean, "std": before.latents_std}

    @jax.jit
    def encode(params: Any, clips: jax.Array) -> jax.Array:
        video = clips.astype(jnp.float32) / 127.5 - 1.0
        return nnx.merge(graphdef, params[MODULE]).encode(video).mean

    def measure(params: Any) -> dict[str, Any]:
        first = 2**20  # batches that a run does not reach
        means = [
            np.asarray(encode(params, jax.device_put(source.draw(first + i, rows, False))), np.float64)
            for i in range(-(-STATISTICS_CLIPS // rows))
        ]
        values = np.concatenate(means).reshape(-1, means[0].shape[-1])
        return {"mean": values.mean(axis=0).tolist(), "std": values.std(axis=0).tolist()}

    def write(params: Any) -> None:
        statistics = kept or measure(params)
        if jax.process_index() == 0:
            write_text(context.workdir / LATENT_STATISTICS, json.dumps(statistics, indent=2) + "\n")

    return write


def _make_autoencoder_validation(graphdef: nnx.GraphDef, dtype: jnp.dtype) -> Callable[..., dict[str, jax.Array]]:
    """Of the reconstruction from the posterior's mean: L1 in [-1, 1] units, and PSNR in dB, the mean over clips."""

    def validate(params: Any, clips: jax.Array) -> dict[str, jax.Array]:
        video = clips.astype(jnp.float32) / 127.5 - 1.0
        model = nnx.merge(graphdef, params[MODULE])
        error = model.decode(model.encode(video.astype(dtype)).mean).astype(jnp.float32) - video
        squared = jnp.mean(error * error, axis=(1, 2, 3, 4))
        return {"loss": jnp.mean(jnp.abs(error)), "psnr": jnp.mean(10.0 * jnp.log10(4.0 / jnp.maximum(squared, 1e-12)))}

    return jax.jit(validate)
