"""Draws the pictures of the README and of docs/world.md from a model and the log of its run.

python docs/figures.py sheet world docs/images/world-1.png
python docs/figures.py curve docs/runs/world-1.jsonl docs/images/world-1-curve.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

PROMPTS = (
    "a red ball bounces on a blue floor",
    "a green square slides left",
    "a yellow star rests on a gray background",
    "a small purple triangle falls on a pink floor",
    "a large cyan ball grows",
    "two orange squares slide to the right",
    "a pink ball orbits",
    "a blue star moves up on a yellow background",
)
FRAMES = (0, 3, 6, 9, 12, 15)


def sheet(model: str, out: Path) -> None:
    """Every prompt with frames of its video, seed 0."""
    from sora_jax.pipeline import Pipeline

    pipe = Pipeline.load(model)
    videos = [pipe.sample(prompt, seed=0) for prompt in PROMPTS]
    figure, axes = plt.subplots(len(PROMPTS) // 2, 2, figsize=(12, 1.25 * len(PROMPTS) // 2 + 0.4))
    for axis, prompt, video in zip(axes.ravel(), PROMPTS, videos, strict=True):
        frames = [np.pad(video.frames[i], ((0, 0), (0, 2), (0, 0)), constant_values=255) for i in FRAMES]
        axis.imshow(np.concatenate(frames, axis=1), interpolation="nearest")
        axis.set_title(prompt, fontsize=10, loc="left", pad=3)
        axis.axis("off")
    figure.tight_layout(pad=0.6)
    figure.savefig(out, dpi=110)


def curve(log: Path, out: Path) -> None:
    """Training loss, and validation loss at fixed noise levels."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axis = plt.subplots(figsize=(7, 3.6))
    axis.plot([x["step"] for x in lines], [x["loss"] for x in lines], color="0.75", lw=1, label="training")
    checked = [x for x in lines if "validation_loss" in x]
    levels = [key for key in checked[-1] if key.startswith("validation_loss_")]
    for i, key in enumerate(levels[::3]):
        color = plt.cm.viridis(i / max(len(levels[::3]) - 1, 1))
        axis.plot(
            [x["step"] for x in checked], [x[key] for x in checked], "o-", ms=3, color=color, label=f"σ = {key[-4:]}"
        )
    axis.set(xlabel="step", ylabel="velocity error", ylim=(0, 1.5))
    axis.legend(fontsize=8, ncols=2)
    axis.grid(alpha=0.2)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=["sheet", "curve"])
    parser.add_argument("source")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    sheet(args.source, args.out) if args.figure == "sheet" else curve(Path(args.source), args.out)
