"""Commands in several processes of this machine, by launch/local.sh."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import tiny_run

LOCAL = Path(__file__).parents[1] / "launch" / "local.sh"


def train_in_processes(
    home: Path, workdir: Path, processes: int, devices: int, *more: str, steps: int = tiny_run.STEPS
) -> list[float]:
    """The losses of a run, or of what there is of it, after `steps` steps."""
    command = [LOCAL, "--devices", str(devices), str(processes), sys.executable, *tiny_run.flags(home, workdir)]
    command += ["--config.optimizer.schedule=constant", "--config.train.batch_size=8", f"--config.train.steps={steps}"]
    done = subprocess.run(
        [*command, *more], check=False, env=tiny_run.environment(home), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    said = said_by_the_second(done)
    assert not said, f"the first process speaks for all, and the second says {said}"
    return [line["loss"] for line in tiny_run.lines(workdir)]


GLOO = "[Gloo] Rank 1 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1"
WORDS_OF_GLOO = {word for word in GLOO.split() if not word.isdigit()}


def of_gloo(line: str) -> bool:
    """Whether it is a line of Gloo, which CPUs talk through, or a part of one: its threads cut each other short."""
    return all(word.isdigit() or word in WORDS_OF_GLOO for word in line.replace("[Gloo]", " [Gloo] ").split())


def said_by_the_second(done: subprocess.CompletedProcess) -> list[str]:
    """Its lines on stderr, but for those of Gloo and the log of XLA's compiler ("W1130 13:00:42.60 ...")."""
    said = [line.partition("[1]")[2] for line in done.stderr.splitlines() if "[1]" in line]
    return [line for line in said if not of_gloo(line) and not re.match(r" [IWE]\d{4} \d\d:", line)]
