"""Draws the curve of docs/world.md from the log of a run.

python docs/figures.py docs/runs/world-1.jsonl docs/images/world-1-curve.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt


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
    parser.add_argument("log", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    curve(args.log, args.out)
