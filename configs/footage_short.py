"""From scratch on real footage, stage 3 of 4: videos of two seconds, and images beside them.

Source: as configs/footage_images.py, whose run it goes on from.

    sora-jax train --config footage_short --workdir runs/footage_short --config.data.latents=runs/latents_short

A row of 15,600 tokens holds a clip of 33 frames of 832x480 at 16 fps and an image; half of the clips are cut to images.
One in five clips has its first frame given, so that the model learns to animate an image.

Cost: docs/plans.md, by `sora-jax plan --config footage_short --topology v6e-64`. Result: not yet run.
Next: configs/footage_long.py. What is not said here is as in configs/footage_images.py.
"""

import ml_collections

BASE = "footage_images"


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.data = {"frames": 33, "image_share": 0.5, "row_tokens": 15600, "row_text": 1024, "groups": 10}
    config.levels = {"shift": 5.0, "modes": {"uniform": 0.8, "first": 0.2}}
    config.optimizer = {"learning_rate": 5e-5, "warmup_steps": 500}
    config.train = {"init": "runs/footage_images", "anew": False, "steps": 60_000, "batch_size": 128}
    config.sample = {"shift": 5.0, "frames": 33}
    return config
