"""The second world's text encoder learns to read: as configs/world_text.py, on captions of the second world.

    sora-jax train --config world_2_text --workdir runs/text

The same byte-level UMT5 of 0.6 M parameters; 29 questions, with three objects, relations and what they are to, what is
in front, meetings, the camera, light, textures and characters who stay (sora_jax/data/world/questions.py). `world_2`
starts from it. Result: docs/world.md.
"""

import ml_collections

BASE = "world_text"
LIKE = {"data.mix": "world_2"}


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.data = {"row_text": 224}  # dense captions go up to 220 bytes, and their end is marked
    return config
