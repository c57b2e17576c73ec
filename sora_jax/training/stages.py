"""The stages of training, as the loop sees them: parameters, a step, batches, a validation and samples.

autoencoder   clips ──────────────────────► reconstruction loss
text          captions ───────────────────► what they say; the text encoder learns to read
diffusion     cached latents, packed rows ► velocity loss; text encoder and transformer together
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from sora_jax import sharding
from sora_jax.config import Config
from sora_jax.data.latents import LatentSource
from sora_jax.data.loader import make_loader
from sora_jax.data.sources import Clips, FolderSource, WorldClips
from sora_jax.errors import UserError
from sora_jax.models.autoencoder import Autoencoder
from sora_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from sora_jax.models.tokenizer import ByteTokenizer
from sora_jax.models.transformer import Transformer, TransformerConfig
from sora_jax.shapes import Extent, latent_extent
from sora_jax.tokens.packing import PackedRows
from sora_jax.training.autoencoder_step import MODULE, make_autoencoder_step
from sora_jax.training.clip_batches import ClipBatches, ClipSource, clip_source
from sora_jax.training.diffusion_step import DiffusionModules, make_diffusion_step, make_diffusion_validation
from sora_jax.training.encoding import encode_clips
from sora_jax.training.files import write_text
from sora_jax.training.numbered_batches import NumberedBatches
from sora_jax.training.pretrained import LATENT_STATISTICS, load_autoencoder
from sora_jax.training.samples import autoencoder_sampler, diffusion_sampler
from sora_jax.training.state import TrainState
from sora_jax.training.text_step import (
    Captions,
    Reader,
    TextModules,
    make_text_step,
    reading_loss,
    world_captions,
)

VALIDATION_BATCHES = 2
STATISTICS_CLIPS = 128
Videos = list[np.ndarray]  # uint8 [T, H, W, 3] each


@runtime_checkable
class Batches(Protocol):
    """An endless iterator that can say where it is and be put there again; `state` fits into JSON."""

    def __next__(self) -> Any: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Context:
    """What a stage is built from."""

    config: Config
    workdir: epath.Path
    mesh: Mesh
    optimizer: optax.GradientTransformation
    dtype: jnp.dtype
    say: Callable[[str], None]

    @property
    def local_rows(self) -> int:
        """Of a batch, how many are made by this process."""
        return self.config.train.batch_size // jax.process_count()


@dataclass(frozen=True)
class Stage:
    """`batches` yield numpy trees, whose first axis is this process's rows; `step` takes them as arrays of the mesh."""

    make_params: Callable[[jax.Array], Mapping[str, Any]]
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    batches: Batches
    describe: str  # of a batch, for people
    tokens_per_step: int = 0
    flops_per_step: float = 0.0  # forward and backward, by formula; 0 = not known
    validate: Callable[[Any], dict[str, jax.Array]] | None = None  # of params, usually the average
    sample: Callable[[Any], Videos] | None = None
    describe_checkpoint: Callable[[Any], None] | None = None  # of the averages, before each checkpoint


MakeStage = Callable[[Context], Stage]


# ----------------------------------------------------------------------------------------------------------- diffusion


