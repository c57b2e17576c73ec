"""The second world's autoencoder: world-1's encoder and a decoder, 17 frames of 96x96 pixels <-> 5 latents of 6x6x32.

Source: as configs/world_autoencoder.py, on the second world (docs/world.md).

    sora-jax train --config world_2_autoencoder --workdir runs/autoencoder

The decoder goes on from world-1's. The encoder is kept, and with it the latents that world-1's transformer knows: after
200 steps of training it too, that transformer's first loss on the second world was 2.8, and on latents that were kept
.63. What is not said here is as there. Result: docs/world.md.
"""

import ml_collections

BASE = "world_autoencoder"
LIKE = {"data.mix": "world_2"}


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.data = {"height": 96, "width": 96, "image_share": 0.05}
    config.reconstruction = {"train_encoder": False, "kl": 0.0}
    config.optimizer = {"learning_rate": 2e-3, "warmup_steps": 20, "final_fraction": 0.01}
    config.train = {
        "init": "world",
        "steps": 1_500,
        "batch_size": 8,
        "dtype": "bfloat16",
        "log_every": 10,
        "validate_every": 100,
        "sample_every": 300,
        "checkpoint_every": 50,
    }
    return config
