"""Wan 2.2 TI2V, 5B, at 704p: from text, and from a first frame, tuned on videos of your own.

Source: Wan (arXiv:2503.20314); weights Wan-AI/Wan2.2-TI2V-5B-Diffusers, Apache-2.0.

    sora-jax encode FOLDER --autoencoder MODEL --out runs/latents --frames 121 --height 704 --width 1280 --fps 24
    sora-jax train --config wan_5b --workdir runs/wan_5b --config.train.init=MODEL --config.data.autoencoder=MODEL \
        --config.data.latents=runs/latents
    ... --config.train.learns=lora --config.transformer.lora_rank=16      # adapters in place of the whole transformer

MODEL is the model's folder, or its hub name. A clip of 121 frames of 1280x704 is 27,280 tokens, one a row. The text
encoder is kept as it is. Not yet run on the real weights: cost and result are not known.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.autoencoder = {  # the 2.2 form: stride 4x16x16
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "is_residual": True,
        "patch_size": 2,
    }
    config.transformer = {
        "n_layers": 30,
        "n_heads": 24,
        "head_dim": 128,
        "ffn_dim": 14336,
        "in_channels": 48,
        "out_channels": 48,
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
        "autoencoder": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        "frames": 121,
        "height": 704,
        "width": 1280,
        "fps": 24.0,
        "held_out": 8,
        "image_share": 0.0,
        "row_tokens": 27280,
        "row_text": 512,
        "groups": 31,
    }
    config.levels = {
        "mean": 0.0,
        "std": 1.0,
        "shift": 5.0,
        "modes": {"uniform": 0.5, "per_frame": 0.0, "first": 0.5, "last": 0.0, "both": 0.0, "random": 0.0},
    }
    config.optimizer = {
        "name": "adamw",
        "learning_rate": 1e-05,
        "schedule": "constant",
        "warmup_steps": 100,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
    }
    config.train = {
        "stage": "diffusion",
        "init": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
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
        "frames": 121,
        "height": 704,
        "width": 1280,
        "fps": 24.0,
        "prompts": (),
    }
    return config
