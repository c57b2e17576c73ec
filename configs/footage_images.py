"""From scratch on real footage, stage 2 of 4: the transformer, of 1.3B width, learns images.

Source: the stages of Wan (arXiv:2503.20314, section 4.2): images first, then short videos, then long ones.

    sora-jax encode FOLDER --autoencoder runs/footage_autoencoder --out runs/latents_short --frames 33 --height 480 \
        --width 832 --fps 16
    sora-jax train --config footage_images --workdir runs/footage_images --config.data.latents=runs/latents_short

FOLDER holds videos and images with captions. The cache serves the next stage too: here every clip is cut to its first
frame. Four images of 832x480 share a row of 6,240 tokens. The transformer starts from nothing (`train.anew`) beside the
text encoder of an open model (UMT5-XXL), which is kept.

Cost: docs/plans.md, by `sora-jax plan --config footage_images --topology v6e-64`. Result: not yet run.
Next: configs/footage_short.py. What is not said here is as in configs/wan_1_3b.py.
"""

import ml_collections

BASE = "wan_1_3b"


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.data = {
        "autoencoder": "runs/footage_autoencoder",
        "held_out": 256,
        "frames": 1,
        "image_share": 1.0,
        "row_tokens": 6240,
        "row_text": 2048,
        "groups": 4,
        "workers": 8,
    }
    config.levels = {"shift": 3.0}
    config.optimizer = {"learning_rate": 1e-4, "warmup_steps": 2_000, "weight_decay": 0.01}
    config.train = {
        "anew": True,
        "steps": 100_000,
        "batch_size": 256,
        "ema": 0.9999,
        "log_every": 50,
        "validate_every": 2_000,
        "checkpoint_every": 1_000,
    }
    config.sample = {"shift": 3.0, "frames": 1}
    return config
