"""The stories suite: clips with cuts, a prompt for each shot, judged by `shots`.

report = evaluate_stories(sample_fn, n=100, shots=(9, 9))
report["metrics"]["cut"]      # the share of clips whose cuts are where they were asked for, and no others
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sora_jax.data.world import Mix, Story, stories
from sora_jax.errors import UserError
from sora_jax.evaluation.intervals import share
from sora_jax.evaluation.shots import judge_shots

StoriesFn = Callable[[list[Story], list[int]], np.ndarray]
SHOTS = (9, 9)
SAME = 0.7  # the share of stories about one character, where the mix has none
ATTRIBUTES = ("color", "shape", "count", "motion", "all")


def evaluate_stories(
    sample_fn: StoriesFn,
    n: int = 100,
    seed: int = 0,
    batch_size: int = 20,
    *,
    shots: Sequence[int] = SHOTS,
    height: int = 64,
    width: int = 64,
    mix: Mix | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Asks for `n` held-out clips of several shots and judges what comes back.

    Args:
      sample_fn: (stories, seeds) of one batch -> uint8 [b, T, H, W, 3], T the sum of the shots. Clip k gets `seed + k`.
      n, seed, batch_size: how many, and which: the same seed asks for the same stories.
      shots: frames of each shot, 9 or more, as motion cannot be judged in fewer.
      height, width, mix: of the stories; in `SAME` of them a character stays over the cuts, if the mix says nothing.
      progress: called with (clips judged, n) after each batch.

    Returns:
      {"suite": "stories", "n": n, "metrics": {name: {"value", "low", "high", "n"}}}, shares with Wilson 95 % intervals:
      cut, over clips; shot.color, shot.shape, shot.count, shot.motion and shot.all (these four, and a relation), over
      shots, each against its own prompt; same, over clips that were to have one character; all, over clips.
    """
    if n < 1 or batch_size < 1:
        raise UserError(f"stories need at least one clip and a batch of one, not n={n}, batch_size={batch_size}")
    if len(shots) < 2 or min(shots) < 9:
        raise UserError(f"a story has two shots or more, of 9 frames or more, not {','.join(map(str, shots))}")
    mix = mix or Mix()
    asked = stories(
        n, seed, shots=tuple(shots), height=height, width=width, mix=mix if mix.same else replace(mix, same=SAME)
    )
    answers: dict[str, list[bool]] = {"cut": [], **{f"shot.{name}": [] for name in ATTRIBUTES}, "same": [], "all": []}
    for start in range(0, n, batch_size):
        batch = asked[start : start + batch_size]
        clips = sample_fn(batch, [seed + start + k for k in range(len(batch))])
        if clips.shape[:2] != (len(batch), sum(shots)):
            raise ValueError(f"sample_fn gave {clips.shape} for {len(batch)} stories of {sum(shots)} frames")
        for story, frames in zip(batch, clips, strict=True):
            truths = [prompt.truth for prompt in story.prompts]
            verdict = judge_shots(frames, story.lengths, truths, story.same)
            answers["cut"].append(verdict.cuts)
            answers["all"].append(verdict.all)
            for shot in verdict.shots:
                for name in ATTRIBUTES:
                    answers[f"shot.{name}"].append(getattr(shot, name))
            if verdict.same is not None:
                answers["same"].append(verdict.same)
        if progress is not None:
            progress(min(start + batch_size, n), n)
    return {"suite": "stories", "n": n, "metrics": {name: share(given) for name, given in answers.items() if given}}
