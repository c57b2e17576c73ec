"""PSNR and SSIM against closed forms and direct sums."""

from __future__ import annotations

import numpy as np
import pytest

from sora_jax.errors import UserError
from sora_jax.evaluation.reconstruction import evaluate_reconstruction, psnr, ssim


def clip(seed: int, shape: tuple[int, ...] = (2, 13, 12, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_psnr_of_a_constant_error():
    dark = np.full((2, 4, 4, 3), 100, np.uint8)
    assert psnr(dark, dark + 1) == pytest.approx(20 * np.log10(255))  # 48.13 dB
    assert psnr(dark + 10, dark) == pytest.approx(20 * np.log10(25.5))  # 28.13 dB; no wrap-around below zero
    assert psnr(dark, dark) == float("inf")


def test_psnr_averages_the_error_and_not_the_decibels():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a.copy()
    b[1] = 20  # one frame perfect, the other with mean squared error 400
    assert psnr(a, b) == pytest.approx(10 * np.log10(255**2 / 200))


def test_ssim_is_the_direct_sum():
    a, b = clip(0), clip(1)
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    scores = []
    for t, c, i, j in np.ndindex(2, 3, 3, 2):
        x = a[t, i : i + 11, j : j + 11, c].astype(float)
        y = b[t, i : i + 11, j : j + 11, c].astype(float)
        mx, my = (window * x).sum(), (window * y).sum()
        vx, vy, cov = (
            (window * (x - mx) ** 2).sum(),
            (window * (y - my) ** 2).sum(),
            (window * (x - mx) * (y - my)).sum(),
        )
        c1, c2 = 2.55**2, 7.65**2
        scores.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert ssim(a, b) == pytest.approx(np.mean(scores), rel=1e-9)
    assert ssim(a, a) == pytest.approx(1.0)


def test_ssim_refuses_frames_smaller_than_its_window():
    with pytest.raises(UserError, match="at least 11 x 11 pixels, not 8 x 12"):
        ssim(clip(0, (1, 8, 12, 3)), clip(1, (1, 8, 12, 3)))


def test_evaluation_scores_every_clip_and_the_still_baseline():
    moving, still = clip(0, (3, 12, 12, 3)), np.repeat(clip(1, (1, 12, 12, 3)), 3, axis=0)
    scores = evaluate_reconstruction(lambda video: video // 2, [moving, still])
    assert scores["psnr"] == [psnr(moving, moving // 2), psnr(still, still // 2)]
    assert scores["ssim"] == [ssim(moving, moving // 2), ssim(still, still // 2)]
    assert scores["copy_psnr"] == [psnr(moving, np.repeat(moving[:1], 3, axis=0)), float("inf")]
    assert scores["copy_ssim"][1] == pytest.approx(1.0)


def test_evaluation_refuses_another_size():
    with pytest.raises(ValueError, match=r"\(2, 12, 12, 3\) of a clip of \(3, 12, 12, 3\)"):
        evaluate_reconstruction(lambda video: video[:2], [clip(0, (3, 12, 12, 3))])
