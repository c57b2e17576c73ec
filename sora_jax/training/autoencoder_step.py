"""The loss of the video autoencoder and one step of its training.

Images are videos of one frame: batches of any T = 1 + stride.time * k go through the same step, one compile per shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Num

from sora_jax.errors import UserError
from sora_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sora_jax.shapes import Extent, latent_extent
from sora_jax.training.accumulation import accumulated
from sora_jax.training.state import TrainState, apply_gradients

MODULE = "autoencoder"  # the one entry of `TrainState.params`
ENCODER = ("encoder", "quant_conv")  # the parts of an autoencoder that make latents
DECODER = ("decoder", "post_quant_conv")  # and those that read them

Step = Callable[[TrainState, Num[Array, "B T H W 3"]], tuple[TrainState, dict[str, Float[Array, ""]]]]


@dataclass(frozen=True)
class AutoencoderLossConfig:
    """Weights of the terms; errors are of pixels in [-1, 1], the divergence in nats per latent value."""

    l1: float = 1.0
    l2: float = 0.0  # squared error: what PSNR counts; worth adding at the end of a run
    gradient: float = 1.0
    gradient_scales: int = 3
    kl: float = 1e-5
    train_encoder: bool = True  # False: the decoder alone learns, and latents that were cached stay what they are

    def __post_init__(self) -> None:
        if self.gradient_scales < 1:
            raise UserError(f"gradient_scales must be at least 1, not {self.gradient_scales}")


def gradient_error(error: Float[Array, "B T H W C"], scales: int) -> Float[Array, ""]:
    """Mean absolute difference of neighbours of `error` along time, height and width, summed over the axes and averaged
    over `scales`: full resolution, then halved in space by averaging each time.

    As differences are linear this is the L1 distance between the gradients of two videos whose difference is `error`:
    it punishes blurred edges, flicker and halos, which move the plain error little.
    """
    total = jnp.zeros((), jnp.float32)
    for scale in range(scales):
        if scale:
            b, t, h, w, c = error.shape
            error = error[:, :, : h // 2 * 2, : w // 2 * 2].reshape(b, t, h // 2, 2, w // 2, 2, c).mean(axis=(3, 5))
        for axis in (1, 2, 3):
            if error.shape[axis] > 1:
                total += jnp.mean(jnp.abs(jnp.diff(error, axis=axis)))
    return total / scales


def autoencoder_loss(
    model: Autoencoder,
    video: Float[Array, "B T H W 3"],
    noise: Float[Array, "B F h w C"],
    weights: AutoencoderLossConfig,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The weighted loss of reconstructing `video` from the sample of its posterior that `noise` draws, and every term
    by name: means over clips.

    The model computes in the dtype of `video`; the terms are float32.
    """
    posterior = model.encode(video)
    if not weights.train_encoder:
        posterior = jax.lax.stop_gradient(posterior)
    decoded = model.decode(posterior.at(noise), clip=False)
    error = decoded.astype(jnp.float32) - video.astype(jnp.float32)
    terms = {
        "l1": jnp.mean(jnp.abs(error)),
        "l2": jnp.mean(error * error),
        "gradient": gradient_error(error, weights.gradient_scales),
        "kl": posterior.kl(),
    }
    loss = sum((getattr(weights, name) * value for name, value in terms.items()), jnp.zeros((), jnp.float32))
    return loss, terms | {"loss": loss}


def with_encoder_of(before: nnx.State, after: nnx.State) -> nnx.State:
    """The decoder of `after` and the encoder of `before`."""

    def choose(path: tuple[Any, ...], old: jax.Array, new: jax.Array) -> jax.Array:
        return old if getattr(path[0], "key", path[0]) in ENCODER else new

    return jax.tree_util.tree_map_with_path(choose, before, after)


def make_autoencoder_step(
    graphdef: nnx.GraphDef,
    config: AutoencoderConfig,
    optimizer: optax.GradientTransformation,
    weights: AutoencoderLossConfig,
    *,
    clip_norm: float = 1.0,
    spike_sigmas: float = 0.0,
    ema_decay: float = 0.999,
    dtype: jnp.dtype | type = jnp.float32,
    accumulate: int = 1,
) -> Step:
    """`step(state, video) -> (state, metrics)`, jitted, with `state` donated; in `accumulate` passes.

    `video` [B, T, H, W, 3] is uint8, or floating point in [-1, 1]; it is computed with in `dtype`. `state.params` is
    {"autoencoder": parameters}. Metrics are those of `autoencoder_loss` and `apply_gradients`, and `psnr`, of unclipped
    frames, in dB.
    """
    if config.dropout:
        raise UserError(f"dropout {config.dropout} is not supported in training an autoencoder; use 0")

    def share(params: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        # Means over clips, of which each pass has as many: their mean is that of the batch.
        found = autoencoder_loss(nnx.merge(graphdef, params[MODULE]), *batch, weights)
        return jax.tree.map(lambda mean: mean / accumulate, found)

    def step(state: TrainState, video: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        if video.dtype == jnp.uint8:
            video = video.astype(jnp.float32) / 127.5 - 1.0
        latents = latent_extent(Extent(*video.shape[1:4]), config.stride)
        noise = jax.random.normal(state.step_key(), (video.shape[0], *latents, config.z_dim), dtype)
        (loss, terms), grads = accumulated(share, state.params, (video.astype(dtype), noise), accumulate)
        before = state
        state, metrics = apply_gradients(
            state, grads, loss, optimizer, clip_norm=clip_norm, spike_sigmas=spike_sigmas, ema_decay=ema_decay
        )
        if not weights.train_encoder:  # weight decay would move it, although its gradients are 0
            state = state.replace(
                params={MODULE: with_encoder_of(before.params[MODULE], state.params[MODULE])},
                ema={MODULE: with_encoder_of(before.ema[MODULE], state.ema[MODULE])},
            )
        psnr = 10.0 * jnp.log10(4.0 / jnp.maximum(terms["l2"], 1e-12))
        return state, terms | {"psnr": psnr} | metrics

    return jax.jit(step, donate_argnums=0)
