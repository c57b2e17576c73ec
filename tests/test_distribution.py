"""The distance between sets of clips: closed forms, no bias, and what it sees of clips that have gone wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest

from sora_jax.data import world
from sora_jax.errors import UserError
from sora_jax.evaluation import filters
from sora_jax.evaluation.distribution import compare, energy_distance


def absolute_mean(mean: float, spread: float) -> float:
    """E|z| for z normal: the folded normal distribution."""
    tail = mean * math.erf(mean / (spread * math.sqrt(2)))
    return spread * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * spread**2)) + tail


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (1.0, 1.0), (0.5, 2.0), (3.0, 0.5)])
def test_two_gaussians(mean: float, spread: float):
    normal = np.array([NormalDist().inv_cdf((k + 0.5) / 800) for k in range(800)])[:, None]
    x, y = normal, mean + spread * normal[::-1]
    expected = 2 * absolute_mean(mean, math.hypot(1, spread))
    expected -= absolute_mean(0, math.sqrt(2)) + absolute_mean(0, spread * math.sqrt(2))
    assert energy_distance(x, y) == pytest.approx(expected, abs=0.01)


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), by the eigenvalues of the product."""
    covariances = [np.cov(one, rowvar=False) for one in (x, y)]
    roots = np.sqrt(np.maximum(np.linalg.eigvals(covariances[0] @ covariances[1]).real, 0)).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + sum(np.trace(one) for one in covariances) - 2 * roots)


def test_the_usual_distance_depends_on_how_many_and_this_one_does_not():
    """Why it is not Fréchet's: between sets of one distribution that has the sign of a bias, and falls as n grows."""
    rng = np.random.default_rng(1)

    def means(distance: Callable[[np.ndarray, np.ndarray], float], n: int) -> np.ndarray:
        return np.array([distance(*rng.normal(0, 1, (2, n, 30))) for _ in range(12)])

    few, many = means(frechet_distance, 60), means(frechet_distance, 240)
    assert few.min() > 0
    assert few.mean() > 3 * many.mean()
    for n in (60, 240):
        found = means(energy_distance, n)
        assert abs(found.mean()) < 3 * found.std(ddof=1) / np.sqrt(len(found))


def test_sets_of_one_distribution_lie_within_the_floor():
    rng = np.random.default_rng(2)
    inside = []
    for _ in range(24):
        true, other, made = rng.normal(0, 1, (3, 20, 5))
        report = compare(true, other, made=made)
        inside += [report["floor"]["low"] <= report[name]["value"] <= report["floor"]["high"] for name in report]
    assert np.mean(inside) >= 0.88


def test_the_interval_of_a_distance_holds_the_true_one():
    rng = np.random.default_rng(3)
    expected = 2 * absolute_mean(2, math.sqrt(2)) - 2 * absolute_mean(0, math.sqrt(2))
    held = []
    for _ in range(20):
        true, other = rng.normal(0, 1, (2, 40, 1))
        report = compare(true, other, made=rng.normal(2, 1, (40, 1)))["made"]
        spread = np.concatenate([other, true]).std()  # the unit of the report
        held.append(report["low"] * spread <= expected <= report["high"] * spread)
    assert np.mean(held) >= 0.85


def test_sets_too_small_for_a_distance():
    rng = np.random.default_rng(4)
    with pytest.raises(UserError, match="at least 8 clips in each, not 5"):
        compare(rng.normal(size=(5, 2)), rng.normal(size=(9, 2)))
    with pytest.raises(ValueError, match="the floor is that of as many clips"):
        compare(*rng.normal(size=(2, 9, 2)), made=rng.normal(size=(8, 2)))


# ---- what the encoder sees ----

CLIPS, FRAMES, SIZE = 40, 13, 32


@pytest.fixture(scope="module")
def clips() -> np.ndarray:
    """Three sets of true clips."""
    scenes = world.sample_scenes(301, 3 * CLIPS, split="all", frames=FRAMES, height=SIZE, width=SIZE)
    return np.stack(world.render(scenes)).reshape(3, CLIPS, FRAMES, SIZE, SIZE, 3)


