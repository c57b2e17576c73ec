"""A run of the real diffusion stage, tiny, killed with SIGKILL again and again, ends as if it had never been."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tiny_run import STEPS, environment, flags, lines, make_home

from sora_jax.training.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("resume"))


def start(home: Path, workdir: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, *flags(home, workdir), *more]
    return subprocess.Popen(command, env=environment(home), stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


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
    timed = ("steps_per_second", "seconds_per_step", "tokens_per_second", "tflops", "data_wait", "mfu", "goodput")
    timed += ("host_gib", "device_gib", "device_peak_gib")
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
