"""The runs of the study (docs/study.py): each a row of its tables, as flags over one base.

A training differs from configs/study.py in one thing. A run of the group `sampling` trains nothing: it is a way to
sample a model that ships.
"""

from __future__ import annotations

from dataclasses import dataclass

BASE = "study"  # the config that a run changes one thing of
BASE_STEPS = 2_880
BASE_WIDTH = 96
MODEL = "world-1"  # whose autoencoder made the latents, whose text encoder is read with, and which is sampled


@dataclass(frozen=True)
class Run:
    """One row."""

    name: str
    group: str
    what: str  # as the tables call it
    flags: str = ""  # "section.key=value ..."; of `sora-jax eval` in the group `sampling`. {work} is the folder --work
    width: int = 0  # of a point of the scaling curve, which has steps in proportion; 0 = steps of equal compute
    needs: tuple[str, ...] = ("latents",)  # of PREPARED
    judged: bool = True  # on held-out prompts
    same_latents: bool = True  # as the base: else their losses do not compare


_CLIPS = "--clips 20480 --seed 40"
_SHORT = "--config.train.steps=800 --config.train.batch_size=2 --config.data.seed=42"

# What is made before, once, under WORK/made: commands that go on where they were stopped.
PREPARED = {
    "latents": f"encode world --autoencoder {MODEL} {_CLIPS} --out {{work}}/made/latents",
    # text encoders: one as its initialiser left it (a step at rate 0), and one that has learned to read
    "untrained": "train --config world_text --workdir {work}/made/untrained --config.train.steps=1 "
    "--config.optimizer.learning_rate=0 --config.data.seed=41",
    "reader": "train --config world_text --workdir {work}/made/reader --config.train.steps=1000 --config.data.seed=41",
    # Two autoencoders, alike in operations and in values for a clip, from the same few clips: 16x16x4 and 8x8x4. No
    # shipped one is used: it has learned for hours.
    "autoencoder-16": f"train --config world_autoencoder --workdir {{work}}/made/autoencoder-16 {_SHORT}",
    "autoencoder-8": f"train --config world_autoencoder --workdir {{work}}/made/autoencoder-8 {_SHORT} "
    "--config.autoencoder.patch_size=2 --config.autoencoder.z_dim=8 "
    "--config.autoencoder.base_dim=16 --config.autoencoder.decoder_base_dim=8",
    "latents-16": f"encode world --autoencoder {{work}}/made/autoencoder-16 {_CLIPS} --out {{work}}/made/latents-16",
    "latents-8": f"encode world --autoencoder {{work}}/made/autoencoder-8 {_CLIPS} --out {{work}}/made/latents-8",
}


def _width(width: int) -> str:
    return f"transformer.n_heads={width // 32} transformer.ffn_dim={4 * width}"


def _rate(rate: float) -> str:
    return f"optimizer.learning_rate={rate:g} optimizer.adam_learning_rate={rate:g}"


_JOINT = "train.learns=all train.anew=False"
_FROZEN_READER = "train.init={work}/made/reader"

