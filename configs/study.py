"""The base of the study (docs/study.md): one change to this at a time, at equal compute.

Source: configs/world.py, with a transformer of 4 layers of 96 (0.72 M parameters) that learns alone: it reads with the
text encoder of world-1, which is kept as it is. Every row is one clip of 64x64 and 17 frames with one short caption.

    python docs/study.py base
    sora-jax train --config study --workdir runs/study --config.data.latents=LATENTS     # what that runs

Steps are small and many, and rates high: at equal compute rows of 12 and a rate of 8e-3 beat 48 and 3e-3, with which
world-1 began, by as much as five times the compute does (docs/study.md). `docs/study.py` sets what depends on the
number of steps (warm-up, average, validation).
"""

import ml_collections

BASE = "world"


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.transformer = {"n_layers": 4, "n_heads": 3, "head_dim": 32, "ffn_dim": 384}
    config.data = {
        "autoencoder": "world-1",
        # as in the world that the held-out prompts are of
        "mix": {"single": 0.60, "pair": 0.25, "collision": 0.05},
        "image_share": 0.0,
        "row_text": 96,
        "seed": 0,
    }
    # Text to video alone; what the other skills cost is a row of the table.
    config.levels = {"modes": {"uniform": 1.0, "first": 0.0, "random": 0.0}}
    config.optimizer = {"learning_rate": 8e-3, "adam_learning_rate": 8e-3, "warmup_steps": 144}
    config.train = {
        "init": "world-1",
        "learns": "transformer",
        "anew": True,
        "steps": 2_880,
        "batch_size": 12,
        "ema": 0.9965,
        "log_every": 80,
        "validate_every": 720,
        "sample_every": 0,
        "checkpoint_every": 360,
        "keep": 1,
    }
    return config
