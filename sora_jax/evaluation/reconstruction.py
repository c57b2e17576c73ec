"""How much of a video the autoencoder gives back: PSNR and SSIM in numpy, against a baseline that knows one frame."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float, UInt8

from sora_jax.errors import UserError


def psnr(reference: UInt8[np.ndarray, "T H W C"], video: UInt8[np.ndarray, "T H W C"]) -> float:
    """10 log10(255^2 / mean squared error) in dB, the error averaged over the whole clip; inf for equal clips."""
    error = np.mean((reference.astype(np.float64) - video.astype(np.float64)) ** 2)
    return float(10.0 * np.log10(255.0**2 / error)) if error > 0 else float("inf")


def ssim(reference: UInt8[np.ndarray, "T H W C"], video: UInt8[np.ndarray, "T H W C"]) -> float:
    """Structural similarity (Wang et al. 2004, "Image quality assessment"), in [-1, 1]; 1 for equal clips.

    Gaussian window of 11 x 11 and standard deviation 1.5, only where it fits the frame; K1 = .01, K2 = .03; the mean
    over positions, channels and frames. Raises `UserError` for frames smaller than the window.
    """
    if min(reference.shape[1:3]) < 11:
        raise UserError(
            f"SSIM needs frames of at least 11 x 11 pixels, not {reference.shape[1]} x {reference.shape[2]}"
        )
    x, y = reference.astype(np.float64), video.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(np.mean(score))


def _blur(x: Float[np.ndarray, "T H W C"]) -> Float[np.ndarray, "T _ _ C"]:
    """Gaussian window of height and width, without padding."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    for axis in (1, 2):
        size = x.shape[axis] - 10
        x = sum(w * x.take(range(i, i + size), axis=axis) for i, w in enumerate(window))
    return x


def evaluate_reconstruction(
    encode_decode: Callable[[UInt8[np.ndarray, "T H W 3"]], UInt8[np.ndarray, "T H W 3"]],
    clips: Iterable[UInt8[np.ndarray, "T H W 3"]],
) -> dict[str, list[float]]:
    """Scores of every clip, in order: `psnr` and `ssim` of `encode_decode(clip)`, and `copy_psnr` and `copy_ssim` of
    the first true frame shown all the time, which is what an autoencoder that misses all motion gets.

    Infinite PSNR (a still clip, for the baseline) is kept as such: take medians, or leave such clips out of a mean.
    """
    scores: dict[str, list[float]] = {"psnr": [], "ssim": [], "copy_psnr": [], "copy_ssim": []}
    for clip in clips:
        made = encode_decode(clip)
        if made.shape != clip.shape:
            raise ValueError(f"encode_decode made {made.shape} of a clip of {clip.shape}")
        still = np.broadcast_to(clip[:1], clip.shape)
        scores["psnr"].append(psnr(clip, made))
        scores["ssim"].append(ssim(clip, made))
        scores["copy_psnr"].append(psnr(clip, still))
        scores["copy_ssim"].append(ssim(clip, still))
    return scores
