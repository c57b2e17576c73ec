"""Wan 2.2 text to video, A14B (two experts of 14B), at 720p: one expert tuned on videos of your own.

Source: Wan (arXiv:2503.20314) and its second release; weights Wan-AI/Wan2.2-T2V-A14B-Diffusers, Apache-2.0.

    sora-jax encode FOLDER --autoencoder MODEL --out runs/latents --frames 81 --height 720 --width 1280 --fps 16
    sora-jax train --config wan_a14b --workdir runs/high --config.train.init=MODEL --config.data.autoencoder=MODEL \
        --config.data.latents=runs/latents
    ... --workdir runs/low --config.train.expert=low                      # the other expert, in a run of its own
    ... --config.train.learns=lora --config.transformer.lora_rank=16      # adapters in place of a whole expert

MODEL is the model's folder, or its hub name. A run draws only the levels of its expert: from .875 up, or below. Each
exports as the whole model with its own expert tuned; adapters of both go together at sampling, `--lora high:FILE --lora
low:FILE`. Not yet run on the real weights: cost and result are not known. What is not said here is as in
configs/wan_14b.py.
"""

import ml_collections

BASE = "wan_14b"
MODEL = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.data = {"autoencoder": MODEL}
    config.train = {"init": MODEL, "expert": "high"}
    config.sample = {"steps": 40, "guidance": 4.0, "shift": 12.0}
    return config
