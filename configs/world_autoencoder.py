"""The world model's autoencoder: 17 frames of 64x64 pixels <-> 5 latents of 4x4x32.

Source: the 2.2 form of Wan's autoencoder (arXiv:2503.20314; pixels folded 4x4 into channels, averaging and duplicating
shortcuts), trained on the procedural world (sora_jax/data/world).

    sora-jax train --config world_autoencoder --workdir runs/world_autoencoder

Two steps between three levels, each halving height, width and frame rate: stride 4 frames, 16x16 pixels. 7.8 M
parameters; an encoded clip costs 1.0 GFLOP, a decoded one 9.6: the decoder is wide where frames are small.

The sizes, loss and optimizer are those of world-1's autoencoder. Its encoder was trained in two runs beside a smaller
decoder: 2,406 steps (images, then 5 frames, then 17), and 1,401 steps of 8 clips more. The decoder was then trained
alone, from nothing, for 1,800 steps of 12 clips in bfloat16 (54 min on two cores with AMX):

    sora-jax train --config world_autoencoder --workdir runs/decoder --config.train.init=runs/world_autoencoder
    ... --config.reconstruction.train_encoder=False --config.reconstruction.kl=0 --config.train.dtype=bfloat16

Latents that were cached stay good under a decoder that learns alone. At last both went on together, for 1,300 steps of
12 clips in bfloat16 at a peak rate of 2e-3: from 31.5 to 32.7 dB on held-out clips. What it reaches: docs/world.md.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.autoencoder = {
        "patch_size": 4,
        "base_dim": 32,
        "decoder_base_dim": 16,
        "decoder_dim_mult": (4, 8, 8),
        "z_dim": 32,
        "dim_mult": (1, 2, 2),  # the averaging shortcut into the last level needs two equal entries at the end
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
        "name": "muon",
        "learning_rate": 2.5e-3,
        "schedule": "linear",
        "warmup_steps": 30,
        "final_fraction": 0.01,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
    }
    # Mostly squared error: L1 alone stalls near 19 dB, at the median colour.
    config.reconstruction = {"l1": 0.3, "l2": 4.0, "gradient": 0.3, "kl": 3e-5}
    config.train = {
        "stage": "autoencoder",
        "steps": 10_000,
        "batch_size": 6,
        "ema": 0.995,
        "log_every": 20,
        "validate_every": 500,
        "sample_every": 1000,
        "checkpoint_every": 500,
    }
    return config
