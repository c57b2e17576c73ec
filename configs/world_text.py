"""The world model's text encoder learns to read: captions of the procedural world -> what they say.

    sora-jax train --config world_text --workdir runs/text

A byte-level UMT5 of 0.6 M parameters and one linear layer that answers 14 questions about a caption (colours, shapes,
motions, grounds; sora_jax/data/world/questions.py). No frames are rendered. `world` starts from it:

    sora-jax train --config world --workdir runs/world --config.train.init=runs/text
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.text_encoder = {
        "vocab_size": 384,
        "d_model": 128,
        "d_kv": 64,
        "d_ff": 256,
        "num_layers": 3,
        "num_heads": 2,
    }
    config.data = {"source": "world", "row_text": 128, "held_out": 256}
    config.optimizer = {
        "name": "muon",
        "learning_rate": 5e-3,
        "adam_learning_rate": 3e-3,
        "schedule": "cosine",
        "warmup_steps": 50,
        "final_fraction": 0.05,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
    }
    config.train = {
        "stage": "text",
        "steps": 1_500,
        "batch_size": 128,
        "ema": 0.99,
        "log_every": 50,
        "validate_every": 250,
        "checkpoint_every": 500,
    }
    return config