RUNS = (
    Run("base", "seeds", "the base", width=BASE_WIDTH),
    Run("seed-1", "seeds", "another seed", "train.seed=1 data.seed=1", judged=False),
    Run("seed-2", "seeds", "a third seed", "train.seed=2 data.seed=2", judged=False),
    # the rate is found at the two smallest widths (the base is the second), and carried over
    Run("scale-64", "scaling", "64 wide", _width(64), width=64),
    Run("rate-64-low", "rates", "64 wide, half the rates", f"{_width(64)} {_rate(4e-3)}", width=64, judged=False),
    Run("rate-64-high", "rates", "64 wide, twice the rates", f"{_width(64)} {_rate(16e-3)}", width=64, judged=False),
    Run("scale-128", "scaling", "128 wide", _width(128), width=128),
    Run("scale-160", "scaling", "160 wide", _width(160), width=160),
    Run("scale-192", "scaling", "192 wide", _width(192), width=192),
    Run("scale-224", "scaling", "224 wide, predicted before", _width(224), width=224),
    Run("rows-6", "batch", "6 rows a step (base: 12), rates of 6e-3", f"train.batch_size=6 {_rate(6e-3)}"),
    Run("rows-24", "batch", "24 rows a step, rates of 1.2e-2", f"train.batch_size=24 {_rate(12e-3)}"),
    Run("rows-48", "batch", "48 rows a step, rates of 1.6e-2", f"train.batch_size=48 {_rate(16e-3)}"),
    Run(
        "as-world-1",
        "batch",
        "48 rows a step, rates of 3e-3 and 1.5e-3, with which world-1 began",
        "train.batch_size=48 optimizer.learning_rate=0.003 optimizer.adam_learning_rate=0.0015",
    ),
    Run("rate-low", "optimizer", "Muon at half the rates (4e-3)", _rate(4e-3)),
    Run("rate-high", "optimizer", "Muon at twice the rates (1.6e-2)", _rate(16e-3)),
    Run("muon-3", "optimizer", "Muon, 3 iterations (base: 5)", "optimizer.muon_iterations=3"),
    Run("adamw-2e-3", "optimizer", "AdamW, 2e-3", f"optimizer.name=adamw {_rate(2e-3)}"),
    Run("adamw-4e-3", "optimizer", "AdamW, 4e-3", f"optimizer.name=adamw {_rate(4e-3)}"),
    Run("adamw-8e-3", "optimizer", "AdamW, 8e-3", f"optimizer.name=adamw {_rate(8e-3)}"),
    Run("linear", "optimizer", "rate falls linearly (base: cosine)", "optimizer.schedule=linear"),
    Run("shift-1", "levels", "levels not moved towards noise (shift 1; base 2)", "levels.shift=1.0"),
    Run("shift-4", "levels", "levels moved further (shift 4)", "levels.shift=4.0"),
    Run("wide-levels", "levels", "wider density of levels (std 1.5; base 1)", "levels.std=1.5"),
    Run(
        "skills",
        "levels",
        "given first and random frames trained too (.1 and .05 of the clips)",
        "levels.modes.uniform=0.85 levels.modes.first=0.1 levels.modes.random=0.05",
    ),
    Run("ema-0", "average", "no average of parameters", "train.ema=0.0"),
    Run("ema-short", "average", "average over 60 steps (base 288)", "train.ema=0.9833"),
    Run("ema-long", "average", "average over 1,500 steps", "train.ema=0.99933"),
    Run("deep", "shape", "8 layers of 64 (base: 4 of 96)", f"transformer.n_layers=8 {_width(64)}"),
    Run("shallow", "shape", "2 layers of 128", f"transformer.n_layers=2 {_width(128)}"),
    Run(
        "wide-heads",
        "shape",
        "1 head of 96 (base: 3 of 32)",
        "transformer.n_heads=1 transformer.head_dim=96",
    ),
    Run(
        "routed",
        "routing",
        "half of the tokens pass by the two middle blocks in training (TREAD)",
        "transformer.route_share=0.5",
    ),
    Run(
        "routed-deep",
        "routing",
        "8 layers of 64, half of the tokens pass by all but the first and the last",
        f"transformer.n_layers=8 {_width(64)} transformer.route_share=0.5",
    ),
    Run("patch-2", "patch", "patches of 2x2 latents (base: 1x1)", "transformer.patch=(1,2,2) data.row_tokens=20"),
    Run(
        "autoencoder-16",
        "autoencoder",
        "latents 16x16x4 of a short-trained autoencoder",
        "data.latents={work}/made/latents-16 data.autoencoder={work}/made/autoencoder-16",
        needs=("autoencoder-16", "latents-16"),
        same_latents=False,
    ),
    Run(
        "autoencoder-8",
        "autoencoder",
        "latents 8x8x4 of one like it, patches of 2x2",
        "data.latents={work}/made/latents-8 data.autoencoder={work}/made/autoencoder-8 transformer.patch=(1,2,2) "
        "transformer.in_channels=8 transformer.out_channels=8",
        needs=("autoencoder-8", "latents-8"),
        same_latents=False,
    ),
    Run("joint", "text", "text encoder from nothing, learns too", f"train.init= {_JOINT}"),
    Run(
        "untrained",
        "text",
        "text encoder as initialised, kept",
        "train.init={work}/made/untrained",
        needs=("latents", "untrained"),
    ),
    Run(
        "reader",
        "text",
        "text encoder that learned to read (1,000 steps), kept",
        _FROZEN_READER,
        needs=("latents", "reader"),
    ),
    Run(
        "reader-joint",
        "text",
        "the same, learns too",
        f"{_FROZEN_READER} {_JOINT}",
        needs=("latents", "reader"),
    ),
    Run("bfloat16", "precision", "activations in bfloat16", "train.dtype=bfloat16"),
    Run("guidance-1", "sampling", "guidance 1 (none)", "--steps 30 --guidance 1", needs=()),
    Run("guidance-2", "sampling", "guidance 2", "--steps 30 --guidance 2", needs=()),
    Run("guidance-3", "sampling", "guidance 3, 30 steps of UniPC: as shipped", "--steps 30 --guidance 3", needs=()),
    Run("guidance-5", "sampling", "guidance 5", "--steps 30 --guidance 5", needs=()),
    Run("guidance-8", "sampling", "guidance 8", "--steps 30 --guidance 8", needs=()),
    Run("steps-4", "sampling", "4 steps", "--steps 4 --guidance 3", needs=()),
    Run("steps-8", "sampling", "8 steps", "--steps 8 --guidance 3", needs=()),
    Run("steps-15", "sampling", "15 steps", "--steps 15 --guidance 3", needs=()),
    Run("steps-60", "sampling", "60 steps", "--steps 60 --guidance 3", needs=()),
    Run("euler-15", "sampling", "15 steps of Euler", "--steps 15 --guidance 3 --solver euler", needs=()),
    Run("dpmpp-15", "sampling", "15 steps of DPM-Solver++(2M)", "--steps 15 --guidance 3 --solver dpmpp_2m", needs=()),
    Run("heun-8", "sampling", "8 steps of Heun, 15 calls", "--steps 8 --guidance 3 --solver heun", needs=()),
)
_POINTS = [run for run in RUNS if run.group in ("seeds", "scaling") and run.width]
SCALE = tuple(run.name for run in sorted(_POINTS, key=lambda run: run.width))
PREDICTED = SCALE[-1]
