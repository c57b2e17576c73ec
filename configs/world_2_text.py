"""The second world's text encoder learns to read: as configs/world_text.py, on captions of the second world.

    sora-jax train --config world_2_text --workdir runs/text --config.train.init=world-1

The same byte-level UMT5 of 0.6 M parameters, which goes on from world-1's; 29 questions, with three objects, relations
and what they are to, what is in front, meetings, the camera, light, textures and characters who stay
(sora_jax/data/world/questions.py). `world_2` starts from it, with world-1's transformer, and so its embeddings stay
near world-1's: with them that one still makes 70 % of its own prompts whole, and with ones that go where they like
none.

Cost: 11 min on one core of an EPYC. Expected: 80 % of questions right after 175 steps, 90 % after 400, 92.6 % at the
end, where 24 % of held-out captions have every answer right; embeddings have moved by 7 % of their square.
"""

import ml_collections

BASE = "world_text"
LIKE = {"data.mix": "world_2"}


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.data = {"row_text": 224}  # dense captions go up to 220 bytes, and their end is marked
    config.reading = {"anchor": 1.0}
    config.optimizer = {"learning_rate": 2e-3, "adam_learning_rate": 1e-3, "schedule": "linear"}
    config.train = {"steps": 600, "batch_size": 48}
    return config
