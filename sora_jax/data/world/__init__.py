"""The procedural world: a seeded, vectorised numpy world with captions and its exact truth. Imports numpy only.

scenes = world.sample_scenes(seed=0, n=4)            # what happens, exactly
video = world.render(scenes)                         # uint8 [4, 17, 64, 64, 3]
world.captions(scenes[0], np.random.default_rng(0))  # Captions(short, dense)
world.WorldSource(seed=0, n=200_000)[7]              # any clip, by number
"""

from sora_jax.data.world.captions import Captions, captions, dense_caption, short_caption, shot_captions
from sora_jax.data.world.prompts import ObjectTruth, Prompt, Story, Truth, heldout_prompts, prompts, stories, truth_of
from sora_jax.data.world.render import render
from sora_jax.data.world.sampling import sample_scene, sample_scenes
from sora_jax.data.world.scene import (
    COLORS,
    FPS,
    GROUNDS,
    SHAPES,
    Background,
    Event,
    Mix,
    Occluder,
    Scene,
    Shot,
    WorldObject,
    is_heldout,
)
from sora_jax.data.world.source import WorldSource

__all__ = [
    "COLORS",
    "FPS",
    "GROUNDS",
    "SHAPES",
    "Background",
    "Captions",
    "Event",
    "Mix",
    "ObjectTruth",
    "Occluder",
    "Prompt",
    "Scene",
    "Shot",
    "Story",
    "Truth",
    "WorldObject",
    "WorldSource",
    "captions",
    "dense_caption",
    "heldout_prompts",
    "is_heldout",
    "prompts",
    "render",
    "sample_scene",
    "sample_scenes",
    "short_caption",
    "shot_captions",
    "stories",
    "truth_of",
]
