"""A run that goes on in another number of processes takes the same batches, and computes what one process does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_run
from local_processes import train_in_processes

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.pods]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_home(tmp_path_factory.mktemp("processes"))


def test_a_run_goes_on_in_another_number_of_processes(home: Path, tmp_path: Path):
    """Two processes that share every row, then one with two devices, then two with half of the rows each."""
    expected = train_in_processes(home, tmp_path / "one", 1, 1, steps=12)
    moving = tmp_path / "moving"
    train_in_processes(home, moving, 2, 1, "--config.train.mesh.data=1", "--config.train.mesh.sequence=2", steps=5)
    train_in_processes(home, moving, 1, 2, "--config.train.mesh.fsdp=2", "--config.train.mesh.data=1", steps=8)
    found = train_in_processes(home, moving, 2, 1, "--config.train.mesh.data=2", steps=12)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_eight_devices_in_one_two_and_four_processes(home: Path, tmp_path: Path):
    """The same losses, and each goes on from what the one before has saved."""
    mesh = ("--config.train.mesh.data=2", "--config.train.mesh.fsdp=4")
    expected = train_in_processes(home, tmp_path / "one", 1, 8, *mesh)
    moving = tmp_path / "moving"
    for processes, devices, steps in ((4, 2, 8), (2, 4, 16), (1, 8, 24)):
        found = train_in_processes(home, moving, processes, devices, *mesh, steps=steps)
        np.testing.assert_allclose(found, expected[:steps], rtol=1e-5)
