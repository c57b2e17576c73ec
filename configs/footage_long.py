"""From scratch on real footage, stage 4 of 4: videos of ten seconds, and images beside them.

Source: as configs/footage_short.py, whose run it goes on from.

    sora-jax encode FOLDER --autoencoder runs/footage_autoencoder --out runs/latents_long --frames 161 --height 480 \
        --width 832 --fps 16
    sora-jax train --config footage_long --workdir runs/footage_long --config.data.latents=runs/latents_long
    sora-jax export runs/footage_long exported/footage --dtype bfloat16

A row of 65,520 tokens holds a clip of 161 frames of 832x480 at 16 fps and an image, and lies on two devices.

Cost: docs/plans.md, by `sora-jax plan --config footage_long --topology v6e-64`. Result: not yet run.
What is not said here is as in configs/footage_short.py.
"""

import ml_collections

BASE = "footage_short"


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.data = {"frames": 161, "row_tokens": 65520, "groups": 42}
    config.levels = {"shift": 8.0}
    config.optimizer = {"learning_rate": 2e-5}
    config.train = {
        "init": "runs/footage_short",
        "steps": 20_000,
        "batch_size": 32,
        "mesh": {"data": 1, "fsdp": -1, "sequence": 2},
    }
    config.sample = {"shift": 8.0, "frames": 161}
    return config
