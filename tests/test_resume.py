"""A run of the real diffusion stage, tiny, killed with SIGKILL again and again, ends as if it had never been."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

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


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, a latent cache of 40 clips, and a place for compiled programs, so that only the first run compiles."""
    home = tmp_path_factory.mktemp("resume")
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


def start(home: Path, workdir: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "sora_jax", "train", "--config", str(home / "tiny.py"), "--workdir", str(workdir)]
    command += [f"--config.data.latents={home / 'latents'}", *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(home / "compiled")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "XLA_FLAGS": QUICK}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


def lines(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
    while process.poll() is None and not any(line["step"] >= step for line in lines(workdir)):
        time.sleep(0.002)


def fingerprint(workdir: Path) -> tuple[int, str]:
    """The newest step, and a hash of every array and of the loader's place in it."""
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    step = checkpoints.newest_good()
    arrays = checkpoints.arrays(step)
    notes = checkpoints.notes(step)
    checkpoints.close()
    digest = hashlib.sha256(json.dumps([notes["batches"], notes["averages"]], sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(name.encode() + arrays[name].tobytes())
    assert any(name.startswith("params.transformer.blocks") for name in arrays)
    return step, digest.hexdigest()


def comparable(workdir: Path) -> list[tuple]:
    """What of each line does not depend on the clock."""
    timed = ("steps_per_second", "tokens_per_second", "tflops", "data_wait", "mfu")
    return [tuple(sorted((k, v) for k, v in line.items() if k not in timed)) for line in lines(workdir)]


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    """A run that nobody disturbs."""
    finish(start(home, home / "whole"))
    return home / "whole"


@pytest.mark.slow
def test_the_run_learns(whole: Path):
    losses = [line["loss"] for line in lines(whole)]
    assert len(losses) == STEPS
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


@pytest.mark.faults
@pytest.mark.parametrize("seed", [0])
def test_sigkill_at_random_steps_changes_no_bit(home: Path, whole: Path, tmp_path: Path, seed: int):
    workdir = tmp_path / "killed"
    kill_at: Sequence[int] = sorted(random.Random(seed).sample(range(2, STEPS), 3))
    for step in kill_at:
        process = start(home, workdir)
        wait_for_step(process, workdir, step)
        # and somewhere within the step, or within the checkpoint that follows it
        time.sleep(random.Random(seed + step).uniform(0.0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0)
    finish(start(home, workdir))
    assert comparable(workdir) == comparable(whole)
    assert fingerprint(workdir) == fingerprint(whole)


@pytest.mark.faults
def test_sigterm_saves_and_a_flipped_bit_is_walked_around(home: Path, whole: Path, tmp_path: Path):
    workdir = tmp_path / "terminated"
    process = start(home, workdir)
    wait_for_step(process, workdir, 5)
    process.send_signal(signal.SIGTERM)
    errors = finish(process)  # exit code 0
    assert "SIGTERM" in errors
    stopped = int(errors.split("stopped at step ")[1].split(",")[0])
    step, _ = fingerprint(workdir)
    assert step == stopped == lines(workdir)[-1]["step"]
    # one bit of the newest checkpoint, in its largest file
    victim = max(
        (p for p in (workdir / "checkpoints" / str(step)).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    data = bytearray(victim.read_bytes())
    data[len(data) // 3] ^= 8
    victim.write_bytes(data)
    errors = finish(start(home, workdir))
    assert f"checkpoint {step} is damaged" in errors
    assert f"resuming {workdir} at step {(stopped - 1) // 3 * 3}" in errors
    assert comparable(workdir) == comparable(whole)
    assert fingerprint(workdir) == fingerprint(whole)


@pytest.mark.faults
def test_another_config_is_one_line_and_exit_code_2(home: Path, whole: Path):
    process = start(home, whole, "--config.optimizer.b2=0.5")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("sora-jax: error: ")
    assert "optimizer.b2: 0.99 -> 0.5" in errors.splitlines()[-1]
