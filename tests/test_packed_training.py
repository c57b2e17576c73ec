"""Training on clips of many shapes: one program for all of them when they are packed, one for each in buckets."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run

from sora_jax.config import Config, load_config, override
from sora_jax.data.latents import CacheInfo, LatentRecord, LatentWriter
from sora_jax.training.loop import train

pytestmark = pytest.mark.usefixtures("quick_training")

SHAPES = ((1, 2, 2), (3, 2, 2), (2, 1, 4), (1, 4, 2), (2, 2, 3))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and a cache of 60 clips of five shapes, of which one cannot be read and another is longer than a row."""
    home = tmp_path_factory.mktemp("mixed")
    (home / "tiny.py").write_text(tiny_run.CONFIG)
    info = CacheInfo("noise", "0" * 16, (4, 16, 16), 2, {"noise": {"seed": 0}})
    writer = LatentWriter(home / "latents", info, clips=60, clips_per_shard=60)
    (shard,) = writer.missing()
    with writer.shard(shard) as out:
        for index in range(60):
            shape = (7, 2, 2) if index == 50 else SHAPES[index % 5]
            noise = np.random.default_rng(index).standard_normal((*shape, 2)).astype(np.float16)
            pixels = (4 * shape[0] - 3, 16 * shape[1], 16 * shape[2])
            out.add(LatentRecord(noise, (f"clip {index}",), (f"still {index}",), 8.0, f"{index}", pixels))
    return home


def run(home: Path, workdir: Path, *overrides: str) -> tuple[list[dict[str, Any]], list[str]]:
    options = [
        "train.checkpoint_every=0",
        "train.mesh.data=1",
        "data.prefix_share=0.0",
        "data.image_share=0.0",
        "optimizer.name=adamw",
    ]
    config: Config = override(load_config(str(home / "tiny.py")), [*options, f"data.latents={home / 'latents'}"])
    said: list[str] = []
    train(override(config, ["data.skip_misfits=True", *overrides]), workdir, say=said.append)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()], said


@pytest.mark.slow
def test_packed_rows_of_all_shapes_are_one_program(home: Path, tmp_path: Path):
    lines, said = run(home, tmp_path / "run")
    assert [line["programs"] for line in lines] == [1] * tiny_run.STEPS
    assert said[-1].endswith("; the step was compiled to 1 program")
    last = lines[-1]
    assert last["data_fill"] > 0.9
    assert last["data_clips"] > 3 * tiny_run.STEPS
    # 56 clips are trained on, of which one is of 28 tokens where a row holds 24, at every epoch.
    assert last["data_clip_too_long"] in (int(last["data_epoch"]), int(last["data_epoch"]) + 1)
    (data,) = [line for line in said if line.startswith("data at step")]
    assert f"data at step {tiny_run.STEPS}: epoch {last['data_epoch']:.2f}, {last['data_clips']:,.0f} clips" in data
    assert f"left out: {last['data_clip_too_long']:.0f} clip too long" in data


@pytest.mark.slow
def test_buckets_are_a_program_each(home: Path, tmp_path: Path):
    lines, said = run(home, tmp_path / "run", "data.packing=buckets", "train.steps=40")
    # Clips of (tokens, frames) = (4, 1), (12, 3), (8, 2), (8, 1), (12, 2) in rows of 24 tokens and 6 groups: 6, 2, 3, 3
    # and 2 of them, in arrays of 24 tokens and 6, 6, 6, 3 and 4 groups.
    assert lines[-1]["programs"] == 3
    assert said[-1].endswith("; the step was compiled to 3 programs")
    assert all(a["programs"] <= b["programs"] for a, b in itertools.pairwise(lines))
