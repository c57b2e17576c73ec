"""The second world at 96x96: relations, depth, meetings, walls, no gravity, cameras, lights and textured floors.

Source: as configs/world.py, on more of the procedural world (docs/world.md, "The second world").

    sora-jax data preview world --config world_2 --sheet world-2.png
    sora-jax train --config world_2_autoencoder --workdir runs/autoencoder
    sora-jax train --config world_2_text --workdir runs/text --config.train.init=world-1
    sora-jax train --config world_2 --workdir runs/world_2 --config.train.init=world-1 \
        --config.train.other_latents=True --config.train.text_init=runs/text --config.data.autoencoder=runs/autoencoder

It goes on from world-1's transformer, whose blocks understand the new latents after 400 steps; from nothing, reading
sets in late (docs/world.md). A token is 2x2 latents of 8x8 pixels. A clip of 17 frames is 180 tokens at 96x96 and 270
at 96x144, one of two shots of 9 frames 216 and 324; captions go up to 96 bytes, dense ones up to 220. What is not said
here is as in configs/world.py. Result: docs/world.md.
"""

import ml_collections

BASE = "world"


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.transformer = {"in_channels": 16, "out_channels": 16, "patch": (1, 2, 2)}
    config.data = {
        "height": 96,
        "width": 96,
        "sizes": ((96, 96), (96, 144), (144, 96)),
        "shots": ((17,), (17,), (9, 9)),
        "image_share": 0.1,
        "prefix_share": 0.05,
        "window_share": 0.04,
        "shot_dropout": 0.1,
        "row_tokens": 324,
        "row_text": 320,
        "groups": 9,
        "mix": {
            # what the first world has
            "single": 0.22,
            "pair": 0.14,
            "collision": 0.03,
            "occluder": 0.02,
            "pan": 0.02,
            # and what it has not
            "trio": 0.08,
            "relation": 0.12,
            "depth": 0.08,
            "passing": 0.07,
            "meeting": 0.07,
            "wall": 0.05,
            "floating": 0.06,
            "travel": 0.04,
            "lit": 0.3,
            "textured": 0.35,
            "same": 0.7,
        },
    }
    # Every skill that the canvases call on, text to video first.
    config.levels = {
        "modes": {
            "uniform": 0.6,
            "per_frame": 0.03,
            "first": 0.12,
            "last": 0.03,
            "both": 0.04,
            "random": 0.04,
            "rolling": 0.04,
            "shots": 0.04,
            "inside": 0.02,
            "outside": 0.02,
            "blocks": 0.02,
        }
    }
    config.optimizer = {
        "learning_rate": 3e-3,
        "adam_learning_rate": 3e-3,
        "muon_iterations": 3,
        "schedule": "linear",
        "warmup_steps": 50,
        "final_fraction": 0.1,
    }
    config.train = {"batch_size": 12, "ema": 0.998}
    config.sample = {
        "height": 96,
        "width": 96,
        "prompts": (
            "a red ball to the left of a blue square",
            "a small green star passes to the right behind a large yellow square",
            "a purple ball floats up and to the right without gravity",
            "three small cyan balls bounce on a checkered gray floor in warm light",
        ),
    }
    return config
