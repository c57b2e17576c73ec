"""A real diffusion run, tiny: a config, a cache of 40 clips, and the command that trains on it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.data.latents import CacheInfo, LatentRecord, LatentWriter
from sora_jax.training.checkpoint import Checkpoints

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
    make_cache(home / "latents")
    return home


def make_cache(folder: Path, clips: int = 40) -> None:
    info = CacheInfo("noise", "0" * 16, (4, 16, 16), 2, {"noise": {"seed": 0}})
    writer = LatentWriter(folder, info, clips=clips, clips_per_shard=16)
    for shard in writer.missing():
        with writer.shard(shard) as out:
            for index in range(shard.start, shard.stop):
                noise = np.random.default_rng(index).standard_normal((3, 2, 2, 2))
                latents = (3.0 + 0.1 * noise).astype(np.float16)
                out.add(LatentRecord(latents, (f"clip {index}",), (f"still {index}",), 8.0, f"{index}", (9, 32, 32)))


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


def start(home: Path, workdir: Path, *more: str, **options: Any) -> subprocess.Popen[str]:
    """The real command, its lines for people in a pipe."""
    command = [sys.executable, *flags(home, workdir), *more]
    return subprocess.Popen(command, env=environment(home), stderr=subprocess.PIPE, text=True, **options)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What it said, once it has ended with exit code `code`."""
    _, said = process.communicate(timeout=300)
    assert process.returncode == code, said
    return said


def wait_for_step(process: subprocess.Popen[str], workdir: Path, step: int) -> None:
    while process.poll() is None and not any(line["step"] >= step for line in lines(workdir)):
        time.sleep(0.002)


def wait_for_line(process: subprocess.Popen[str], text: str) -> str:
    """What it said up to the line that holds `text`; what it says later is for `finish`."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if text in line:
            break
    return "".join(said)


def fingerprint(workdir: Path) -> tuple[int, str]:
    """The newest step, and a hash of every array and of the loader's place in it."""
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    step = checkpoints.newest_good()
    assert step is not None
    arrays = checkpoints.arrays(step)
    notes = checkpoints.notes(step)
    checkpoints.close()
    digest = hashlib.sha256(json.dumps([notes["batches"], notes["averages"]], sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(name.encode() + arrays[name].tobytes())
    for branch in ("params", "ema", "opt_state"):
        assert any(name.startswith(branch) for name in arrays)
    return step, digest.hexdigest()


def comparable(workdir: Path) -> list[dict[str, float]]:
    """What of each line depends neither on the clock nor on how far the loader was ahead when it was written."""
    computed = ("loss", "grad", "update", "learning_rate", "validation")
    return [{k: v for k, v in line.items() if k == "step" or k.startswith(computed)} for line in lines(workdir)]
