"""A run that is started again when it fails, by a parent that holds no device and does nothing else.

Kept alive are runs that die of the machine: a killed process, a lost peer, a device that ran out. Not those that end
well (0), that the user has to mend (2), or that were told to stop.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NamedTuple

from etils import epath

from sora_jax.errors import UserError
from sora_jax.training.files import finished_steps

FIRST_WAIT, LONGEST_WAIT = 5.0, 300.0  # seconds; doubled from one failure to the next
ENDS = (0, 2, 130)  # done; a mistake of the user's; Ctrl-C

Say = Callable[[str], None]


class Supervisor(NamedTuple):
    """Starts `command` again when it fails, at most `restarts` times in a row without a new checkpoint in `workdir`."""

    command: Sequence[str]
    workdir: epath.Path
    restarts: int
    say: Say
    sleep: Callable[[float], None] = time.sleep

    def run(self) -> int:
        """The exit code of the last attempt."""
        failures, wait = 0, FIRST_WAIT
        before = newest_step(self.workdir)
        while True:
            code, told = _run_once(self.command)
            if told or code in ENDS:
                return code
            step = newest_step(self.workdir)
            if step > before:
                failures, wait, before = 0, FIRST_WAIT, step
            failures += 1
            if failures > self.restarts:
                self.say(f"the run ended with {_name(code)}, {failures} times without a new checkpoint: giving up")
                return code
            at = f"from step {step}" if step >= 0 else "from its beginning"
            self.say(f"the run ended with {_name(code)}; again {at} in {wait:g} s ({failures} of {self.restarts})")
            self.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)


def newest_step(workdir: epath.Path) -> int:
    """Of the checkpoints that were finished; -1 where there is none."""
    return max(finished_steps(workdir / "checkpoints"), default=-1)


def _run_once(command: Sequence[str]) -> tuple[int, bool]:
    """Its exit code, and whether this process was told to stop meanwhile; signals are passed on."""
    child: subprocess.Popen[bytes] | None = None
    told: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        told.append(number)
        if child is not None:
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        # A group of its own: Ctrl-C reaches it once, from here, and not once more from the terminal.
        child = subprocess.Popen(command, process_group=0)
        if told:
            child.send_signal(told[-1])
        return child.wait(), bool(told)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def supervise(argv: Sequence[str], workdir: str, restarts: int, say: Say) -> int:
    """`sora-jax ARGV` with its flag --supervise taken out, as often as it needs; its exit code."""
    if restarts < 0:
        raise UserError(f"--supervise must be a number of restarts >= 0, not {restarts}")
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--supervise":
            next(words)
        elif not word.startswith("--supervise="):
            kept.append(word)
    return Supervisor([sys.executable, "-m", "sora_jax", *kept], epath.Path(workdir), restarts, say).run()
