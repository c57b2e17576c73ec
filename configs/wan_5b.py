"""Wan 2.2 TI2V, 5B, at 704p: from text, and from a first frame, tuned on videos of your own.

Source: Wan (arXiv:2503.20314); weights Wan-AI/Wan2.2-TI2V-5B-Diffusers, Apache-2.0.

    sora-jax encode FOLDER --autoencoder MODEL --out runs/latents --frames 121 --height 704 --width 1280 --fps 24
    sora-jax train --config wan_5b --workdir runs/wan_5b --config.train.init=MODEL --config.data.autoencoder=MODEL \
        --config.data.latents=runs/latents
    ... --config.train.learns=lora --config.transformer.lora_rank=16      # adapters in place of the whole transformer

MODEL is the model's folder, or its hub name. A clip of 121 frames of 1280x704 is 27,280 tokens, one a row. The text
encoder is kept as it is. Not yet run on the real weights: cost and result are not known. What is not said here is as
in configs/wan_1_3b.py.
"""

import ml_collections

BASE = "wan_1_3b"
MODEL = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.autoencoder = {  # the 2.2 form: stride 4x16x16
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "is_residual": True,
        "patch_size": 2,
    }
    config.transformer = {"n_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
    config.data = {
        "autoencoder": MODEL,
        "frames": 121,
        "height": 704,
        "width": 1280,
        "fps": 24.0,
        "row_tokens": 27280,
        "groups": 31,
    }
    config.levels = {"shift": 5.0, "modes": {"uniform": 0.5, "first": 0.5}}
    config.train = {"init": MODEL}
    config.sample = {"guidance": 5.0, "shift": 5.0, "frames": 121, "height": 704, "width": 1280, "fps": 24.0}
    return config