def diffusion_stage(context: Context) -> Stage:
    config, data = context.config, context.config.data
    transformer, text_encoder = config.transformer, config.text_encoder
    if transformer.text_dim != text_encoder.d_model:
        raise UserError(
            f"transformer.text_dim {transformer.text_dim} is not the width of the text encoder's output "
            f"(text_encoder.d_model {text_encoder.d_model})"
        )
    folder = data.latents or make_latents(context)
    source = LatentSource(folder, stop=-data.held_out or None)
    if source.info.channels != transformer.in_channels:
        raise UserError(
            f"the latents in {folder} have {source.info.channels} channels and transformer.in_channels is "
            f"{transformer.in_channels}"
        )
    tokenizer = ByteTokenizer()
    loader_options: dict[str, Any] = {
        "tokenize": tokenizer.encode,
        "row_tokens": data.row_tokens,
        "row_text": data.row_text,
        "row_groups": data.groups,
        "patch": transformer.patch,
        "seed": data.seed,
        "image_share": data.image_share,
        "prefix_share": data.prefix_share,
        "skip_long_captions": data.skip_long_captions,
    }
    batches = make_loader(
        source,
        rows=context.local_rows,
        caption_dropout=data.caption_dropout,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=data.workers,
        **loader_options,
    )
    modules = DiffusionModules(
        transformer=_structure(lambda rngs: Transformer(transformer, rngs=rngs)),
        text_encoder=_structure(lambda rngs: TextEncoder(text_encoder, rngs=rngs)),
    )

    def make_params(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key)
        return {
            "transformer": _parameters(Transformer(transformer, rngs=nnx.Rngs(params=keys[0]))),
            "text_encoder": _parameters(TextEncoder(text_encoder, rngs=nnx.Rngs(params=keys[1]))),
        }

    step = make_diffusion_step(
        modules,
        context.optimizer,
        config.levels,
        clip_norm=config.optimizer.clip_norm,
        ema_decay=config.train.ema,
        dtype=context.dtype,
    )
    validate = None
    if data.held_out:
        validate = _mean_over(
            make_diffusion_validation(modules, jax.random.key(0), dtype=context.dtype),
            _held_out_rows(LatentSource(folder, start=-data.held_out), context, loader_options),
        )
    rows = config.train.batch_size
    return Stage(
        make_params=make_params,
        step=step,
        batches=_Packed(batches),
        describe=f"{rows} rows x {data.row_tokens} tokens from {len(source)} clips",
        tokens_per_step=rows * data.row_tokens,
        flops_per_step=3.0 * rows * diffusion_flops(transformer, text_encoder, data.row_tokens, data.row_text),
        validate=validate,
        sample=diffusion_sampler(context, modules, tokenizer),
    )


def make_latents(context: Context) -> epath.Path:
    """WORKDIR/latents, encoded now as far as it is not yet: for a run whose config names no latent cache."""
    data, folder = context.config.data, context.workdir / "latents"
    config, params = load_autoencoder(data.autoencoder)
    size: dict[str, Any] = {"frames": data.frames, "height": data.height, "width": data.width}
    source: Clips
    if data.source == "world":
        source = WorldClips(data.clips, seed=data.seed, sizes=data.sizes, **size)
    else:
        source = FolderSource(data.source, fps=data.fps, step=config.stride.time, **size)
    said = -1

    def progress(done: int, total: int) -> None:
        nonlocal said
        if done < total and 20 * done // total > said:
            said = 20 * done // total
            context.say(f"encoding {data.source} to {folder}: {done} of {total} clips")

    if jax.process_count() > 1:
        raise UserError("with several processes, encode first (sora-jax encode) and name the cache in data.latents")
    encode_clips(
        source, config, params, folder, name=data.autoencoder, dtype=context.dtype, mesh=context.mesh, progress=progress
    )
    return folder


class _Packed:
    """A loader's dicts as `PackedRows`."""

    def __init__(self, loader: Any):
        self._loader = loader
        self.state, self.restore, self.close = loader.state, loader.restore, loader.close

    def __next__(self) -> PackedRows:
        return PackedRows(**next(self._loader))


def _held_out_rows(source: LatentSource, context: Context, options: Mapping[str, Any]) -> list[PackedRows]:
    """The same few batches of clips that are not trained on, at every validation of every run."""
    with make_loader(
        source, rows=context.config.train.batch_size, shuffle=False, epochs=1, **{**options, "seed": 0}
    ) as loader:
        return [
            jax.device_put(PackedRows(**batch), sharding.batch_sharding(context.mesh))
            for _, batch in zip(range(VALIDATION_BATCHES), loader, strict=False)
        ]


def diffusion_flops(transformer: TransformerConfig, text: TextEncoderConfig, tokens: int, text_tokens: int) -> float:
    """Floating-point operations of a row's forward pass: matrix products and attention, of padding too."""
    N, L, D, ff = tokens, text_tokens, transformer.dim, transformer.ffn_dim
    patch = math.prod(transformer.patch)
    # a layer: self-attention 4 D^2, cross-attention 2 D^2 and its text 2 D^2, MLP 2 D ff; scores and their values
    layer = 2 * N * (6 * D**2 + 2 * D * ff) + 4 * L * D**2 + 4 * N * N * D + 4 * N * L * D
    borders = 2 * N * D * patch * (transformer.in_channels + transformer.out_channels)
    borders += 2 * L * (transformer.text_dim * D + D * D)
    inner = text.num_heads * text.d_kv
    text_layer = 2 * L * (4 * text.d_model * inner + 3 * text.d_model * text.d_ff) + 4 * L * L * inner
    return float(transformer.n_layers * layer + borders + text.num_layers * text_layer)


