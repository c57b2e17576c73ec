"""A small run with all modes on: every skill is learned, and its loss is where people look for it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from sora_jax.config import load_config, override
from sora_jax.data.latents import CacheInfo, LatentRecord, LatentWriter, ShotHeader
from sora_jax.diffusion.levels import MODES
from sora_jax.errors import UserError
from sora_jax.training.loop import train

pytestmark = pytest.mark.usefixtures("quick_training")

WORDS = {"up": (1.5, 0.5), "down": (-1.5, -0.5), "left": (1.0, -1.0), "right": (-1.0, 1.0)}


def shot(rng: np.random.Generator, word: str, frames: int) -> np.ndarray:
    """Latents that the word says much of: a level, and how it changes in time and space."""
    level, slope = WORDS[word]
    time, y, x = np.indices((frames, 2, 2))
    value = level + slope * 0.3 * time + 0.2 * (y - x)
    return (np.stack([value, -value], axis=-1) + 0.1 * rng.normal(size=(frames, 2, 2, 2))).astype(np.float16)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, and a cache of 96 clips of which every third is cut in two."""
    home = tmp_path_factory.mktemp("skills")
    (home / "tiny.py").write_text(tiny_run.CONFIG)
    writer = LatentWriter(home / "latents", CacheInfo("made", "0" * 16, (4, 16, 16), 2, {"made": {}}), clips=96)
    with writer.shard(*writer.missing()) as out:
        for index in range(96):
            rng = np.random.default_rng(index)
            words = rng.choice(sorted(WORDS), size=2 if index % 3 == 0 else 1)
            lengths = (3, 2) if len(words) == 2 else (4,)
            latents = np.concatenate([shot(rng, word, n) for word, n in zip(words, lengths, strict=True)])
            shots = tuple(ShotHeader(n, (word,)) for word, n in zip(words, lengths, strict=True))
            captions = () if len(words) == 2 else (str(words[0]),)
            pixels = (4 * len(latents) - 3 * len(words), 32, 32)
            headers = shots if len(words) == 2 else ()
            out.add(LatentRecord(latents, captions, (str(words[0]),), 8.0, str(index), pixels, headers))
    return home


def scalar_tags(folder: Path) -> set[str]:
    """The names of the curves of TensorBoard, by its own framing."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.glob("events*")
    data, found = path.read_bytes(), set()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found |= {value.tag for value in Event.FromString(data[12 : 12 + length]).summary.value}
        data = data[16 + length :]
    return found


@pytest.mark.runs
def test_every_skill_is_learned_by_a_run_with_all_of_them(home: Path, tmp_path: Path):
    changes = [f"levels.modes.{mode}=1" for mode in MODES]
    changes += [
        f"data.latents={home / 'latents'}",
        "data.held_out=24",
        "data.window_share=0.25",
        "data.image_share=0.1",
    ]
    changes += ["data.shot_dropout=0.1", "data.prefix_share=0.0", "transformer.head_dim=32", "transformer.ffn_dim=64"]
    changes += [
        "train.batch_size=16",
        "train.steps=400",
        "train.validate_every=20",
        "train.ema=0.9",
        "train.mesh.data=1",
    ]
    changes += [
        "train.checkpoint_every=0",
        "optimizer.name=adamw",
        "optimizer.learning_rate=0.01",
        "train.log_every=20",
    ]
    said: list[str] = []
    train(override(load_config(str(home / "tiny.py")), changes), tmp_path / "run", say=said.append)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]
    names = ["validation_loss", *(f"validation_{mode}_loss" for mode in MODES[1:])]
    assert {name: last[name] < 0.6 * first[name] for name in names} == dict.fromkeys(names, True), (first, last)
    for name in names:
        bands = [value for key, value in last.items() if key.startswith(f"{name}_0")]
        assert len(bands) == 10
        # A ramp of few frames is in some bands only; every other mode is in all.
        assert all(value is not None for value in bands) or "rolling" in name
    assert set(names) <= scalar_tags(tmp_path / "run" / "tensorboard")
    (note,) = [line for line in said if line.startswith("validation loss: ")]
    losses = {"text to video": last["validation_loss"]}
    losses |= {mode: last[f"validation_{mode}_loss"] for mode in sorted(MODES[1:])}
    assert note == "validation loss: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())


def test_windows_want_rolling_levels(home: Path):
    config = load_config(str(home / "tiny.py"))
    with pytest.raises(UserError, match=r"data.window_share=0\.5 makes windows .* give levels.modes.rolling a weight"):
        override(config, ["data.window_share=0.5"])
    assert override(config, ["levels.modes.rolling=0.1", "data.window_share=0.5"]).data.window_share == 0.5
