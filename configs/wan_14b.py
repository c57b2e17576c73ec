"""Wan 2.1 text to video, 14B, at 720p, tuned on videos of your own.

Source: Wan (arXiv:2503.20314); weights Wan-AI/Wan2.1-T2V-14B-Diffusers, Apache-2.0.

    sora-jax encode FOLDER --autoencoder MODEL --out runs/latents --frames 81 --height 720 --width 1280 --fps 16
    sora-jax train --config wan_14b --workdir runs/wan_14b --config.train.init=MODEL --config.data.autoencoder=MODEL \
        --config.data.latents=runs/latents
    ... --config.train.learns=lora --config.transformer.lora_rank=16      # adapters in place of the whole transformer

MODEL is the model's folder, or its hub name. A clip of 81 frames of 1280x720 is 75,600 tokens, one a row. The text
encoder is kept as it is. Not yet run on the real weights: cost and result are not known. What is not said here is as
in configs/wan_1_3b.py.
"""

import ml_collections

BASE = "wan_1_3b"
MODEL = "Wan-AI/Wan2.1-T2V-14B-Diffusers"


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.transformer = {"n_layers": 40, "n_heads": 40, "ffn_dim": 13824}
    config.data = {"autoencoder": MODEL, "height": 720, "width": 1280, "row_tokens": 75600}
    config.levels = {"shift": 5.0}
    config.optimizer = {"learning_rate": 5e-06}
    config.train = {"init": MODEL}
    config.sample = {"guidance": 5.0, "shift": 5.0, "height": 720, "width": 1280}
    return config
