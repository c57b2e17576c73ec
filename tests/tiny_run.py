"""A real diffusion run, tiny: a config, a cache of 40 clips, and the command that trains on it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from sora_jax.data.latents import CacheInfo, LatentRecord, LatentWriter

STEPS = 24
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # less time to compile
CONFIG = """
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.transformer = {
        "n_layers": 1, "n_heads": 1, "head_dim": 8, "ffn_dim": 16, "in_channels": 2, "out_channels": 2,
        "patch": (1, 1, 1), "text_dim": 8, "frequency_dim": 8,
    }
    config.text_encoder = {"vocab_size": 384, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    config.data = {"held_out": 4, "row_tokens": 24, "row_text": 24, "groups": 6, "prefix_share": 0.2}
    config.optimizer = {"name": "muon", "warmup_steps": 3, "learning_rate": 0.03}
    config.train = {
        "steps": STEPS, "batch_size": 2, "log_every": 1, "checkpoint_every": 3, "validate_every": 0, "sample_every": 0,
    }
    return config
""".replace("STEPS", str(STEPS))


def make_home(home: Path) -> Path:
    """The config, the cache, and a place for compiled programs, so that only the first run compiles."""
    (home / "tiny.py").write_text(CONFIG)
    info = CacheInfo("noise", "0" * 16, (4, 16, 16), 2, {"noise": {"seed": 0}})
    writer = LatentWriter(home / "latents", info, clips=40, clips_per_shard=16)
    for shard in writer.missing():
        with writer.shard(shard) as out:
            for index in range(shard.start, shard.stop):
                noise = np.random.default_rng(index).standard_normal((3, 2, 2, 2))
                latents = (3.0 + 0.1 * noise).astype(np.float16)
                out.add(LatentRecord(latents, (f"clip {index}",), (f"still {index}",), 8.0, f"{index}", (9, 32, 32)))
    return home


def flags(home: Path, workdir: Path) -> list[str]:
    command = ["-m", "sora_jax", "train", "--config", str(home / "tiny.py"), "--workdir", str(workdir)]
    return [*command, f"--config.data.latents={home / 'latents'}"]


def environment(home: Path) -> dict[str, str]:
    quick = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"), "XLA_FLAGS": QUICK}
    return os.environ | quick | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def lines(workdir: Path) -> list[dict]:
    """The metrics, without a last line that is being written."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
