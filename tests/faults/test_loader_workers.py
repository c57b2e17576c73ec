"""Processes that read for a loader: one that dies or hangs is an error in seconds, and none is left over."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from process_tree import is_alive, loader_workers, outlive
from tiny_run import comparable, fingerprint, finish, start, wait_for_step

from sora_jax.data.latents import CacheInfo, LatentRecord, LatentSource, LatentWriter
from sora_jax.data.loader import make_loader
from sora_jax.data.workers import LoaderError
from sora_jax.models.tokenizer import ByteTokenizer

pytestmark = [pytest.mark.faults, pytest.mark.slow]
OPTIONS = {"tokenize": ByteTokenizer().encode, "rows": 2, "row_text": 40}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose clips are of 64 KB."""
    folder = tmp_path_factory.mktemp("large")
    writer = LatentWriter(folder, CacheInfo("w", "a" * 64, (4, 16, 16), 16, {"world": {"seed": 0}}), clips=64)
    for shard in writer.missing():
        with writer.shard(shard) as out:
            for index in range(64):
                latents = np.random.default_rng(index).standard_normal((2, 32, 32, 16)).astype(np.float16)
                out.add(LatentRecord(latents, (f"clip {index}",), (), 8.0, f"{index}", (5, 512, 512)))
    return folder


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_is_an_error_and_leaves_nobody(large: Path, fault: signal.Signals):
    limit = 3.0 if fault == signal.SIGSTOP else 600.0
    with make_loader(LatentSource(large), workers=2, row_tokens=2048, stalled_seconds=limit, **OPTIONS) as batches:
        next(batches)
        time.sleep(1.0)  # the workers' pipes are full now, and hold half of what is being sent
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        os.kill(workers[0].pid, fault)
        began = time.monotonic()
        with pytest.raises(LoaderError) as error:
            for _ in itertools.islice(batches, 1000):
                pass
        waited = time.monotonic() - began
        for _ in range(2):  # and stays one
            with pytest.raises(RuntimeError):
                next(batches)
    if fault == signal.SIGSTOP:
        assert "no batch for 3 s: one of 2 processes that read ahead hangs" in str(error.value)
        assert limit < waited < limit + 5
    else:
        assert "one of 2 processes that read ahead died (exit code -9" in str(error.value)
        assert waited < 5
    assert not outlive([worker.pid for worker in workers])


def test_a_loader_with_a_hung_worker_can_be_closed(large: Path):
    """As a run does that is told to stop."""
    batches = make_loader(LatentSource(large), workers=1, row_tokens=2048, **OPTIONS)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGSTOP)
    while batches._producer._queue.qsize():  # nothing is ready any more: the thread waits for the worker
        next(batches)
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 10
    assert not outlive([worker.pid])


def test_reading_that_hangs_in_this_process_is_an_error_too(large: Path):
    class Stuck(LatentSource):
        def __getitem__(self, index):
            if threading.current_thread() is not threading.main_thread():  # the type checker reads a record, too
                time.sleep(30)  # as a network file system does, for ever
            return super().__getitem__(index)

    with make_loader(Stuck(large), row_tokens=2048, stalled_seconds=1.0, **OPTIONS) as batches:
        began = time.monotonic()
        with pytest.raises(LoaderError, match="no batch for 1 s: reading hangs"):
            next(batches)
    assert time.monotonic() - began < 7


SCRIPT = """
import multiprocessing, sys, time
from sora_jax.data.latents import LatentSource
from sora_jax.data.loader import make_loader
from sora_jax.models.tokenizer import ByteTokenizer

if __name__ == "__main__":
    batches = make_loader(LatentSource(sys.argv[1]), tokenize=ByteTokenizer().encode, rows=2, row_tokens=2048,
                          row_text=40, workers=1)
    next(batches)
    print(multiprocessing.active_children()[0].pid, flush=True)
    time.sleep(100)
"""


def test_workers_do_not_outlive_a_killed_parent(large: Path, tmp_path: Path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, script, large], text=True, **quiet) as parent:
        worker = int(parent.stdout.readline())
        assert is_alive(worker)
        parent.kill()
        parent.wait()
    assert not outlive([worker], seconds=10)


# -------------------------------------------------------------------------------------------------------- in a real run


# Reading hardly ahead, so that what is wrong with a worker shows at once.
NEAR = ("--config.train.steps=60", "--config.data.plan_steps=1", "--config.data.look_ahead=4")


def break_a_worker(home: Path, workdir: Path, fault: signal.Signals) -> str:
    """What a run says that ends because of it."""
    more = ("--config.train.steps=1000000", "--config.optimizer.schedule=constant")
    process = start(home, workdir, *NEAR, *more, "--config.data.workers=2", "--config.data.stalled_seconds=3")
    wait_for_step(process, workdir, 3)
    workers = loader_workers(process.pid)
    assert len(workers) == 2
    os.kill(workers[0], fault)
    said = finish(process, 1)
    # What had been read ahead was trained on. Then come the limit, its 5 s, and the end of a process on a busy machine.
    assert time.time() - (workdir / "metrics.jsonl").stat().st_mtime < 3 + 5 + 15
    assert not outlive(workers)
    return said.splitlines()[-1]


def test_a_run_whose_worker_hangs_ends(home: Path, tmp_path: Path):
    assert "no batch for 3 s: one of 2 processes that read ahead hangs" in break_a_worker(
        home, tmp_path, signal.SIGSTOP
    )


def test_a_run_whose_worker_dies_goes_on_with_another_number_of_them(home: Path, tmp_path: Path):
    """Two, then three, then none: the order is that of the run that never had any."""
    workdir, whole = tmp_path / "run", tmp_path / "whole"
    break_a_worker(home, workdir, signal.SIGKILL)
    step = fingerprint(workdir)[0]
    again = (*NEAR, "--config.optimizer.schedule=constant")
    finish(start(home, workdir, *again, f"--config.train.steps={step + 10}", "--config.data.workers=3"))
    finish(start(home, workdir, *again, f"--config.train.steps={step + 20}"))
    finish(start(home, whole, *again, f"--config.train.steps={step + 20}"))
    assert comparable(workdir) == comparable(whole)
    assert fingerprint(workdir) == fingerprint(whole)
