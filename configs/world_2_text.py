"""The second world's text encoder learns to read: as configs/world_text.py, on captions of the second world.

    sora-jax train --config world_2_text --workdir runs/text --config.train.init=world-1

The same byte-level UMT5 of 0.6 M parameters, which goes on from world-1's; 29 questions, with three objects, relations
and what they are to, what is in front, meetings, the camera, light, textures and characters who stay
(sora_jax/data/world/questions.py). `world_2` starts from it.

Cost: 14 min on one core of an EPYC. Expected: 86 % of questions right after 200 steps, 95 % after 600, 98.3 % at the
end, where 69 % of held-out captions have every answer right. At a rate of 8e-3 it stays near 81 % (docs/world.md).
"""

import ml_collections

BASE = "world_text"
LIKE = {"data.mix": "world_2"}


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.data = {"row_text": 224}  # dense captions go up to 220 bytes, and their end is marked
    config.optimizer = {"learning_rate": 3e-3, "adam_learning_rate": 1.5e-3, "schedule": "linear"}
    config.train = {"steps": 1_200, "batch_size": 48}
    return config
