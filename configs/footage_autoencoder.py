"""From scratch on real footage, stage 1 of 4: the video autoencoder, in the form of Wan 2.1.

Source: Wan (arXiv:2503.20314, section 4.1). 127 M parameters, stride 4 frames and 8x8 pixels, 16 channels.

    sora-jax train --config footage_autoencoder --workdir runs/footage_autoencoder --config.data.source=FOLDER

FOLDER holds videos and images; captions are not needed. Clips of 17 frames of 256x256, three batches in ten of images.
Trained on errors of pixels and edges alone, without a perceptual or adversarial loss: what it decodes will be softer
than the open model's. Whoever would rather not train one names that in the stages that follow:
`--config.data.autoencoder=Wan-AI/Wan2.1-T2V-1.3B-Diffusers`.

Cost: docs/plans.md, by `sora-jax plan --config footage_autoencoder --topology v6e-64`. Result: not yet run.
Next: configs/footage_images.py.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.autoencoder = {"base_dim": 96, "z_dim": 16}
    config.data = {"source": "videos", "frames": 17, "height": 256, "width": 256, "fps": 16.0, "held_out": 64}
    config.reconstruction = {"l1": 1.0, "l2": 1.0, "gradient": 0.3, "kl": 3e-6}
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 1e-4,
        "schedule": "cosine",
        "warmup_steps": 1_000,
        "final_fraction": 0.05,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
    }
    config.train = {
        "stage": "autoencoder",
        "steps": 100_000,
        "batch_size": 64,
        "ema": 0.999,
        "log_every": 50,
        "validate_every": 2_000,
        "sample_every": 2_000,
        "checkpoint_every": 1_000,
        "mesh": {"data": -1},
    }
    return config
