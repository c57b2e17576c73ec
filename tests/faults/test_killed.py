"""A run of the real diffusion stage, tiny, killed with SIGKILL again and again, ends as if it had never been."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from process_tree import loader_workers, outlive
from tiny_run import comparable, fingerprint, finish, lines, start, wait_for_step

pytestmark = [pytest.mark.faults, pytest.mark.slow]
STEPS = "--config.train.steps=60"
WORKERS = "--config.data.workers=2"
KILLS = 5


def test_the_run_learns(whole: Path):
    losses = [line["loss"] for line in lines(whole)]
    assert len(losses) == 60
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_sigkill_at_random_moments_changes_no_bit(home: Path, whole: Path, tmp_path: Path):
    """With loader processes that read ahead, and checkpoints written in the background every third step."""
    workdir, draw = tmp_path / "killed", random.Random(0)
    for _ in range(KILLS):
        # Beyond what an earlier life logged: its lines are there until this one resumes. And far from the end, which a
        # fast machine reaches between the look and the kill.
        step = max((line["step"] for line in lines(workdir)), default=0) + draw.randint(2, 9)
        process = start(home, workdir, STEPS, WORKERS)
        wait_for_step(process, workdir, step)
        time.sleep(draw.uniform(0.0, 0.05))  # somewhere in the step, or in the checkpoint that follows it
        workers = loader_workers(process.pid)
        assert len(workers) == 2
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it had ended before"
        assert not outlive(workers)
    finish(start(home, workdir, STEPS, WORKERS))
    assert comparable(workdir) == comparable(whole)
    assert fingerprint(workdir) == fingerprint(whole)


def test_sigkill_in_the_middle_of_a_write_leaves_the_step_before(home: Path, whole: Path, tmp_path: Path):
    workdir = tmp_path / "torn"
    for _ in range(3):
        process = start(home, workdir, STEPS)
        torn = kill_in_a_write(process, workdir / "checkpoints")
        good = max((int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()), default=0)
        assert good == int(torn.name.partition(".")[0]) - 3
    said = finish(start(home, workdir, STEPS))
    assert f"resuming {workdir} at step {good}" in said or not good
    assert "damaged" not in said
    assert not torn.exists()
    assert not list((workdir / "checkpoints").glob("*tmp*"))
    assert comparable(workdir) == comparable(whole)
    assert fingerprint(workdir) == fingerprint(whole)


def kill_in_a_write(process: subprocess.Popen[str], checkpoints: Path) -> Path:
    """SIGKILL while a checkpoint is half there; the folder of that half. A process that is stopped does not finish it
    between the look and the kill."""
    before = set(checkpoints.glob("*.orbax-checkpoint-tmp"))  # of an earlier kill
    while process.poll() is None:
        if set(checkpoints.glob("*.orbax-checkpoint-tmp")) - before:
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.01)
            if half := set(checkpoints.glob("*.orbax-checkpoint-tmp")) - before:
                process.kill()
                process.communicate()
                assert process.returncode == -signal.SIGKILL
                return half.pop()
            process.send_signal(signal.SIGCONT)
        time.sleep(0.0005)
    raise AssertionError(f"it ended before a write was seen: {process.communicate()[1]}")
