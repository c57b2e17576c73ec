"""The world suite: sample held-out prompts, judge the clips, report shares with intervals.

report = evaluate(sample_fn, n=200, seed=0, batch_size=20)
report["metrics"]["all"]      # {"value": 0.71, "low": 0.64, "high": 0.77, "n": 200}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sora_jax.data.world.prompts import Prompt, heldout_prompts
from sora_jax.data.world.scene import Mix
from sora_jax.errors import UserError
from sora_jax.evaluation.checkers import judge, judge_physics
from sora_jax.evaluation.intervals import share
from sora_jax.evaluation.physics import LAWS
from sora_jax.evaluation.tracking import track

SampleFn = Callable[[list[str], list[int]], np.ndarray]
ATTRIBUTES = ("color", "shape", "count", "motion", "all", "background", "size", "relation")


def evaluate(
    sample_fn: SampleFn,
    n: int = 200,
    seed: int = 0,
    batch_size: int = 20,
    progress: Callable[[int, int], None] | None = None,
    mix: Mix | None = None,
    prompts: Sequence[Prompt] | None = None,
) -> dict[str, Any]:
    """Samples `n` held-out prompts and judges what comes back.

    Args:
      sample_fn: (prompts, seeds) of one batch -> uint8 [b, T, H, W, 3], T >= 9. Clip k gets seed `seed + k`.
      n, seed: how many prompts, and which: the same seed asks the same prompts.
      batch_size: prompts per call; the last batch is smaller when it does not divide n.
      progress: called with (clips judged, n) after each batch.
      mix: what the prompts ask for; the first world's by default.
      prompts: these, `n` of them, in place of the held-out ones of `seed`.

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
    prompts = heldout_prompts(n, seed, mix=mix) if prompts is None else prompts
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
    return {"suite": "world", "n": n, "metrics": {name: share(given) for name, given in answers.items() if given}}
