"""The world model: 64x64 videos of 17 frames at 8 fps, and images, from text; the diffusion stage.

Source: the forms of Wan (arXiv:2503.20314) at 1/400 of its size, trained on the procedural world (sora_jax/data/world).

    sora-jax train --config world_text --workdir runs/text
    sora-jax train --config world --workdir runs/world --config.train.init=runs/text

One clip is 80 tokens of 4x4 latents in 5 latent frames; an image is 16 tokens, and several share a row. The text
encoder starts from one that can read (configs/world_text.py); world-1's first version, without, is in docs/world.md.

Cost: world-1 began with 6 layers (`--config.transformer.n_layers=6`): 1.1 steps/s on two quiet cores with AVX-512,
65 min for the first 4,250 steps (204,000 rows); then, in bfloat16, 58 min on other clips, 19 min on three sizes, and
58 + 18 + 56 + 14 min on the mix below and harder ones; then, made twice as deep, 80 + 17 min (flags: docs/world.md).
Expected loss (training, over all levels): .36 after 1,000 steps, .26 after 2,300, .21 after 3,600; validation at ten
fixed levels, averaged parameters: .42 after 1,000 steps, .30 after 3,600. What it reaches: docs/world.md.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.transformer = {
        "n_layers": 12,
        "n_heads": 3,  # few and wide: on a CPU softmax costs as much as the products
        "head_dim": 64,
        "ffn_dim": 768,
        "in_channels": 32,
        "out_channels": 32,
        "patch": (1, 1, 1),
        "text_dim": 128,
    }
    config.text_encoder = {
        "vocab_size": 384,
        "d_model": 128,
        "d_kv": 64,
        "d_ff": 256,
        "num_layers": 3,
        "num_heads": 2,
    }
    config.data = {
        "source": "world",
        "clips": 40_960,
        "frames": 17,
        "height": 64,
        "width": 64,
        "mix": {"single": 0.28, "pair": 0.47, "collision": 0.15},  # two objects are what it is slow to learn
        "fps": 8.0,
        "image_share": 0.15,
        "caption_dropout": 0.1,
        "row_tokens": 80,
        "row_text": 128,
        "skip_long_captions": True,
        "groups": 5,
    }
    # More noise than the logit-normal's middle: colour, count and place are decided there.
    config.levels = {
        "mean": 0.0,
        "std": 1.0,
        "shift": 2.0,
        "modes": {"uniform": 0.85, "per_frame": 0.0, "first": 0.1, "last": 0.0, "both": 0.0, "random": 0.05},
    }
    config.optimizer = {
        "name": "muon",
        "learning_rate": 3e-3,
        "adam_learning_rate": 1.5e-3,
        "schedule": "cosine",
        "warmup_steps": 150,
        "final_fraction": 0.02,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
    }
    config.train = {
        "stage": "diffusion",
        "steps": 5_000,
        "batch_size": 48,
        "ema": 0.999,
        "log_every": 20,
        "validate_every": 500,
        "sample_every": 1000,
        "checkpoint_every": 500,
    }
    config.sample = {
        "steps": 30,
        "guidance": 3.0,
        "shift": 1.0,
        "solver": "unipc",
        "frames": 17,
        "height": 64,
        "width": 64,
        "fps": 8.0,
        "prompts": (
            "a red ball bounces on a blue floor",
            "a green square slides to the right",
            "a yellow triangle falls",
            "a small purple circle grows",
        ),
    }
    return config
