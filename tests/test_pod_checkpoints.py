"""Checkpoints between processes: every mesh and number of processes reads every other's bits, all agree on the step,
and none needs the memory that the whole state would take."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pod_checkpoint import ARRAYS, LARGEST, MESHES

SCRIPT = Path(__file__).with_name("pod_checkpoint.py")


def run(processes: int, what: str, mesh: str, folder: Path | str) -> list[dict[str, Any]]:
    """The report of each process; eight devices in all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    path = os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parents[1])])
    # Pieces of memory above this size go back to the system when they are freed, so that its mark is of what is used.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "65536"}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), address, str(processes), str(number), what, mesh, str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    reports = []
    for process in started:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        reports.append(json.loads(output.rsplit("report ", 1)[1]))
    return reports


@pytest.mark.pods
@pytest.mark.parametrize(("saving", "reading"), [(1, 2), (2, 1), (2, 4), (4, 2)])
def test_every_number_of_processes_reads_the_bits_of_every_mesh(tmp_path: Path, saving: int, reading: int):
    meshes = list(MESHES) if saving == 1 else [mesh for mesh in MESHES if mesh != "one"]
    for number, mesh in enumerate(meshes):
        run(saving, "save", mesh, tmp_path / mesh)
        other = [mesh for mesh in MESHES if mesh != "one" or reading == 1]
        for report in run(reading, "restore", other[(number + 1) % len(other)], tmp_path / mesh):
            assert (report["step"], report["wrong"], report["said"]) == (2, [], [])


@pytest.mark.pods
def test_all_processes_go_back_together_from_a_step_that_only_one_of_them_has_read(tmp_path: Path):
    """Each of two reads half of the files, so the other knows of the damage by hearsay."""
    run(2, "save", "fsdp", tmp_path)
    files = sorted(path for path in (tmp_path / "2" / "state").rglob("*") if path.is_file())
    victim = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    reports = run(2, "restore", "fsdp", tmp_path)
    assert [report["step"] for report in reports] == [1, 1]
    assert [report["wrong"] for report in reports] == [[], []]
    assert reports[0]["said"] == reports[1]["said"]
    assert victim.name in reports[0]["said"][0]


@pytest.mark.pods
@pytest.mark.parametrize(("saved_by", "mesh"), [(2, "fsdp"), (2, "tensor"), (1, "one")])
def test_a_process_that_restores_needs_memory_for_its_own_share_and_one_array(tmp_path: Path, saved_by: int, mesh: str):
    """A state of 1.07 GB in two processes, saved on the same mesh, cut the other way, and in one piece: each process
    grows by what its devices hold and the largest array, and never by the state."""
    run(saved_by, "large-save", mesh, tmp_path)
    for report in run(2, "large-restore", "fsdp", tmp_path):
        assert report["wrong"] == []
        assert report["held"] == ARRAYS * LARGEST / 2
        assert report["growth"] < report["held"] + LARGEST + 64e6 < ARRAYS * LARGEST
