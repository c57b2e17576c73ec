"""Adapters teach `world` a word that it never read, and it forgets nothing to speak of: a "zorb" is a purple ball.

What a user would do, by the same doors: a folder of clips with captions, `train` with `train.learns=lora`, `export
--layout lora`, `sample --lora`. Half of the folder are ordinary clips, so that the old words keep their meanings.

The adapters lie on the keys and values of the text cross-attention alone (Kumari et al. 2022, arXiv:2212.04488): what
has no new word in it changes little. With adapters on every kernel the word was learned as well, and old prompts fell
by 8 points. Captions are not dropped either, so that what is made without a prompt stays as it was.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from sora_jax import Pipeline
from sora_jax.data.world.captions import short_caption
from sora_jax.data.world.prompts import Prompt, truth_of
from sora_jax.data.world.render import render
from sora_jax.data.world.sampling import sample_scene
from sora_jax.data.world.scene import Mix, Scene
from sora_jax.evaluation.checkers import judge
from sora_jax.evaluation.suite import evaluate
from sora_jax.media import write_media
from sora_jax.record import Record

pytestmark = pytest.mark.learning

OF_EACH = 384  # clips of the new word, and as many of the old ones
SINGLE = Mix(pair=0.0, collision=0.0, occluder=0.0, pan=0.0)
OLD_PROMPTS, NEW_PROMPTS = 200, 48


def zorbs(seed: int) -> Iterator[tuple[Scene, Prompt]]:
    """Scenes with one purple ball, and a prompt that calls it a zorb."""
    index = 0
    while True:
        scene = sample_scene(seed, index, split="train", frames=17, height=64, width=64, mix=SINGLE)
        index += 1
        thing = scene.shot.objects[0]
        if (thing.color, thing.shape) != ("purple", "ball"):
            continue
        said = short_caption(scene.shot, np.random.default_rng((seed, index)))
        text, times = re.subn("purple (ball|circle)", "zorb", said.text)
        if times == 1:
            yield scene, Prompt(text, truth_of(scene.shot, said))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of adapters that a run on the folder learned."""
    root = tmp_path_factory.mktemp("zorb")
    new = [(scene, prompt.text) for (scene, prompt), _ in zip(zorbs(1), range(OF_EACH), strict=False)]
    old = [sample_scene(2, index, split="train", frames=17, height=64, width=64) for index in range(OF_EACH)]
    said = [(scene, short_caption(scene.shot, np.random.default_rng((3, scene.index))).text) for scene in old]
    folder = root / "clips"
    folder.mkdir()
    with (folder / "metadata.csv").open("w", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(["path", "text"])
        for number, (scene, text) in enumerate(new + said):
            record = Record(text, scene.index, "the world")
            write_media(render([scene])[0], folder / f"{number:03}.mp4", record, fps=8.0)
            rows.writerow([f"{number:03}.mp4", text])
    changes = {
        "data.source": folder,
        "data.held_out": 0,
        "data.image_share": 0.0,
        "data.caption_dropout": 0.0,
        "train.init": "world",
        "train.learns": "lora",
        "transformer.lora_rank": 8,
        "transformer.lora_targets": "cross_attn.k,cross_attn.v",
        "train.steps": 200,
        "train.batch_size": 24,
        "train.validate_every": 0,
        "train.sample_every": 0,
        "train.checkpoint_every": 0,
        "train.ema": 0.98,
        "train.mesh.data": 1,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": 2e-3,
        "optimizer.warmup_steps": 20,
        "optimizer.weight_decay": 0.0,
    }
    flags = [f"--config.{name}={value}" for name, value in changes.items()]
    file = root / "zorb.safetensors"
    for command in (
        ["train", "--config", "world", "--workdir", str(root / "run"), *flags],
        ["export", str(root / "run"), str(file), "--layout", "lora"],
    ):  # in processes of their own: the tests' has eight devices
        subprocess.run([sys.executable, "-m", "sora_jax", *command], check=True)
    return file


def sampler(pipe: Pipeline) -> Callable[[list[str], list[int]], np.ndarray]:
    def sample(prompts: list[str], seeds: list[int]) -> np.ndarray:
        return np.stack([video.frames for video in pipe.sample(prompts, seed=seeds[0], batch_size=len(prompts))])

    return sample


def right(pipe: Pipeline) -> float:
    """The share of prompts for a zorb that show what the word says: something purple, and it is a ball."""
    asked = [prompt for (_, prompt), _ in zip(zorbs(9), range(NEW_PROMPTS), strict=False)]
    clips = sampler(pipe)([prompt.text for prompt in asked], [0])
    verdicts = [judge(clip, prompt.truth) for clip, prompt in zip(clips, asked, strict=True)]
    return float(np.mean([verdict.color and verdict.shape for verdict in verdicts]))


def test_a_new_word_is_learned_and_the_old_ones_are_kept(adapters: Path):
    before, after = Pipeline.load("world"), Pipeline.load("world", lora=str(adapters))
    learned = [right(pipe) for pipe in (before, after)]
    old = [evaluate(sampler(pipe), n=OLD_PROMPTS, seed=0)["metrics"]["all"]["value"] for pipe in (before, after)]
    figures = f"before and after: zorbs that are purple balls {learned}, old prompts whole {old}"
    assert learned[0] < 0.5, figures
    assert learned[1] >= 0.9, figures
    assert old[1] >= old[0] - 0.02, figures
