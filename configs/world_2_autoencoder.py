"""The second world's autoencoder: 17 frames of 96x96 pixels <-> 5 latents of 12x12x16.

Source: as configs/world_autoencoder.py, with Wan 2.1's stride (arXiv:2503.20314, section 4.1): 4 frames, 8x8 pixels.

    sora-jax train --config world_2_autoencoder --workdir runs/images --config.data.frames=1
    sora-jax train --config world_2_autoencoder --workdir runs/autoencoder --config.train.init=runs/images

A latent of world-1's is 16x16 pixels in 32 values. Here the same pixels have 64, and each of them looks at fewer: from
nothing, in the same three minutes, images come to 28.1 dB instead of 25.0. The transformer takes 2x2 of them as one
token, so that a clip has as many tokens as before. What is not said here is as there. Result: docs/world.md.
"""

import ml_collections

BASE = "world_autoencoder"
LIKE = {"data.mix": "world_2"}


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.autoencoder = {
        "patch_size": 2,
        "base_dim": 24,
        "dim_mult": (1, 2, 2),
        "decoder_base_dim": 16,
        "decoder_dim_mult": (2, 4, 8),
        "z_dim": 16,
    }
    config.data = {"height": 64, "width": 64, "image_share": 0.1}
    config.optimizer = {"muon_momentum": 0.9}
    config.train = {
        "steps": 1_600,
        "batch_size": 8,
        "log_every": 20,
        "validate_every": 200,
        "sample_every": 400,
        "checkpoint_every": 200,
    }
    return config
