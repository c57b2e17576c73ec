"""A run that dies is started again; one that ends, or is told to, is not."""

from __future__ import annotations

import signal
import sys

import pytest
from etils import epath

from sora_jax.supervise import Supervisor, newest_step

# Dies as its n-th argument says at its n-th start: "kill", an exit code, or "save:CODE" after one more checkpoint.
SCRIPT = """
import os, pathlib, signal, sys
count = pathlib.Path("count")
n = int(count.read_text()) if count.exists() else 0
count.write_text(str(n + 1))
what = sys.argv[1:][n]
if what.startswith("save:"):
    pathlib.Path(f"checkpoints/{n + 1}").mkdir(parents=True)
    what = what[5:]
os.kill(os.getpid(), signal.SIGKILL) if what == "kill" else sys.exit(int(what))
"""


@pytest.mark.parametrize(
    ("plan", "restarts", "code", "starts", "waits"),
    [
        (["0"], 3, 0, 1, []),
        (["2"], 3, 2, 1, []),  # the user's to mend
        (["kill", "1", "0"], 3, 0, 3, [5, 10]),
        (["1", "1", "kill"], 2, -signal.SIGKILL, 3, [5, 10]),  # gives up
        (["save:1", "1", "save:kill", "1", "0"], 2, 0, 5, [5, 10, 5, 10]),  # what gets on may fail as often as it likes
        (["1"], 0, 1, 1, []),
    ],
)
def test_what_is_started_again(tmp_path, monkeypatch, plan, restarts, code, starts, waits):
    monkeypatch.chdir(tmp_path)
    slept: list[float] = []
    said: list[str] = []
    command = [sys.executable, "-c", SCRIPT, *plan]
    found = Supervisor(command, epath.Path(tmp_path), restarts, said.append, slept.append).run()
    assert (found, int((tmp_path / "count").read_text()), slept) == (code, starts, waits)
    assert len(said) == len(waits) + (code not in (0, 2))


def test_waits_grow_to_five_minutes(tmp_path):
    slept: list[float] = []
    Supervisor(["false"], epath.Path(tmp_path), 9, lambda text: None, slept.append).run()
    assert slept == [5, 10, 20, 40, 80, 160, 300, 300, 300]


def test_only_finished_checkpoints_count(tmp_path):
    assert newest_step(epath.Path(tmp_path)) == -1
    for name in ("20", "3", "40.orbax-checkpoint-tmp", "30.damaged"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(epath.Path(tmp_path)) == 20
