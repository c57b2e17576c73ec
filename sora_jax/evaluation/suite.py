"""The world suite: sample held-out prompts, judge the clips, report shares with intervals.

report = evaluate(sample_fn, n=200, seed=0, batch_size=20)
report["metrics"]["all"]      # {"value": 0.71, "low": 0.64, "high": 0.77, "n": 200}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sora_jax.data.world.prompts import heldout_prompts
from sora_jax.data.world.scene import Mix
from sora_jax.errors import UserError
from sora_jax.evaluation.checkers import judge, judge_physics
from sora_jax.evaluation.physics import LAWS
from sora_jax.evaluation.tracking import track

SampleFn = Callable[[list[str], list[int]], np.ndarray]
ATTRIBUTES = ("color", "shape", "count", "motion", "all", "background", "size", "relation")
_Z = 1.959963984540054  # the normal quantile of a two-sided 95 % interval


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927): (low, high) in [0, 1]; (0, 1) when n is 0.

    centre = (p + z^2 / 2n) / (1 + z^2 / n), half width = z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n).
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, _Z**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # rounding must not put the share itself outside
    return max(0.0, min(p, float(centre - half))), min(1.0, max(p, float(centre + half)))


def _share(answers: Sequence[bool]) -> dict[str, float | int]:
    low, high = wilson_interval(sum(answers), len(answers))
    return {"value": sum(answers) / len(answers), "low": low, "high": high, "n": len(answers)}


def evaluate(
    sample_fn: SampleFn,
    n: int = 200,
    seed: int = 0,
    batch_size: int = 20,
    progress: Callable[[int, int], None] | None = None,
    mix: Mix | None = None,
) -> dict[str, Any]:
    """Samples `n` held-out prompts and judges what comes back.

    Args:
      sample_fn: (prompts, seeds) of one batch -> uint8 [b, T, H, W, 3], T >= 9. Clip k gets seed `seed + k`.
      n, seed: how many prompts, and which: the same seed asks the same prompts.
      batch_size: prompts per call; the last batch is smaller when it does not divide n.
      progress: called with (clips judged, n) after each batch.
      mix: what the prompts ask for; the first world's by default.

    Returns:
      {"suite": "world", "n": n, "metrics": {name: {"value", "low", "high", "n"}}}: shares with Wilson 95 % intervals.
      Names: color, shape, count, motion, all (these four together, and the relation where there is one); background,
      size and relation, over the prompts that say them; physics.LAW, over the prompts that the law speaks of. A metric
      that no prompt speaks of is left out.
    """
    if n < 1 or batch_size < 1:
        raise UserError(
            f"an evaluation needs at least one prompt and a batch of one, not n={n}, batch_size={batch_size}"
        )
    prompts = heldout_prompts(n, seed, mix=mix)
    answers: dict[str, list[bool]] = {name: [] for name in (*ATTRIBUTES, *(f"physics.{law}" for law in LAWS))}
    for start in range(0, n, batch_size):
        batch = prompts[start : start + batch_size]
        clips = sample_fn([prompt.text for prompt in batch], [seed + start + k for k in range(len(batch))])
        if clips.ndim != 5 or len(clips) != len(batch):
            raise ValueError(f"sample_fn gave {clips.shape} for {len(batch)} prompts, not [{len(batch)}, T, H, W, 3]")
        for prompt, frames in zip(batch, clips, strict=True):
            seen = track(frames)
            verdict = judge(frames, prompt.truth, seen)
            for name in ATTRIBUTES:
                answer = getattr(verdict, name)
                if answer is not None:
                    answers[name].append(answer)
            for law, answer in judge_physics(frames, prompt.truth, seen).items():
                answers[f"physics.{law}"].append(answer)
        if progress is not None:
            progress(min(start + batch_size, n), n)
    return {"suite": "world", "n": n, "metrics": {name: _share(given) for name, given in answers.items() if given}}
