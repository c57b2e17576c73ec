"""What `sora-jax bench` measures. Each row runs in a process of its own, so that none pays or earns for another.

A row is a function of a model's name that returns seconds of one unit of work, after everything is compiled: the median
of repetitions that together take about two seconds or more.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sora_jax.bench.timing import median_seconds
from sora_jax.shapes import Extent, Stride, latent_extent

if TYPE_CHECKING:
    from sora_jax.config import Config
    from sora_jax.data.world import Mix

PROMPT = "a red ball bounces on a blue floor"


def world_sampler_step(model: str) -> float:
    """One guided solver step of one video."""
    return _stage_seconds(model, "denoise")


def autoencoder_decode(model: str) -> float:
    """All frames of one video from its latents."""
    from sora_jax.pipeline import Pipeline
    from sora_jax.shapes import latent_extent

    pipe = Pipeline.load(model)
    extent = latent_extent(pipe.extent(), pipe.stride, pipe.patch)
    shape = (1, *extent, pipe.folder.autoencoder_config.z_dim)
    latents = np.random.default_rng(0).standard_normal(shape, np.float32)
    return median_seconds(lambda: pipe.decode(latents))


def _stage_seconds(model: str, stage: str) -> float:
    """The median time between two reports of a stage's progress, over two videos of which the first warms up."""
    from sora_jax.pipeline import Pipeline

    pipe = Pipeline.load(model)
    ticks: list[float] = []

    def tick(name: str, done: int, total: int) -> None:
        if name == stage:
            ticks.append(time.perf_counter())

    pipe.sample(PROMPT, steps=2)
    pipe.sample(PROMPT, steps=30, progress=tick)
    return statistics.median(np.diff(ticks).tolist())


def world_train_step(model: str) -> float:
    """One step of the world's diffusion training: the config's batch, one clip a row."""
    import jax

    from sora_jax.bench.programs import full_rows, training_program
    from sora_jax.config import load_config
    from sora_jax.runtime import compute_dtype
    from sora_jax.sharding import batch_sharding, make_mesh

    del model  # the size of a step is the config's
    config = load_config("world")
    program = training_program(config, make_mesh(), compute_dtype())
    rows = jax.device_put(full_rows(config), batch_sharding(program.mesh))
    state = program.start()

    def step() -> None:
        nonlocal state
        with jax.set_mesh(program.mesh):
            state, metrics = program.step(state, rows)
        jax.block_until_ready(metrics)

    return median_seconds(step)


def noise_cache(folder: Path, clips: int, extent: Sequence[int] = (5, 4, 4, 32), caption: str = PROMPT) -> None:
    """A latent cache of noise, of clips of that extent (the world's form) and caption."""
    from sora_jax.data.latents import CacheInfo, LatentRecord, LatentWriter

    rng = np.random.default_rng(0)
    info = CacheInfo("noise", "0", (4, 16, 16), extent[-1], {"bench": clips})
    writer = LatentWriter(folder, info, clips=clips)
    for shard in writer.missing():
        with writer.shard(shard) as out:
            for index in range(shard.start, shard.stop):
                latents = rng.standard_normal(extent, np.float32).astype(np.float16)
                out.add(LatentRecord(latents, (caption,), (caption,), 8.0, f"noise/{index}", (17, 64, 64)))


def loader_clip(model: str, sizes: str = "") -> float:
    """One clip through the packed loader on one core: planned from its header, read from a latent cache, filled in.
    `sizes` are those of a config's clips and rows (`loader_sizes`); the config world's by default."""
    from sora_jax.config import load_config
    from sora_jax.data.latents import LatentSource
    from sora_jax.data.loader import make_loader
    from sora_jax.models.tokenizer import ByteTokenizer

    del model  # latents are noise here
    chosen = json.loads(sizes or loader_sizes(load_config("world"), Stride(4, 16, 16)))
    extent, patch = chosen.pop("latents"), Stride(*chosen.pop("patch"))
    values = math.prod(extent)
    clips, rows = (max(1, min(most, LOADER_VALUES // values)) for most in (512, 64))
    clips = max(clips, 4)
    # Large clips outweigh their planning: a few steps of a plan tell as much as all.
    chosen["plan_steps"] = min(chosen["plan_steps"], max(1, 8 * LOADER_VALUES // (rows * values)))
    with tempfile.TemporaryDirectory() as folder:
        # a token for each byte, and one for the end
        noise_cache(Path(folder) / "latents", clips, extent, PROMPT[: chosen["row_text"] - 1])
        loader = make_loader(
            LatentSource(Path(folder) / "latents"),
            tokenize=ByteTokenizer().encode,
            rows=rows,
            patch=patch,
            prefetch=0,
            **chosen,
        )
        per_plan: list[int] = []

        def plan() -> None:
            """All steps of one plan: the first pays for the planning, the others are filled only."""
            before = loader.stats.clips
            for _ in range(chosen["plan_steps"]):
                next(loader)
            per_plan.append(loader.stats.clips - before)

        try:
            seconds = median_seconds(plan)
        finally:
            loader.close()
    return seconds / statistics.mean(per_plan)


LOADER_VALUES = 2**25  # of latents in the cache, and in a batch, of clips that are large


def loader_sizes(config: Config, stride: Stride) -> str:
    """What `loader_clip` takes for the clips and rows of `config`, whose autoencoder has that stride; as JSON."""
    data, transformer = config.data, config.transformer
    extent = latent_extent(Extent(data.frames, data.height, data.width), stride, transformer.patch)
    return json.dumps(
        {
            "latents": (*extent, transformer.in_channels),
            "patch": transformer.patch,
            "row_tokens": data.row_tokens,
            "row_text": data.row_text,
            "row_groups": data.groups,
            "image_share": data.image_share,
            "caption_dropout": data.caption_dropout,
            "look_ahead": data.look_ahead,
            "plan_steps": data.plan_steps,
        }
    )


def world_render(model: str, mix: Mix | None = None) -> float:
    """One clip of the world at 64x64, 17 frames, on one core: the scene, its truth, its pixels and its captions."""
    from sora_jax.data.world import Mix, WorldSource

    del model
    source, size = WorldSource(seed=0, n=100_000, mix=mix or Mix()), 64
    starts = iter(range(0, 100_000 - size, size))

    def batch() -> None:
        first = next(starts)
        source.batch(range(first, first + size))

    return median_seconds(batch) / size


def world_2_render(model: str) -> float:
    """The same of the mix that the config world_2 names."""
    from sora_jax.config import load_config

    return world_render(model, load_config("world_2").data.mix)


ROWS: dict[str, Callable[..., float]] = {
    "world-sampler-step": world_sampler_step,
    "world-train-step": world_train_step,
    "autoencoder-decode": autoencoder_decode,
    "loader": loader_clip,
    "world-render": world_render,
    "world-2-render": world_2_render,
}
