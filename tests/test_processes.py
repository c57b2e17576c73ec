"""Several processes train one model: they compute what one does, and stop and go on together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_run

LOCAL = Path(__file__).parents[1] / "launch" / "local.sh"
STEPS = 60
SCRIPT = """
import sys
from pathlib import Path

import jax

process, address, workdir = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(address, 2, process, initialization_timeout=60, heartbeat_timeout_seconds=15)

import time

import test_train_loop
from sora_jax.training.loop import train


class HalfOfEach(test_train_loop.Counting):
    def __next__(self):
        time.sleep(0.02)
        return super().__next__()[4 * process : 4 * process + 4]


config = test_train_loop.config_of("train.steps=STEPS", "train.mesh.data=2", "train.mesh.fsdp=2")
summary = train(config, workdir, say=print, make_stage=test_train_loop.stage_of(HalfOfEach()))
print("ended at", summary.step)
""".replace("STEPS", str(STEPS))


def start(script: Path, workdir: Path) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(script), str(process), address, str(workdir)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for process in (0, 1)
    ]


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*children, *(below for child in children for below in descendants(child))]


def arguments_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def environment_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


def finish(processes: list[subprocess.Popen]) -> list[int]:
    """The step at which each ended; both must end well."""
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [int(output.rsplit("ended at ", 1)[1]) for output in outputs]


def losses(workdir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.faults
@pytest.mark.slow
def test_sigterm_to_one_of_two_saves_the_same_step_in_both(tmp_path: Path):
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert finish(start(script, whole)) == [STEPS, STEPS]

    processes = start(script, broken)
    metrics = broken / "metrics.jsonl"
    while all(p.poll() is None for p in processes) and not (metrics.exists() and '"step": 5,' in metrics.read_text()):
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    first, second = finish(processes)
    assert first == second < STEPS
    assert (broken / "checkpoints" / str(first)).is_dir()

    assert finish(start(script, broken)) == [STEPS, STEPS]
    assert losses(broken) == losses(whole)


# -------------------------------------------------------------------------------------------- the real loop and loader


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


@pytest.mark.pods
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
