"""A supervised run that is killed is started again; one that is told to stop is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
from etils import epath

from sora_jax.supervise import newest_step

pytestmark = [pytest.mark.faults, pytest.mark.slow]


def test_a_killed_run_comes_back_and_a_stopped_one_does_not(home: Path, tmp_path: Path):
    """The real command: SIGKILL to the run itself, then SIGTERM to its parent."""
    workdir = tmp_path / "run"
    fast = "import sora_jax.supervise as s, sys; s.FIRST_WAIT = 0.1; from sora_jax.cli import main; sys.exit(main())"
    arguments = [*tiny_run.flags(home, workdir)[2:], "--supervise", "3", "--config.train.steps=100000"]
    command = [sys.executable, "-c", fast, *arguments]
    parent = subprocess.Popen(command, env=tiny_run.environment(home), stderr=subprocess.PIPE, text=True)

    def wait_for(step: int) -> None:
        while parent.poll() is None and not any(line["step"] >= step for line in tiny_run.lines(workdir)):
            time.sleep(0.01)

    wait_for(10)
    (child,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    killed_at = tiny_run.lines(workdir)[-1]["step"]
    wait_for(killed_at + 20)
    parent.send_signal(signal.SIGTERM)
    _, errors = parent.communicate(timeout=120)
    assert parent.returncode == 0, errors
    assert "the run ended with SIGKILL; again from step" in errors
    assert errors.count("resuming") == 1
    assert "SIGTERM: finishing this step, then saving" in errors
    last = tiny_run.lines(workdir)[-1]["step"]
    assert newest_step(epath.Path(workdir)) == last > killed_at
