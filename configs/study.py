"""The base of the study (docs/study.md): one change to this at a time, at equal compute.

Source: configs/world.py, with a transformer of 4 layers of 128 (1.25 M parameters) that learns alone: it reads with the
text encoder of world-1, which is kept as it is. Every row is one clip of 64x64 and 17 frames with one short caption.

    python docs/study.py base
    sora-jax train --config study --workdir runs/study --config.data.latents=LATENTS     # what that runs

Cost: 960 steps of 48 rows, 38 TFLOP; 8.6 min of steps on two cores beside other work. Validation loss .579 (ten fixed
levels, averaged parameters). `docs/study.py` sets what depends on the number of steps (warm-up, average, validation).
"""

import ml_collections

BASE = "world"


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.transformer = {"n_layers": 4, "n_heads": 4, "head_dim": 32, "ffn_dim": 512}
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
    config.optimizer = {"warmup_steps": 48}
    config.train = {
        "init": "world-1",
        "learns": "transformer",
        "anew": True,
        "steps": 960,
        "ema": 0.9896,
        "log_every": 40,
        "validate_every": 240,
        "sample_every": 0,
        "checkpoint_every": 120,
        "keep": 1,
    }
    return config
