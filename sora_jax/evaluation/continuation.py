"""Does a clip go on from its first frame as the truth does? Motion masks, in the manner of Physics-IQ.

report = evaluate_continuation(continue_fn, n=100)
report["metrics"]["model.spatial_iou"], report["metrics"]["copy.spatial_iou"], report["metrics"]["lead.spatial_iou"]

Four scores compare a continuation with the true one (Motamed et al. 2025, arXiv:2501.09038, section on metrics):

    spatial_iou          where anything moved at any time: intersection of both masks over their union
    spatiotemporal_iou   where and when: the same for each frame, averaged over frames
    weighted_spatial_iou where and how much: for each pixel the share of frames in which it moved; sum of the smaller
                         over the sum of the larger share
    mse                  how: mean squared error of pixels in [0, 1], averaged over frames; the lower the better

Beside a model stand two that understand nothing: a still of the first frame, and the training clip whose first frame is
nearest, as it went on there. Above it, where there is an autoencoder, stands the truth that went through it. Nobody
reaches 1: the scene goes on as its physics says, but first frame and prompt leave speed and restitution open.

What differs from the paper: its masks are made at high resolution and morphologically opened and closed, ours at the
resolution of the clips, by a vote of the 3 x 3 neighbours, and on all colours where the paper takes gray values; it
has two takes of every scene, and gives scores as shares of what one take reaches against the other. The given frame
is not counted, and clips in which nothing moves are not asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from sora_jax.data.world import Mix, WorldSource
from sora_jax.errors import UserError
from sora_jax.evaluation.intervals import Metric, mean

SCORES = ("spatial_iou", "spatiotemporal_iou", "weighted_spatial_iou", "mse")
BASELINES = ("copy", "neighbour")
NEIGHBOURS = 2000  # training clips among which the nearest is looked for
THRESHOLD = 10.0  # levels of 255 by which what moves differs from the running background
RATE = 0.3  # at which the background follows

ContinueFn = Callable[[list[str], np.ndarray, list[int]], np.ndarray]


class Case(NamedTuple):
    """A clip that is to be continued from its first frame."""

    prompt: str
    frames: UInt8[np.ndarray, "T H W 3"]


# ---- masks and scores ----


def motion_mask(frames: UInt8[np.ndarray, "T H W 3"]) -> Bool[np.ndarray, "T H W"]:
    """Where something moves: where the frame differs from a running mean of the frames so far; nowhere in the first."""
    light = _smooth(frames.astype(np.float32))
    background = light[0]
    moving = np.zeros(frames.shape[:3], np.bool_)
    for t in range(1, len(frames)):
        background = background + RATE * (light[t] - background)
        moving[t] = np.abs(light[t] - background).max(-1) > THRESHOLD
    return np.asarray(_smooth(moving[..., None].astype(np.float32), (1, 1, 1))[..., 0] > 0.5)


def scores(
    made: UInt8[np.ndarray, "T H W 3"],
    true: UInt8[np.ndarray, "T H W 3"],
    true_mask: Bool[np.ndarray, "T H W"] | None = None,
) -> dict[str, float]:
    """The four scores of a clip against the true one, without their first frames; two empty masks are equal."""
    ours = motion_mask(made)[1:]
    theirs = (motion_mask(true) if true_mask is None else true_mask)[1:]
    error = (made[1:].astype(np.float64) - true[1:].astype(np.float64)) / 255
    return {
        "spatial_iou": _iou(ours.max(0), theirs.max(0)),
        "spatiotemporal_iou": float(np.mean([_iou(a, b) for a, b in zip(ours, theirs, strict=True)])),
        "weighted_spatial_iou": _iou(ours.mean(0), theirs.mean(0)),
        "mse": float((error**2).mean()),
    }


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    """Sum of the smaller over sum of the larger: intersection over union where both are masks."""
    union = float(np.maximum(a, b).sum())
    return float(np.minimum(a, b).sum()) / union if union > 0 else 1.0


def _smooth(frames: Float[np.ndarray, "T H W C"], taps: tuple[int, int, int] = (1, 2, 1)) -> np.ndarray:
    """A window of 3 x 3 over height and width, edges repeated."""
    for axis in (1, 2):
        size = frames.shape[axis]
        padded = np.concatenate([frames.take([0], axis), frames, frames.take([-1], axis)], axis)
        parts = [tap * padded.take(np.arange(k, k + size), axis) for k, tap in enumerate(taps)]
        frames = (parts[0] + parts[1] + parts[2]) / np.float32(sum(taps))
    return frames


# ---- what is asked, and the baselines ----


def cases(source: WorldSource, n: int, fits: Callable[[str], bool] = lambda text: True) -> Iterator[Case]:
    """The first `n` clips of a source in which something moves. The prompt is the dense caption, which always says
    which way, or the short one where that does not fit."""
    found = 0
    for index in range(len(source)):
        if found == n:
            return
        item = source[index]
        if motion_mask(item["frames"]).any():
            short, dense = item["captions"]
            found += 1
            yield Case(dense if fits(dense) else short, item["frames"])
    if found < n:
        raise UserError(f"something moves in only {found} of {len(source)} clips of this mix, and {n} are needed")


class Neighbours:
    """First frames of training clips; a clip is made again when it is the nearest."""

    def __init__(self, source: WorldSource, at_once: int = 50):
        self._source = source
        parts = []
        for start in range(0, len(source), at_once):
            items = source.batch(range(start, min(start + at_once, len(source))))
            parts.append(np.stack([item["frames"][0] for item in items]))
        self._firsts = np.concatenate(parts).reshape(len(source), -1).astype(np.float32)
        self._squares = (self._firsts**2).sum(1)

    def nearest(self, first: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "T H W 3"]:
        """The clip whose first frame has the least squared error against `first`."""
        errors = self._squares - 2 * self._firsts @ first.ravel().astype(np.float32)
        return self._source[int(errors.argmin())]["frames"]


# ---- the suite ----


def evaluate_continuation(
    continue_fn: ContinueFn,
    n: int = 100,
    seed: int = 0,
    batch_size: int = 20,
    *,
    frames: int = 17,
    height: int = 64,
    width: int = 64,
    mix: Mix | None = None,
    fits: Callable[[str], bool] = lambda text: True,
    there_and_back: Callable[[np.ndarray], np.ndarray] | None = None,
    neighbours: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Continues the first frames of `n` held-out clips and holds what comes against how they went on.

    Args:
      continue_fn: (prompts, first frames uint8 [b, H, W, 3], seeds) of one batch -> uint8 [b, T, H, W, 3].
      n, seed, batch_size: how many clips, and which; clip k gets seed `seed + k`.
      frames, height, width, mix: of the clips.
      fits: whether a prompt is not too long for the model.
      there_and_back: a clip through the model's autoencoder; adds the scores of the truth after it.
      neighbours: training clips among which the nearest first frame is looked for (`NEIGHBOURS`).
      progress: called with (clips judged, n) after each batch.

    Returns:
      {"suite": "continuation", "n": n, "metrics": {"WHO.SCORE": {"value", "low", "high", "n"}}}, WHO being model, copy,
      neighbour and autoencoder, with bootstrap intervals over clips; lead.SCORE is by how much the model is better than
      the better baseline, clip by clip: it beats both where the interval lies above 0.
    """
    neighbours = NEIGHBOURS if neighbours is None else neighbours
    if n < 1 or batch_size < 1 or neighbours < 1:
        raise UserError(f"n, batch_size and neighbours must be >= 1, not {n}, {batch_size} and {neighbours}")
    if frames < 2:
        raise UserError("an image has no continuation: ask for 2 frames or more")
    mix = mix or Mix()
    asked = WorldSource(seed, 4 * n + 20, "heldout", frames, height, width, mix)
    pool = Neighbours(WorldSource(seed, neighbours, "train", frames, height, width, mix))
    chosen = cases(asked, n, fits)
    found: dict[str, list[dict[str, float]]] = {who: [] for who in ("model", *BASELINES, "autoencoder")}
    for start in range(0, n, batch_size):
        batch = [next(chosen) for _ in range(min(batch_size, n - start))]
        firsts = np.stack([case.frames[0] for case in batch])
        made = continue_fn([case.prompt for case in batch], firsts, [seed + start + k for k in range(len(batch))])
        if made.shape != (len(batch), frames, height, width, 3):
            raise ValueError(f"continue_fn gave {made.shape} for {len(batch)} clips of {frames}x{height}x{width}")
        for case, clip in zip(batch, made, strict=True):
            true, mask = case.frames, motion_mask(case.frames)
            found["model"].append(scores(clip, true, mask))
            found["copy"].append(scores(np.repeat(true[:1], frames, axis=0), true, mask))
            found["neighbour"].append(scores(pool.nearest(true[0]), true, mask))
            if there_and_back is not None:
                found["autoencoder"].append(scores(there_and_back(true), true, mask))
        if progress is not None:
            progress(min(start + batch_size, n), n)
    return {"suite": "continuation", "n": n, "metrics": _metrics(found)}


def _metrics(found: dict[str, list[dict[str, float]]]) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    for score in SCORES:
        better = -1.0 if score == "mse" else 1.0
        values = {who: np.array([one[score] for one in given]) for who, given in found.items() if given}
        metrics |= {f"{who}.{score}": mean(given) for who, given in values.items()}
        rival = max(BASELINES, key=lambda who: better * values[who].mean())
        metrics[f"lead.{score}"] = mean(better * (values["model"] - values[rival]))
    return metrics
