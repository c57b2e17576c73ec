"""The diffusion stage: cached latents, packed rows -> velocity loss; text encoder and transformer together."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from etils import epath
from flax import nnx

from sora_jax import sharding
from sora_jax.config import Config
from sora_jax.data.latents import LatentSource
from sora_jax.data.loader import Loader, make_loader
from sora_jax.data.sources import Clips, FolderSource, WorldClips
from sora_jax.data.stream import LoaderOptions
from sora_jax.errors import UserError
from sora_jax.models.structure import parameters_of, structure_of
from sora_jax.models.text_encoder import TextEncoderConfig
from sora_jax.models.tokenizer import ByteTokenizer, Tokenizer
from sora_jax.models.transformer import TransformerConfig
from sora_jax.runtime import reaches_host_memory
from sora_jax.shapes import Stride, latent_extent, token_extent
from sora_jax.tokens.packing import PackedRows
from sora_jax.tokens.planning import ClipShape, misfit, quadratic_share
from sora_jax.training.adapters import learning, networks
from sora_jax.training.diffusion_step import DiffusionModules, make_diffusion_step
from sora_jax.training.diffusion_validation import make_diffusion_validation
from sora_jax.training.encoding import encode_clips
from sora_jax.training.pretrained import (
    abstract_modules,
    levels_of,
    load_autoencoder,
    load_kept,
    load_start,
    tokenizer_of,
)
from sora_jax.training.samples import diffusion_sampler
from sora_jax.training.stage import Context, Stage, Work, mean_over

VALIDATION_BATCHES = 2


def diffusion_stage(context: Context) -> Stage:
    config, data = context.config, context.config.data
    transformer, text_encoder = config.transformer, config.text_encoder
    if transformer.text_dim != text_encoder.d_model:
        raise UserError(
            f"transformer.text_dim {transformer.text_dim} is not the width of the text encoder's output "
            f"(text_encoder.d_model {text_encoder.d_model})"
        )
    device = context.mesh.local_devices[0]
    if transformer.remat == "offload" and not reaches_host_memory(device):
        raise UserError(
            f"transformer.remat=offload keeps activations in the host's memory, which programs of {device.device_kind} "
            "cannot reach with this JAX; transformer.remat=full takes the next least"
        )
    # What can be wrong is found before clips are encoded, which may take hours.
    LoaderOptions(**loader_options(config))
    make = networks(config)
    modules = DiffusionModules(**{name: structure_of(network) for name, network in make.items()})
    tokenizer = caption_tokenizer(config)
    kept = load_kept(config, context.mesh, context.dtype)
    sample = diffusion_sampler(context, modules, tokenizer, kept)
    folder = data.latents or make_latents(context)
    source = open_latents(config, folder)
    batches = make_loader(
        source,
        tokenize=tokenizer.places,
        **loader_options(config),
        **context.part._asdict(),
        workers=data.workers,
        stalled_seconds=data.stalled_seconds,
    )

    def make_params(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key)
        drawn = {
            name: parameters_of(network(nnx.Rngs(params=key)))
            for (name, network), key in zip(make.items(), keys, strict=True)
        }
        return learning(config, drawn)[0]

    levels = levels_of(config)
    step = make_diffusion_step(
        modules,
        context.optimizer,
        levels,
        clip_norm=config.optimizer.clip_norm,
        spike_sigmas=config.optimizer.spike_sigmas,
        ema_decay=config.train.ema,
        dtype=context.dtype,
        accumulate=config.train.accumulate,
        route_share=config.transformer.route_share,
    )
    validate = None
    if data.held_out:
        validate = mean_over(
            partial(make_diffusion_validation(modules, levels, jax.random.key(0), dtype=context.dtype), kept=kept),
            _held_out_rows(LatentSource(folder, start=-data.held_out), context, tokenizer),
        )
    rows = config.train.batch_size

    def work(batch: PackedRows) -> Work:
        tokens, text = batch.tokens.shape[1], batch.text_tokens.shape[1]
        return Work(rows * tokens, 3.0 * rows * diffusion_flops(transformer, text_encoder, tokens, text))

    def gauges() -> dict[str, float]:
        stats = batches.stats
        left_out = {name.replace(" ", "_"): float(count) for name, count in stats.left_out.items()}
        found = {"epoch": stats.epoch, "clips": float(stats.clips), "unreadable": float(stats.bad_records), **left_out}
        if stats.fill is not None and stats.imbalance is not None:
            found |= {"fill": stats.fill.tokens, "imbalance": stats.imbalance}
        return {f"data_{name}": value for name, value in found.items()}

    return Stage(
        make_params=make_params,
        step=partial(step, kept=kept),
        batches=_Packed(batches, context.say),
        data=source.manifests,
        describe=f"{rows} rows x {'up to ' * (data.packing == 'buckets')}{data.row_tokens} tokens, {data.packing}, "
        f"from {len(source)} clips",
        work=work,
        gauges=gauges,
        describe_data=lambda: str(batches.stats),
        validate=validate,
        sample=sample,
        kept=tuple(kept),
        may_start_anew=parts_begun_anew(config),
    )


def parts_begun_anew(config: Config) -> tuple[str, ...]:
    """What of the transformer may have other shapes in `train.init`: what has to do with the values of a token."""
    return ("patch_embed", "head") if config.train.other_latents else ()


def open_latents(config: Config, folder: epath.PathLike) -> LatentSource:
    """The clips of the cache in `folder` that are trained on."""
    source, channels = LatentSource(folder, stop=-config.data.held_out or None), config.transformer.in_channels
    if source.info.channels != channels:
        raise UserError(
            f"the latents in {folder} have {source.info.channels} channels and transformer.in_channels is {channels}"
        )
    return source


def caption_tokenizer(config: Config) -> Tokenizer:
    """Of the model that is tuned, or bytes."""
    return tokenizer_of(config.train.init) if config.train.learns != "all" else ByteTokenizer()


def loader_options(config: Config) -> dict[str, Any]:
    """What decides which batches there are, besides the source and the tokenizer (`data.loader.make_loader`)."""
    data, transformer = config.data, config.transformer
    same = ["seed", "image_share", "prefix_share", "window_share", "caption_dropout", "shot_dropout", "row_tokens"]
    same += ["row_text", "skip_long_captions", "skip_misfits", "packing", "look_ahead", "plan_steps"]
    return {
        **{name: getattr(data, name) for name in same},
        "rows": config.train.batch_size,
        "row_groups": data.groups,
        "patch": transformer.patch,
        "quadratic": quadratic_share(transformer.dim, transformer.ffn_dim),
    }


def make_latents(context: Context) -> epath.Path:
    """WORKDIR/latents, encoded now as far as it is not yet: for a run whose config names no latent cache."""
    data, folder = context.config.data, context.workdir / "latents"
    config, params = load_autoencoder(data.autoencoder)
    size: dict[str, Any] = {"frames": data.frames, "height": data.height, "width": data.width}
    source: Clips
    if data.source == "world":
        source = WorldClips(data.clips, seed=data.seed, sizes=data.sizes, shots=data.shots, mix=data.mix, **size)
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
    if isinstance(source, WorldClips):  # those of a folder may all be shorter than they could be
        _refuse_large_clips(context.config, source, config.stride)
    if not (context.workdir / "config.json").exists():  # a run that has begun has what it started from
        modules, may_differ = abstract_modules(context.config), parts_begun_anew(context.config)
        load_start(context.config, modules, context.mesh, may_differ=may_differ, say=lambda line: None)
    encode_clips(
        source,
        config,
        params,
        folder,
        name=data.autoencoder,
        dtype=context.dtype,
        workers=data.workers,
        mesh=context.mesh,
        progress=progress,
    )
    return folder


def _refuse_large_clips(config: Config, source: Clips, stride: Stride) -> None:
    """Clips that no row of the transformer will hold need not be encoded first."""
    data, patch = config.data, config.transformer.patch
    for extent in source.extents:
        tokens = token_extent(latent_extent(extent, stride, patch), patch)
        shape = ClipShape(tokens.volume, 1, tokens.frames)
        fault = misfit(shape, ClipShape(data.row_tokens, data.row_text, data.groups))
        if fault and not data.skip_misfits:
            raise UserError(f"a clip of {extent.frames} frames, {extent.height}x{extent.width}, has {fault} (in data)")


class _Packed:
    """A loader's dicts as `PackedRows`."""

    def __init__(self, loader: Loader, say: Callable[[str], None]):
        self._loader, self._say, self._bad = loader, say, 0
        self.state, self.restore, self.close = loader.state, loader.restore, loader.close

    def __next__(self) -> PackedRows:
        rows = PackedRows(**next(self._loader))
        if (bad := self._loader.stats.bad_records) > self._bad:
            self._bad = bad
            self._say(f"{bad} records of the latent cache cannot be read and are left out")
        return rows