def blurred(clip: np.ndarray, times: int) -> np.ndarray:
    video = clip.astype(np.float64)
    for _ in range(times):
        for axis in (1, 2):
            video = (2 * video + np.roll(video, 1, axis) + np.roll(video, -1, axis)) / 4
    return video.astype(np.uint8)


def noisy(clip: np.ndarray, levels: float) -> np.ndarray:
    return np.clip(clip + np.random.default_rng(0).normal(0, levels, clip.shape), 0, 255).astype(np.uint8)


def frozen(clip: np.ndarray, frames: int) -> np.ndarray:
    return np.concatenate([clip[:-frames], np.repeat(clip[-frames - 1 : -frames], frames, axis=0)])


def shuffled(clip: np.ndarray, window: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    parts = np.split(np.arange(FRAMES), range(window, FRAMES, window))
    return clip[np.concatenate([rng.permutation(part) for part in parts])]


def turned(clip: np.ndarray, degrees: float) -> np.ndarray:
    """Hues turned about the gray axis (Rodrigues)."""
    angle, cross = math.radians(degrees), np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
    return np.clip(clip @ turn.T, 0, 255).astype(np.uint8)


def faded(clip: np.ndarray, share: float) -> np.ndarray:
    gray = clip.mean(-1, keepdims=True)
    return (gray + (clip - gray) * (1 - share)).astype(np.uint8)


SEVERITIES: dict[Callable[[np.ndarray, float], np.ndarray], tuple[float, ...]] = {
    blurred: (2, 6),
    noisy: (2, 8),
    frozen: (4, 12),
    shuffled: (4, 13),
    turned: (8, 20),
    faded: (0.25, 0.6),
}


@pytest.fixture(scope="module")
def features(clips: np.ndarray) -> list[np.ndarray]:
    return [filters.encode_all(some) for some in clips[:2]]


@pytest.mark.parametrize("worsen", SEVERITIES, ids=lambda worsen: worsen.__name__)
def test_the_worse_the_clips_the_farther_they_are(worsen, clips: np.ndarray, features: list[np.ndarray]):
    sets = {
        str(severity): filters.encode_all(np.stack([worsen(clip, severity) for clip in clips[1]]))
        for severity in SEVERITIES[worsen]
    }
    report = compare(*features, **sets)
    floor, values = report["floor"], [report[name]["value"] for name in sets]
    assert floor["value"] < values[0] < values[1]
    assert floor["high"] < values[1]


def test_backwards_clips_are_not_the_truth(clips: np.ndarray):
    """Most motions of the world look the same backwards; what falls does not, so it is asked of what falls."""
    mix = world.Mix(pair=0, collision=0, occluder=0, pan=0, **dict.fromkeys(("slide", "orbit", "rest"), 0.0))
    scenes = world.sample_scenes(302, 2 * CLIPS, split="all", frames=FRAMES, height=SIZE, width=SIZE, mix=mix)
    true, also = np.stack(world.render(scenes)).reshape(2, CLIPS, FRAMES, SIZE, SIZE, 3)
    report = compare(*map(filters.encode_all, (true, also)), made=filters.encode_all(also[:, ::-1]))
    assert report["made"]["value"] > report["floor"]["high"]


def test_other_true_clips_are_not_far(clips: np.ndarray, features: list[np.ndarray]):
    report = compare(*features, made=filters.encode_all(clips[2]))
    assert report["made"]["value"] < 2 * report["floor"]["high"]


def test_another_encoder_needs_another_name():
    """Frozen: figures of one name are comparable, so this changes only together with the name."""
    assert (filters.NAME, filters.fingerprint()) == ("filters-1", "213cfa67")


def test_clips_too_small_to_be_encoded():
    for shape in ((3, 32, 32, 3), (9, 8, 32, 3)):
        with pytest.raises(UserError, match="clips of at least 4 frames and 16 pixels"):
            filters.encode(np.zeros(shape, np.uint8))