# --------------------------------------------------------------------------------------------------------- autoencoder


def autoencoder_stage(context: Context) -> Stage:
    config, data = context.config, context.config.data
    if not config.reconstruction.train_encoder and not config.train.init:
        raise UserError("reconstruction.train_encoder=False keeps an encoder as it is: name its model in train.init")
    graphdef = _structure(lambda rngs: Autoencoder(config.autoencoder, rngs=rngs))
    source = clip_source(data, config.autoencoder.stride.time)
    latent_extent(Extent(data.frames, data.height, data.width), config.autoencoder.stride)
    batches = ClipBatches(
        source,
        data,
        context.local_rows,
        time_stride=config.autoencoder.stride.time,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    step = make_autoencoder_step(
        graphdef,
        config.autoencoder,
        context.optimizer,
        config.reconstruction,
        clip_norm=config.optimizer.clip_norm,
        ema_decay=config.train.ema,
        dtype=context.dtype,
    )
    validate = sample = None
    if data.held_out:
        clips = source.held_out(config.train.batch_size)
        placed = [jax.device_put(clips, sharding.batch_sharding(context.mesh))]
        validate = _mean_over(_make_autoencoder_validation(graphdef, context.dtype), placed)
        sample = autoencoder_sampler(graphdef, clips[:4], context.dtype)
    return Stage(
        make_params=lambda key: {MODULE: _parameters(Autoencoder(config.autoencoder, rngs=nnx.Rngs(params=key)))},
        step=step,
        batches=batches,
        describe=f"{config.train.batch_size} clips of {data.frames} frames, {data.height}x{data.width}",
        validate=validate,
        sample=sample,
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


# ---------------------------------------------------------------------------------------------------------------- text


def text_stage(context: Context) -> Stage:
    config, data = context.config, context.config.data
    if data.source != "world":
        raise UserError(f"only captions of the world come with what they say: data.source is {data.source}, not world")
    rows = context.local_rows
    modules = TextModules(
        text_encoder=_structure(lambda rngs: TextEncoder(config.text_encoder, rngs=rngs)),
        reader=_structure(lambda rngs: Reader(config.text_encoder.d_model, rngs=rngs)),
    )

    def make_params(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key)
        return {
            "text_encoder": _parameters(TextEncoder(config.text_encoder, rngs=nnx.Rngs(params=keys[0]))),
            "reader": _parameters(Reader(config.text_encoder.d_model, rngs=nnx.Rngs(params=keys[1]))),
        }

    def batch(number: int) -> Captions:
        part = number * jax.process_count() + jax.process_index()
        return world_captions(data.seed, part * rows, rows, data.row_text)

    validate = None
    if data.held_out:
        captions = world_captions(data.seed, 0, rows, data.row_text, split="heldout", dense=False)
        placed = [jax.device_put(captions, sharding.batch_sharding(context.mesh))]

        @jax.jit
        def read(params: Any, captions: Captions) -> dict[str, jax.Array]:
            loss, shares = reading_loss(modules, params, captions, context.dtype)
            return {"loss": loss, **shares}

        validate = _mean_over(read, placed)
    step = make_text_step(
        modules,
        context.optimizer,
        clip_norm=config.optimizer.clip_norm,
        ema_decay=config.train.ema,
        dtype=context.dtype,
    )
    return Stage(
        make_params=make_params,
        step=step,
        batches=NumberedBatches(batch, {"world": data.seed, "processes": jax.process_count()}),
        describe=f"{config.train.batch_size} captions x {data.row_text} bytes",
        tokens_per_step=config.train.batch_size * data.row_text,
        validate=validate,
    )


# ------------------------------------------------------------------------------------------------------------- helpers


def _structure(make: Callable[[nnx.Rngs], nnx.Module]) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), graph=False)[0]


def _parameters(module: nnx.Module) -> nnx.State:
    return nnx.split(module, graph=False)[1]


def _mean_over(
    validate: Callable[..., dict[str, jax.Array]], batches: list[Any]
) -> Callable[[Any], dict[str, jax.Array]]:
    def mean(params: Any) -> dict[str, jax.Array]:
        return jax.tree.map(
            lambda *values: jnp.mean(jnp.stack(values)), *[validate(params, batch) for batch in batches]
        )

    return mean


STAGES: Mapping[str, MakeStage] = {"autoencoder": autoencoder_stage, "text": text_stage, "diffusion": diffusion_stage}