def _held_out_rows(source: LatentSource, context: Context, tokenizer: Tokenizer) -> list[PackedRows]:
    """The same few batches of clips that are not trained on, at every validation of every run."""
    fixed = {"seed": 0, "caption_dropout": 0.0, "shot_dropout": 0.0, "plan_steps": 1}
    options = {**loader_options(context.config), **fixed}
    with make_loader(source, tokenize=tokenizer.places, shuffle=False, epochs=1, **options) as loader:
        return [
            jax.device_put(PackedRows(**batch), sharding.batch_sharding(context.mesh))
            for _, batch in zip(range(VALIDATION_BATCHES), loader, strict=False)
        ]


def diffusion_flops(transformer: TransformerConfig, text: TextEncoderConfig, tokens: int, text_tokens: int) -> float:
    """Floating-point operations of a row's forward pass in training: matrix products and attention, of padding too."""
    N, L, D, ff = tokens, text_tokens, transformer.dim, transformer.ffn_dim
    patch = math.prod(transformer.patch)

    def layer(N: int) -> int:
        # self-attention 4 D^2, cross-attention 2 D^2 and its text 2 D^2, MLP 2 D ff; scores and their values
        return 2 * N * (6 * D**2 + 2 * D * ff) + 4 * L * D**2 + 4 * N * N * D + 4 * N * L * D

    around = sum(transformer.route_around) if transformer.route_share else transformer.n_layers
    layers = around * layer(N) + (transformer.n_layers - around) * layer(N - round(transformer.route_share * N))
    borders = 2 * N * D * patch * (transformer.in_channels + transformer.out_channels)
    borders += 2 * L * (transformer.text_dim * D + D * D)
    inner = text.num_heads * text.d_kv
    text_layer = 2 * L * (4 * text.d_model * inner + 3 * text.d_model * text.d_ff) + 4 * L * L * inner
    return float(layers + borders + text.num_layers * text_layer)
