"""A disk that fills up under a run: it ends at once, in one line, and what was saved before is intact."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_run import comparable, fingerprint, finish, lines, start, wait_for_step

pytestmark = [pytest.mark.faults, pytest.mark.slow]
STEPS = "--config.train.steps=60"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """8 MB that are a file system of their own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("only an administrator mounts a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def run_out_of_room(home: Path, workdir: Path, happens: Callable[[int], None]) -> int:
    """The newest checkpoint after a run under which `happens(its process id)`."""
    process = start(home, workdir, "--config.train.steps=100000")
    wait_for_step(process, workdir, 10)
    happens(process.pid)
    said = finish(process, 2)
    last = said.splitlines()[-1]
    assert last.startswith("sora-jax: error: ")
    assert "cannot be written" in last
    assert "No space left on device" in last or "File too large" in last
    step, _ = fingerprint(workdir)
    assert step % 3 == 0
    assert step >= 6
    return step


def test_a_full_disk_ends_the_run_and_harms_no_checkpoint(home: Path, small_disk: Path):
    workdir = small_disk / "run"
    step = run_out_of_room(home, workdir, lambda _: fill(small_disk))
    (small_disk / "filler").unlink()
    said = finish(start(home, workdir, f"--config.train.steps={step + 5}"))
    assert f"resuming {workdir} at step {step}" in said
    assert "damaged" not in said
    assert [line["step"] for line in lines(workdir)] == list(range(1, step + 6))


def test_a_limit_on_files_ends_the_run_and_it_goes_on_to_the_bit(home: Path, whole: Path, tmp_path: Path):
    """Where nobody may mount: no file of the process may grow beyond 512 bytes any more."""
    workdir = tmp_path / "run"
    process = start(home, workdir, STEPS)
    wait_for_step(process, workdir, 10)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))
    said = finish(process, 2)
    assert said.splitlines()[-1].startswith("sora-jax: error: ")
    assert "File too large" in said.splitlines()[-1]
    finish(start(home, workdir, STEPS))
    assert comparable(workdir) == comparable(whole)
    assert fingerprint(workdir) == fingerprint(whole)
