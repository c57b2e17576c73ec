"""SIGTERM, as machines are told that they will be taken away: the run saves and ends well, whatever it is doing."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from process_tree import loader_workers, outlive
from tiny_run import comparable, environment, fingerprint, finish, flags, lines, start, wait_for_line, wait_for_step

pytestmark = [pytest.mark.faults, pytest.mark.slow]
STEPS = "--config.train.steps=60"
WORKERS = "--config.data.workers=2"


def stopped_at(said: str) -> int:
    assert "SIGTERM: finishing this step, then saving" in said
    return int(said.split("stopped at step ")[1].split(",", maxsplit=1)[0])


def test_sigterm_saves_and_a_flipped_bit_in_what_it_saved_is_walked_around(home: Path, whole: Path, tmp_path: Path):
    workdir = tmp_path / "terminated"
    process = start(home, workdir, STEPS)
    wait_for_step(process, workdir, 5)
    process.send_signal(signal.SIGTERM)
    step = stopped_at(finish(process))
    assert step == fingerprint(workdir)[0] == lines(workdir)[-1]["step"] < 60

    files = [path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file()]
    victim = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 3] ^= 8
    victim.write_bytes(data)
    said = finish(start(home, workdir, STEPS))
    assert f"checkpoint {step} is damaged" in said
    assert f"resuming {workdir} at step {(step - 1) // 3 * 3}" in said
    assert comparable(workdir) == comparable(whole)
    assert fingerprint(workdir) == fingerprint(whole)


def test_sigterm_to_all_processes_of_a_run_spares_its_loader_workers(home: Path, whole: Path, tmp_path: Path):
    """As a batch system sends it: to the whole group, here when the workers have just begun to exist and know of
    nothing yet, and then when they read."""
    workdir = tmp_path / "group"
    process = start(home, workdir, STEPS, WORKERS, start_new_session=True)
    while process.poll() is None and len(workers := loader_workers(process.pid)) < 2:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGTERM)
    assert stopped_at(finish(process)) == 1
    assert not outlive(workers)

    process = start(home, workdir, STEPS, WORKERS, start_new_session=True)
    wait_for_step(process, workdir, 10)
    workers = loader_workers(process.pid)
    os.killpg(process.pid, signal.SIGTERM)
    step = stopped_at(finish(process))
    assert not outlive(workers)
    assert 10 <= step == fingerprint(workdir)[0] == lines(workdir)[-1]["step"] < 60

    finish(start(home, workdir, STEPS, WORKERS))
    assert comparable(workdir) == comparable(whole)
    assert fingerprint(workdir) == fingerprint(whole)


def test_sigterm_while_it_compiles_and_while_it_validates(home: Path, whole: Path, tmp_path: Path):
    """The step at hand is finished and saved; no other validation is begun."""
    workdir = tmp_path / "busy"
    log = {"JAX_LOG_COMPILES": "1", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cold")}
    more = (STEPS, "--config.train.validate_every=4")

    def stop_at(compiling: str) -> int:
        command = [sys.executable, *flags(home, workdir), *more]
        process = subprocess.Popen(command, env=environment(home) | log, stderr=subprocess.PIPE, text=True)
        wait_for_line(process, f"Compiling jit({compiling})")
        process.send_signal(signal.SIGTERM)
        return stopped_at(finish(process))

    assert stop_at("step") == 1 == fingerprint(workdir)[0]
    assert stop_at("validate") == 4 == fingerprint(workdir)[0]
    assert "validation_loss" in lines(workdir)[-1]
    finish(start(home, workdir, STEPS))
    assert [line["loss"] for line in lines(workdir)] == [line["loss"] for line in lines(whole)]
    assert fingerprint(workdir) == fingerprint(whole)


def test_sigterm_before_the_first_step_ends_it_at_once_and_harms_nothing(home: Path, whole: Path, tmp_path: Path):
    """While it reads the checkpoint it would go on from, say: there is nothing to save."""
    workdir = Path(shutil.copytree(whole, tmp_path / "early"))
    process = start(home, workdir, STEPS)
    wait_for_line(process, "sora-jax")  # the head of the run
    process.send_signal(signal.SIGTERM)
    finish(process, -signal.SIGTERM)
    assert fingerprint(workdir) == fingerprint(whole)


# ---------------------------------------------------------------------------------------------------- several processes

SCRIPT = """
import sys
from pathlib import Path

import jax

process, address, workdir = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(address, 2, process, initialization_timeout=60, heartbeat_timeout_seconds=15)

import time

import counting_run
from sora_jax.training.loop import train


class HalfOfEach(counting_run.Counting):
    def __next__(self):
        time.sleep(0.02)
        return super().__next__()[4 * process : 4 * process + 4]


config = counting_run.config_of("train.steps=60", "train.mesh.data=2", "train.mesh.fsdp=2")
summary = train(config, workdir, say=print, make_stage=counting_run.stage_of(HalfOfEach()))
print("ended at", summary.step)
"""


def start_two(script: Path, workdir: Path) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
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


def finish_two(processes: list[subprocess.Popen[str]]) -> list[int]:
    """The step at which each ended; both must end well."""
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [int(output.rsplit("ended at ", 1)[1]) for output in outputs]


def test_sigterm_to_one_of_two_saves_the_same_step_in_both(tmp_path: Path):
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    undisturbed, broken = tmp_path / "whole", tmp_path / "broken"
    assert finish_two(start_two(script, undisturbed)) == [60, 60]

    processes = start_two(script, broken)
    while all(p.poll() is None for p in processes) and not any(line["step"] >= 5 for line in lines(broken)):
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    first, second = finish_two(processes)
    assert first == second < 60
    assert (broken / "checkpoints" / str(first)).is_dir()

    assert finish_two(start_two(script, broken)) == [60, 60]
    assert [line["loss"] for line in lines(broken)] == [line["loss"] for line in lines(undisturbed)]
