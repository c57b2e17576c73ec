"""The causal 3-D video autoencoder: 1 + stride.time * k frames <-> 1 + k latents (Wan, arXiv:2503.20314, section 4.1).

One class for both open forms, by config: 2.1 (convolutional resampling) and 2.2 (`patch_size`: pixels are folded into
channels first; `is_residual`: resampling blocks have parameter-free shortcuts; a decoder wider than the encoder).

It is a stream. `encode` and `decode` take a clip whole; `encode_first`, `encode_chunk`, `decode_first` and
`decode_chunk` take it in pieces with an explicit memory, and make the same result. `encode_stream` and `decode_stream`
run the pieces over a clip of any duration, in memory that does not grow with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Key

from sora_jax.errors import UserError, nearest
from sora_jax.models import layers
from sora_jax.models.autoencoder_blocks import DownBlock, MiddleBlock, UpBlock
from sora_jax.models.causal_conv import KERNEL_AXES, CausalConv, ChannelNorm, Past, split_past
from sora_jax.pytrees import pytree
from sora_jax.shapes import Extent, Stride, latent_extent
from sora_jax.sharding import constrain, mesh_size

ACTIVATION_AXES = ("batch", "frames", "rows", "columns", None)


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of an autoencoder; the defaults are the open 2.1 model. Field names are those of its config file."""

    base_dim: int = 96
    decoder_base_dim: int | None = None  # None: as base_dim
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)  # width of each level; every step to the next halves height and width
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()  # attention outside the middle block: no open model has it, nor have we
    temperal_downsample: tuple[bool, ...] = (False, True, True)  # which of those steps halve the frame rate too
    dropout: float = 0.0
    latents_mean: tuple[float, ...] | None = None  # per channel; None: zeros
    latents_std: tuple[float, ...] | None = None  # None: ones
    is_residual: bool = False
    patch_size: int | None = None  # side of the pixel square folded into channels; None: 1
    decoder_dim_mult: tuple[int, ...] | None = None  # None: as dim_mult; no open model has another

    def __post_init__(self) -> None:
        widths = [self.base_dim, self.z_dim, *self.dim_mult]
        if min(widths) < 1 or self.num_res_blocks < 0:
            raise UserError(
                f"base_dim {self.base_dim}, z_dim {self.z_dim} and dim_mult {self.dim_mult} must be >= 1, and "
                f"num_res_blocks {self.num_res_blocks} >= 0"
            )
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise UserError(
                f"temperal_downsample has {len(self.temperal_downsample)} entries for {len(self.dim_mult)} levels; "
                f"it needs {len(self.dim_mult) - 1}, one for each step between levels"
            )
        if self.decoder_dim_mult is not None and len(self.decoder_dim_mult) != len(self.dim_mult):
            raise UserError(
                f"decoder_dim_mult has {len(self.decoder_dim_mult)} entries; it needs one for each of the "
                f"{len(self.dim_mult)} levels of dim_mult"
            )
        for name in ("latents_mean", "latents_std"):
            value = getattr(self, name)
            if value is not None and len(value) != self.z_dim:
                raise UserError(f"{name} has {len(value)} entries; it needs one for each of the {self.z_dim} channels")
        if self.attn_scales:
            raise UserError(f"attn_scales {self.attn_scales} is not supported: only the middle block attends; use []")
        if self.is_residual:
            self._check_shortcuts()

    def _check_shortcuts(self) -> None:
        """Shortcuts have no parameters, so the widths of a level and the next must divide each other."""
        last = len(self.dim_mult) - 1
        for level, (narrow, wide) in enumerate(zip((1, *self.dim_mult), self.dim_mult, strict=False)):
            factor = 1 if level == last else 4 * (1 + self.temperal_downsample[level])
            if narrow * factor % wide:
                raise UserError(
                    f"dim_mult {self.dim_mult} cannot have residual shortcuts: level {level} goes from {narrow} to "
                    f"{wide} times the base width by averaging {factor} pixels, and {wide} must divide "
                    f"{narrow} x {factor}; the last two entries must be equal"
                )
        if (mult := self.decoder_dim_mult) is None:
            return
        for level in range(1, last):
            factor = 4 * (1 + self.temperal_downsample[level - 1])
            if mult[level] * factor % mult[level + 1]:
                raise UserError(
                    f"decoder_dim_mult {mult} cannot have residual shortcuts: level {level} repeats {mult[level + 1]} "
                    f"times the base width into {factor} pixels of {mult[level]} times; {mult[level + 1]} must divide "
                    f"{mult[level]} x {factor}"
                )

    @property
    def stride(self) -> Stride:
        side = (self.patch_size or 1) * 2 ** (len(self.dim_mult) - 1)
        return Stride(2 ** sum(self.temperal_downsample), side, side)

    @property
    def pixel_channels(self) -> int:
        """Channels after pixels are folded: what `in_channels` and `out_channels` are in a config file."""
        return 3 * (self.patch_size or 1) ** 2

    def to_dict(self) -> dict[str, Any]:
        """The content of `vae/config.json`, without the class name."""
        values = {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }
        if self.decoder_dim_mult is None:
            del values["decoder_dim_mult"]  # `diffusers` does not know it
        return values | {
            "latents_mean": list(self.latents_mean or (0.0,) * self.z_dim),
            "latents_std": list(self.latents_std or (1.0,) * self.z_dim),
            "in_channels": self.pixel_channels,
            "out_channels": self.pixel_channels,
            "scale_factor_temporal": self.stride.time,
            "scale_factor_spatial": self.stride.height,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AutoencoderConfig:
        """Read `vae/config.json`. Keys starting with "_" are the writer's notes; the scale factors are derived, so a
        file may leave them out or hold another model's. Raises `UserError` on a key or channel count we do not have."""
        values = {key: value for key, value in values.items() if not key.startswith("_")}
        derived = {name: values.pop(name, None) for name in ("in_channels", "out_channels")}
        values = {key: value for key, value in values.items() if not key.startswith("scale_factor_")}
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise UserError(f'unknown autoencoder config key "{key}": {nearest(key, known)}')
        # JSON has no tuples, and a frozen config must hash.
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        config = cls(**fields)
        for name, count in derived.items():
            if count is not None and count != config.pixel_channels:
                raise UserError(
                    f"autoencoder config has {name} {count}; patch_size {config.patch_size} "
                    f"means {config.pixel_channels} (red, green, blue of every folded pixel)"
                )
        return config


@pytree
@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian for every latent, before normalisation; `logvar` is clipped to [-30, 20]."""

    mean: Float[Array, "B F h w C"]
    logvar: Float[Array, "B F h w C"]

    def sample(self, key: Key[Array, ""]) -> Float[Array, "B F h w C"]:
        return self.at(jax.random.normal(key, self.mean.shape, self.mean.dtype))

    def at(self, noise: Float[Array, "B F h w C"]) -> Float[Array, "B F h w C"]:
        """The sample that unit noise draws."""
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def kl(self) -> Float[Array, ""]:
        """Divergence from the unit Gaussian in nats, mean over all latent values; float32."""
        mean, logvar = self.mean.astype(jnp.float32), self.logvar.astype(jnp.float32)
        return 0.5 * jnp.mean(mean * mean + jnp.exp(logvar) - 1.0 - logvar)


# --- encoder and decoder -------------------------------------------------------------------------------------------


class Encoder(nnx.Module):
    """Folded pixels [B, T, H, W, pixel_channels] -> moments [B, F, h, w, 2 z_dim]."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths = [config.base_dim * mult for mult in (1, *config.dim_mult)]
        last = len(config.dim_mult) - 1
        self.conv_in = CausalConv(config.pixel_channels, widths[0], rngs=rngs)
        self.down_blocks = nnx.List(
            DownBlock(
                widths[i],
                widths[i + 1],
                config.num_res_blocks,
                space=i < last,
                time=i < last and config.temperal_downsample[i],
                shortcut=config.is_residual,
                rngs=rngs,
            )
            for i in range(len(config.dim_mult))
        )
        self.middle = MiddleBlock(widths[-1], rngs=rngs)
        self.norm_out = ChannelNorm(widths[-1], rngs=rngs)
        self.conv_out = CausalConv(widths[-1], 2 * config.z_dim, rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W C"], past: Past = None) -> tuple[Float[Array, "B F h w Z"], Past]:
        pasts = list(split_past(past, len(self.down_blocks) + 3))
        x, pasts[0] = self.conv_in(x, pasts[0])
        for i, block in enumerate(self.down_blocks, start=1):
            x, pasts[i] = block(x, pasts[i])
        x, pasts[-2] = self.middle(x, pasts[-2])
        x, pasts[-1] = self.conv_out(jax.nn.silu(self.norm_out(x)), pasts[-1])
        return x, tuple(pasts)


class Decoder(nnx.Module):
    """Latents [B, F, h, w, z_dim] -> folded pixels [B, T, H, W, pixel_channels]."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        base = config.decoder_base_dim or config.base_dim
        mults = config.decoder_dim_mult or config.dim_mult
        widths = [base * mult for mult in (mults[-1], *reversed(mults))]
        time = (*reversed(config.temperal_downsample), False)
        last = len(mults) - 1
        # The 2.1 form halves the width when it upsamples; the 2.2 form leaves that to the next level.
        ups = [width if config.is_residual else width // 2 for width in widths[1:]]
        self.conv_in = CausalConv(config.z_dim, widths[0], rngs=rngs)
        self.middle = MiddleBlock(widths[0], rngs=rngs)
        self.up_blocks = nnx.List(
            UpBlock(
                widths[0] if i == 0 else ups[i - 1],
                widths[i + 1],
                ups[i],
                config.num_res_blocks + 1,
                space=i < last,
                time=time[i],
                shortcut=config.is_residual,
                rngs=rngs,
            )
            for i in range(len(config.dim_mult))
        )
        self.norm_out = ChannelNorm(widths[-1], rngs=rngs)
        self.conv_out = CausalConv(widths[-1], config.pixel_channels, rngs=rngs)

    def __call__(self, x: Float[Array, "B F h w C"], past: Past = None) -> tuple[Float[Array, "B T H W P"], Past]:
        pasts = list(split_past(past, len(self.up_blocks) + 3))
        x, pasts[0] = self.conv_in(x, pasts[0])
        x, pasts[1] = self.middle(x, pasts[1])
        for i, block in enumerate(self.up_blocks, start=2):
            x, pasts[i] = block(x, pasts[i])
        x, pasts[-1] = self.conv_out(jax.nn.silu(self.norm_out(x)), pasts[-1])
        return x, tuple(pasts)


# --- autoencoder ---------------------------------------------------------------------------------------------------


class Autoencoder(nnx.Module):
    """Video in [-1, 1] <-> latents. Computes in the dtype it is given.

    Latents here are as the encoder makes them; `normalize` gives what the diffusion model sees and the cache holds.
    """

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.quant_conv = layers.Linear(2 * config.z_dim, 2 * config.z_dim, KERNEL_AXES, rngs=rngs)
        # A fresh posterior is narrow (standard deviation e^-3): unit noise would hide the means it has yet to learn.
        assert self.quant_conv.bias is not None
        self.quant_conv.bias[...] = jnp.where(jnp.arange(2 * config.z_dim) < config.z_dim, 0.0, -6.0)
        self.post_quant_conv = layers.Linear(config.z_dim, config.z_dim, KERNEL_AXES, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    @property
    def stride(self) -> Stride:
        return self.config.stride

    def encode(self, video: Float[Array, "B T H W 3"]) -> Posterior:
        """A whole clip of T = 1 + stride.time * k frames -> F = 1 + k latents.

        Raises `UserError` when the size does not fit the stride.
        """
        latent_extent(Extent(*video.shape[1:4]), self.stride)
        return self._encode(video, None)[0]

    def encode_first(self, frame: Float[Array, "B 1 H W 3"]) -> tuple[Posterior, Past]:
        """The first frame of a clip -> its latent, and the memory for `encode_chunk`."""
        latent_extent(Extent(*frame.shape[1:4]), self.stride)
        return self._encode(frame, None)

    def encode_chunk(self, frames: Float[Array, "B T H W 3"], past: Past) -> tuple[Posterior, Past]:
        """The next T = stride.time * k frames -> k latents, and the memory for the next call."""
        if frames.shape[1] < 1 or frames.shape[1] % self.stride.time:
            raise UserError(f"a later chunk has a multiple of {self.stride.time} frames, not {frames.shape[1]}")
        return self._encode(frames, past)

    def decode(self, latents: Float[Array, "B F h w C"], *, clip: bool = True) -> Float[Array, "B T H W 3"]:
        """A whole clip of F latents -> 1 + stride.time * (F - 1) frames; `clip`ped to [-1, 1] except in training."""
        return self._decode(latents, None, clip)[0]

    def decode_first(self, latent: Float[Array, "B 1 h w C"]) -> tuple[Float[Array, "B 1 H W 3"], Past]:
        """The first latent of a clip -> its one frame, and the memory for `decode_chunk`."""
        return self._decode(latent, None)

    def decode_chunk(self, latents: Float[Array, "B k h w C"], past: Past) -> tuple[Float[Array, "B T H W 3"], Past]:
        """The next k latents -> stride.time * k frames, and the memory for the next call."""
        return self._decode(latents, past)

    def normalize(self, latents: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        """(latents - mean) / std per channel, of the statistics in the config; float32."""
        mean, std = self._statistics()
        return (latents.astype(jnp.float32) - mean) / std

    def denormalize(self, latents: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        """The inverse of `normalize`; float32."""
        mean, std = self._statistics()
        return latents.astype(jnp.float32) * std + mean

    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        config = self.config
        return (
            np.asarray(config.latents_mean or (0.0,) * config.z_dim, np.float32),
            np.asarray(config.latents_std or (1.0,) * config.z_dim, np.float32),
        )

    def _encode(self, video: jax.Array, past: Past) -> tuple[Posterior, Past]:
        side = self.config.patch_size or 1
        x = rearrange(video, "b t (h ph) (w pw) c -> b t h w (c pw ph)", ph=side, pw=side)
        moments, past = self.encoder(_laid_out(x, video.shape[2] // self.stride.height), past)
        mean, logvar = jnp.split(self.quant_conv(moments), 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, -30.0, 20.0)), past

    def _decode(self, latents: jax.Array, past: Past, clip: bool = True) -> tuple[jax.Array, Past]:
        side = self.config.patch_size or 1
        x, past = self.decoder(_laid_out(self.post_quant_conv(latents), latents.shape[2]), past)
        video = rearrange(x, "b t h w (c pw ph) -> b t (h ph) (w pw) c", ph=side, pw=side)
        return (jnp.clip(video, -1.0, 1.0) if clip else video), past


def _laid_out(x: jax.Array, latent_rows: int) -> jax.Array:
    """`x` with clips and rows over the mesh, where clips divide, and rows of latents do and come out right.

    XLA's partitioner (Shardy; jax 0.10.2, on CPUs) computes other numbers, in silence, where a device has a single row
    of latents beside another axis of the mesh, and where `tensor` lies beside the rows: pictures are whole there.
    """
    batch, frames, rows, *others = ACTIVATION_AXES
    clips_divide = x.shape[0] % (mesh_size("data") * mesh_size("fsdp")) == 0
    parts = mesh_size("sequence")
    rows_divide = latent_rows % parts == 0 and latent_rows > parts and mesh_size("tensor") == 1
    return constrain(x, (batch if clips_divide else None, frames, rows if rows_divide else None, *others))


# --- streams -------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("graphdef", "method"))
def _first(graphdef: nnx.GraphDef, params: Any, x: jax.Array, method: str) -> tuple[Any, Past]:
    return getattr(nnx.merge(graphdef, params), method)(x)


@partial(jax.jit, static_argnames=("graphdef", "method"), donate_argnames="past")
def _chunk(graphdef: nnx.GraphDef, params: Any, x: jax.Array, past: Past, method: str) -> tuple[Any, Past]:
    return getattr(nnx.merge(graphdef, params), method)(x, past)


def _stream(graphdef: nnx.GraphDef, params: Any, x: Any, step: int, kind: str) -> Iterator[Any]:
    y, past = _first(graphdef, params, jnp.asarray(x[:, :1]), f"{kind}_first")
    yield y
    for start in range(1, x.shape[1], step):
        y, past = _chunk(graphdef, params, jnp.asarray(x[:, start : start + step]), past, f"{kind}_chunk")
        yield y


def encode_stream(graphdef: nnx.GraphDef, params: Any, video: Any, chunk: int = 1) -> Iterator[Posterior]:
    """Encode `video` [B, T, H, W, 3] (numpy, memory-mapped or jax): yields the posterior of the first latent, then of
    `chunk` latents at a time (fewer in the last). Only a chunk and the memory are on the device."""
    stride = nnx.merge(graphdef, params).stride
    latent_extent(Extent(*video.shape[1:4]), stride)
    yield from _stream(graphdef, params, video, chunk * stride.time, "encode")


def decode_stream(graphdef: nnx.GraphDef, params: Any, latents: Any, chunk: int = 1) -> Iterator[jax.Array]:
    """Decode `latents` [B, F, h, w, C] (as `Autoencoder.decode` takes them): yields the first frame [B, 1, H, W, 3],
    then the frames of `chunk` latents at a time (fewer in the last)."""
    yield from _stream(graphdef, params, latents, chunk, "decode")
