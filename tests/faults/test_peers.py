"""A peer that is killed takes the run down, in time, and the supervisors of all bring it back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
from process_tree import arguments_of, descendants, environment_of

LOCAL = Path(__file__).parents[2] / "launch" / "local.sh"
pytestmark = [pytest.mark.faults, pytest.mark.pods]


def test_a_killed_peer_takes_the_others_down_and_the_supervisors_bring_all_back(home: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    command = [LOCAL, "--devices", "1", "2", sys.executable, *tiny_run.flags(home, workdir), "--supervise", "6"]
    more = ["--config.train.mesh.data=2", "--config.train.batch_size=8", "--config.train.steps=2000"]
    environment = tiny_run.environment(home)
    parent = subprocess.Popen([*command, *more], env=environment, stderr=subprocess.PIPE, text=True)
    while parent.poll() is None and not any(line["step"] >= 10 for line in tiny_run.lines(workdir)):
        time.sleep(0.01)
    processes = [pid for pid in descendants(parent.pid) if "--supervise" not in arguments_of(pid)]
    second = next(
        pid for pid in processes if "JAX_PROCESS_ID=1" in environment_of(pid) and "train" in arguments_of(pid)
    )
    killed = time.monotonic()
    os.kill(second, signal.SIGKILL)
    reached = tiny_run.lines(workdir)[-1]["step"]
    while parent.poll() is None and not any(line["step"] >= reached + 20 for line in tiny_run.lines(workdir)):
        time.sleep(0.1)
        assert time.monotonic() - killed < 240
    parent.send_signal(signal.SIGTERM)
    _, errors = parent.communicate(timeout=120)
    assert parent.returncode == 0, errors
    assert "[1] sora-jax: the run ended with SIGKILL; again from step" in errors
    assert "resuming" in errors
