"""Several processes train one model: they compute what one does, and go on from one another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_run

LOCAL = Path(__file__).parents[1] / "launch" / "local.sh"


def run(
    home: Path, workdir: Path, processes: int, devices: int, *more: str, steps: int = tiny_run.STEPS
) -> list[float]:
    """The losses of a run, or of what there is of it, after `steps` steps."""
    command = [LOCAL, "--devices", str(devices), str(processes), sys.executable, *tiny_run.flags(home, workdir)]
    command += ["--config.optimizer.schedule=constant", "--config.train.batch_size=8", f"--config.train.steps={steps}"]
    done = subprocess.run(
        [*command, *more], check=False, env=tiny_run.environment(home), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert "[1]" not in done.stderr, "the first process speaks for all"
    return [line["loss"] for line in tiny_run.lines(workdir)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_home(tmp_path_factory.mktemp("processes"))


@pytest.mark.pods
def test_a_run_goes_on_in_another_number_of_processes(home: Path, tmp_path: Path):
    """Two processes that share every row, then one with two devices, then two with half of the rows each."""
    expected = run(home, tmp_path / "one", 1, 1, steps=12)
    moving = tmp_path / "moving"
    run(home, moving, 2, 1, "--config.train.mesh.data=1", "--config.train.mesh.sequence=2", steps=5)
    run(home, moving, 1, 2, "--config.train.mesh.fsdp=2", "--config.train.mesh.data=1", steps=8)
    found = run(home, moving, 2, 1, "--config.train.mesh.data=2", steps=12)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.pods
def test_eight_devices_in_one_two_and_four_processes(home: Path, tmp_path: Path):
    """The same losses, and each goes on from what the one before has saved."""
    mesh = ("--config.train.mesh.data=2", "--config.train.mesh.fsdp=4")
    expected = run(home, tmp_path / "one", 1, 8, *mesh)
    moving = tmp_path / "moving"
    for processes, devices, steps in ((4, 2, 8), (2, 4, 16), (1, 8, 24)):
        found = run(home, moving, processes, devices, *mesh, steps=steps)
        np.testing.assert_allclose(found, expected[:steps], rtol=1e-5)
