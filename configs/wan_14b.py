"""Wan 2.1 text to video, 14B, at 720p, tuned on videos of your own.

Source: Wan (arXiv:2503.20314); weights Wan-AI/Wan2.1-T2V-14B-Diffusers, Apache-2.0.

    sora-jax encode FOLDER --autoencoder MODEL --out runs/latents --frames 81 --height 720 --width 1280 --fps 16
    sora-jax train --config wan_14b --workdir runs/wan_14b --config.train.init=MODEL --config.data.autoencoder=MODEL \
        --config.data.latents=runs/latents
    ... --config.train.learns=lora --config.transformer.lora_rank=16      # adapters in place of the whole transformer

MODEL is the model's folder, or its hub name. A clip of 81 frames of 1280x720 is 75,600 tokens, one a row. The text
encoder is kept as it is. Not yet run on the real weights: cost and result are not known.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.transformer = {
        "n_layers": 40,
        "n_heads": 40,
        "head_dim": 128,
        "ffn_dim": 13824,
        "in_channels": 16,
        "out_channels": 16,
        "patch": (1, 2, 2),
        "text_dim": 4096,
        "remat": "full",
    }
    config.text_encoder = {  # UMT5-XXL, which does not learn
        "vocab_size": 256384,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
    }
    config.data = {
        "source": "videos",
        "autoencoder": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "frames": 81,
        "height": 720,
        "width": 1280,
        "fps": 16.0,
        "held_out": 8,
        "image_share": 0.0,
        "row_tokens": 75600,
        "row_text": 512,
        "groups": 21,
    }
    config.levels = {
        "mean": 0.0,
        "std": 1.0,
        "shift": 5.0,
        "modes": {"uniform": 1.0, "per_frame": 0.0, "first": 0.0, "last": 0.0, "both": 0.0, "random": 0.0},
    }
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 5e-06,
        "schedule": "constant",
        "warmup_steps": 100,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
    }
    config.train = {
        "stage": "diffusion",
        "init": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "learns": "transformer",
        "steps": 2_000,
        "batch_size": 8,
        "ema": 0.99,
        "log_every": 10,
        "validate_every": 200,
        "sample_every": 0,
        "checkpoint_every": 200,
        "mesh": {"data": 1, "fsdp": -1},
    }
    config.sample = {
        "steps": 50,
        "guidance": 5.0,
        "shift": 5.0,
        "solver": "unipc",
        "frames": 81,
        "height": 720,
        "width": 1280,
        "fps": 16.0,
        "prompts": (),
    }
    return config
