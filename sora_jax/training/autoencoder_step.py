"""The loss of the video autoencoder and one step of its training.

Images are videos of one frame: batches of any T = 1 + stride.time * k go through the same step, one compile per shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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

SSIM_WINDOW = 11  # pixels, as the judge has it (`evaluation.reconstruction`)

Step = Callable[[TrainState, Num[Array, "B T H W 3"]], tuple[TrainState, dict[str, Float[Array, ""]]]]


@dataclass(frozen=True)
class AutoencoderLossConfig:
    """Weights of the terms; errors are of pixels in [-1, 1], the divergence in nats per latent value."""

    l1: float = 1.0
    l2: float = 0.0  # squared error: what PSNR counts; worth adding at the end of a run
    gradient: float = 1.0
    gradient_scales: int = 3
    ssim: float = 0.0  # what structural similarity lacks of 1: errors count most where there is little to see
    kl: float = 1e-5
    train_encoder: bool = True  # False: the decoder alone learns, and latents that were cached stay what they are

    def __post_init__(self) -> None:
        if self.gradient_scales < 1:
            raise UserError(f"gradient_scales must be at least 1, not {self.gradient_scales}")
        for name in ("l1", "l2", "gradient", "ssim", "kl"):
            if getattr(self, name) < 0:
                raise UserError(f"reconstruction.{name} must be >= 0, not {getattr(self, name)}")


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


def ssim_error(video: Float[Array, "B T H W C"], decoded: Float[Array, "B T H W C"]) -> Float[Array, ""]:
    """1 - SSIM of frames in [-1, 1] (Wang et al. 2004, "Image quality assessment"): a Gaussian window of 11 x 11 and
    standard deviation 1.5, only where it fits the frame; K1 = .01, K2 = .03; mean over all.

    Windows are products with two matrices, one along each side, which every platform is fast at. Raises `UserError` for
    frames smaller than the window.
    """
    height, width = video.shape[2:4]
    if min(height, width) < SSIM_WINDOW:
        raise UserError(
            f"reconstruction.ssim needs frames of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, not {height} x {width}"
        )
    down, along = _windows(height), _windows(width)

    def blur(x: Array) -> Array:
        # variances are small differences of what this returns
        return jnp.einsum("bthwc,ih,jw->btijc", x, down, along, precision=jax.lax.Precision.HIGHEST)

    x, y = (0.5 + 0.5 * frames.astype(jnp.float32) for frames in (video, decoded))  # black is 0, where means compare
    mean_x, mean_y = blur(x), blur(y)
    variances = blur(x * x + y * y) - mean_x**2 - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    alike = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1) * (2 * covariance + c2) / (variances + c2)
    return 1.0 - jnp.mean(alike)


def _windows(size: int) -> Float[np.ndarray, "_ size"]:
    """Each row is the Gaussian window at one of the places where it fits a side of `size` pixels."""
    far = np.arange(size) - np.arange(size - SSIM_WINDOW + 1)[:, None] - SSIM_WINDOW // 2
    weights = np.where(np.abs(far) <= SSIM_WINDOW // 2, np.exp(-(far**2) / (2 * 1.5**2)), 0.0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


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
    if weights.ssim:
        terms["ssim"] = ssim_error(video, decoded)
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
