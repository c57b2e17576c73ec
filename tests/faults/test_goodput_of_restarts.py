"""A run that is killed and started again: its whole wall time is accounted for, by cause."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import STEPS, environment, flags, lines, make_home

pytestmark = [pytest.mark.faults, pytest.mark.slow]

AWAY = 2.0  # seconds between the kill and the restart


def test_the_causes_add_up_to_the_wall_time_over_a_kill(tmp_path: Path):
    home = make_home(tmp_path)
    workdir = home / "run"

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *flags(home, workdir)], env=environment(home), stderr=subprocess.PIPE, text=True
        )

    before = time.time()
    process = start()
    # 3 steps to a checkpoint: killed at a step that has to be taken again
    while process.poll() is None and not any(line["step"] == 8 for line in lines(workdir)):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    reached = json.loads((workdir / "goodput.json").read_text())["reached"]
    time.sleep(AWAY)
    process = start()
    _, errors = process.communicate(timeout=300)
    after = time.time()
    assert process.returncode == 0, errors
    resumed = int(errors.split("at step ")[1].split()[0]) if "resuming" in errors else 0

    account = json.loads((workdir / "goodput.json").read_text())
    seconds = account["seconds"]
    assert sum(seconds.values()) == pytest.approx(account["recorded"] - account["started"], abs=0.01)
    assert before < account["started"] < account["recorded"] < after
    assert account["recorded"] - account["started"] > 0.5 * (after - before), "only Python's own start is outside"
    assert all(s >= 0 for s in seconds.values())
    assert seconds["restart"] > AWAY
    assert (seconds.get("redone", 0) > 0) == (reached > resumed)
    assert seconds["steps"] > 0
    assert seconds["compile"] > 0
    assert seconds["checkpoint"] > 0
    assert seconds.get("other", 0) < 0.2 * sum(seconds.values())
    assert (account["reached"], account["restarts"], account["finished"]) == (STEPS, 1, True)
    assert account["goodput"] == pytest.approx(seconds["steps"] / sum(seconds.values()))
    assert f"goodput {account['goodput']:.0%} of" in errors
    assert lines(workdir)[-1]["goodput"] == pytest.approx(account["goodput"], abs=0.1)
