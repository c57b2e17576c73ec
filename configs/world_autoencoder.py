"""The world model's autoencoder: 17 frames of 64x64 pixels <-> 5 latents of 4x4x32.

Source: the 2.2 form of Wan's autoencoder (arXiv:2503.20314; pixels folded 4x4 into channels, averaging and duplicating
shortcuts), trained on the procedural world (sora_jax/data/world).

    sora-jax train --config world_autoencoder --workdir runs/world_autoencoder

Two steps between three levels, each halving height, width and frame rate: stride 4 frames, 16x16 pixels.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.autoencoder = {
        "patch_size": 4,
        "base_dim": 24,
        "decoder_base_dim": 40,
        "z_dim": 32,
        "dim_mult": (1, 4, 4),  # the averaging shortcut into the last level needs two equal entries at the end
        "num_res_blocks": 1,
        "temperal_downsample": (True, True),
        "is_residual": True,
    }
    config.data = {
        "source": "world",
        "frames": 17,
        "height": 64,
        "width": 64,
        "fps": 8.0,
        "image_share": 0.3,
    }
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "warmup_steps": 200,
        "final_fraction": 0.02,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
    }
    config.train = {
        "stage": "autoencoder",
        "steps": 10_000,
        "batch_size": 16,
        "ema": 0.999,
        "log_every": 20,
        "validate_every": 500,
        "sample_every": 1000,
        "checkpoint_every": 500,
    }
    return config
