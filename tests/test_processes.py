"""Several processes make one video: the one that a single process makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from local_processes import LOCAL, said_by_the_second
from test_commands import workdir as tiny_workdir  # noqa: F401 (a fixture: a run of the tiny model)

from sora_jax import media
from sora_jax.record import Record


def sample(
    model: Path, processes: int, devices: int, *arguments: str, check: bool = True
) -> subprocess.CompletedProcess:
    command = [LOCAL, "--devices", str(devices), str(processes), sys.executable, "-m", "sora_jax", "sample"]
    done = subprocess.run(
        [*command, "--model", str(model), *arguments],
        check=False,
        env=tiny_run.environment(model.parent),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0 or not check, done.stderr
    return done


@pytest.mark.pods
@pytest.mark.parametrize("mesh", [(), ("--mesh", "fsdp=2,sequence=2"), ("--mesh", "data=2,tensor=2")], ids="".join)
def test_two_processes_make_the_videos_that_one_makes(tiny_model: Path, tmp_path: Path, mesh: tuple[str, ...]):
    """Of a list of prompts, two at a time, with a given first frame; the second process writes and says nothing."""
    still = tmp_path / "first.png"
    media.write_media(
        np.random.default_rng(0).integers(0, 255, (1, 16, 16, 3), np.uint8), still, Record("noise", 0, "x")
    )
    prompts = ("a red ball", "a blue square", "a ball")
    how = ("--image", str(still), "--batch-size", "2", "--dtype", "float32")
    jobs = tmp_path / "jobs.jsonl"
    made = {}
    for name, processes, more in (("one", 1, ()), ("two", 2, mesh)):
        rows = [{"prompt": p, "out": str(tmp_path / name / f"{i}.npy")} for i, p in enumerate(prompts)]
        jobs.write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = sample(tiny_model, processes, 2, "--prompts", str(jobs), *how, *more)
        assert done.stdout.splitlines() == [row["out"] for row in rows], "nothing else, of libraries neither"
        assert said_by_the_second(done) == [], "the first process speaks for all"
        made[name] = [np.load(row["out"]).astype(np.int16) for row in rows]
    for one, two in zip(made["one"], made["two"], strict=True):
        assert one.shape == (5, 16, 16, 3)
        assert np.abs(one - two).max() <= 1
    assert np.abs(made["one"][0] - made["one"][1]).max() > 1, "other prompts are other videos"


@pytest.mark.pods
def test_two_processes_sample_from_a_run(tiny_workdir: Path, tmp_path: Path):  # noqa: F811
    """Its checkpoint is read onto the mesh of both, and so is the autoencoder that it names."""
    made = {}
    for processes in (1, 2):
        out = tmp_path / f"{processes}.npy"
        sample(tiny_workdir, processes, 1, "a red ball", "--out", str(out), "--dtype", "float32")
        made[processes] = np.load(out).astype(np.int16)
    assert np.abs(made[1] - made[2]).max() <= 1


@pytest.mark.pods
def test_what_one_process_does_is_refused_to_several(tiny_model: Path, tmp_path: Path):
    for command in (["export", str(tiny_model), str(tmp_path / "out")], ["eval", "--model", str(tiny_model)]):
        started = [LOCAL, "--devices", "1", "2", sys.executable, "-m", "sora_jax", *command]
        done = subprocess.run(started, check=False, capture_output=True, text=True, timeout=100)
        assert done.returncode == 2
        refused = f"error: {command[0]} is the work of one process, and this is one of several (environment): start it"
        assert refused in done.stderr
        assert not (tmp_path / "out").exists()
