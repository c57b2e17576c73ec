"""Wan 2.1 text to video, 14B, at 720p, tuned on videos of twenty seconds of your own.

Source: Wan (arXiv:2503.20314); weights Wan-AI/Wan2.1-T2V-14B-Diffusers, Apache-2.0.

    sora-jax encode FOLDER --autoencoder MODEL --out runs/latents --frames 321 --height 720 --width 1280 --fps 16
    sora-jax train --config wan_14b_20s --workdir runs/wan_14b_20s --config.train.init=MODEL \
        --config.data.autoencoder=MODEL --config.data.latents=runs/latents

A clip of 321 frames of 1280x720 is 291,600 tokens, one a row, over eight devices. The open model was trained on 81
frames. For a v5p-256: docs/plans.md has what it costs. Not yet run. What is not said here is as in configs/wan_14b.py.
"""

import ml_collections

BASE = "wan_14b"


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.data = {"frames": 321, "row_tokens": 291600, "groups": 81}
    config.train = {"batch_size": 16, "mesh": {"data": 1, "fsdp": -1, "sequence": 8}}
    config.sample = {"frames": 321}
    return config
