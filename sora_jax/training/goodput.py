"""Goodput: the share of a run's time that went into steps which count, since its very first start.

Every second between that start and now stands under one cause, over all restarts:

    steps        steps that count: taken for the first time, and not skipped
    redone       steps taken again after a restart, as their results had not been saved
    skipped      steps whose gradients were not used
    start        the first start, until the first batch was asked for
    restart      later ones: from the last record that a process left until its follower asks for a batch
    compile  data  validation  samples  checkpoint      as the loop measures them
    other        what is none of these

`data` is time in which the devices had run out of steps. Between two records, time that was spent on steps is shared
out by their number. The names follow Google's ml-goodput-measurement, which needs cloud logging; here they are one
small file, WORKDIR/goodput.json, that is replaced with each line of metrics and read when a run goes on.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sora_jax.training.files import writing
from sora_jax.training.progress import duration
from sora_jax.training.watch import Clock

MEASURED = ("compile", "data", "validation", "samples", "checkpoint")  # by the loop's clock


class Goodput:
    """The account of one run. `path` is its file (None: not written, as in all processes but the first); `clock` began
    with this process's part of the run, which goes on from `step`."""

    def __init__(self, path: Path | None, clock: Clock, step: int, *, now: Callable[[], float] = time.time):
        self._path, self._clock = path, clock
        began = now() - clock.total
        before = _read(path)
        self.seconds: dict[str, float] = defaultdict(float, before.get("seconds", {}))
        self._reached = max(before.get("reached", 0), step)
        self._restarts = before.get("restarts", -1) + 1
        # A run that had come to its end and is made longer was not waiting meanwhile.
        idle = max(began - before.get("recorded", began), 0.0)
        self._started = before.get("started", began) + (idle if before.get("finished") else 0.0)
        self.seconds["restart" if self._restarts else "start"] += 0.0 if before.get("finished") else idle
        self._taken: Counter[str] = Counter()
        self._before: dict[str, float] = {"total": 0.0}
        self._began = began

    def begin(self) -> None:
        """Everything up to here was getting ready."""
        now = self._clock.snapshot()
        self.seconds["restart" if self._restarts else "start"] += now["total"] - self._before["total"]
        self._before = now

    def took(self, step: int, *, skipped: bool) -> None:
        """A step has come back from the devices."""
        self._taken["redone" if step <= self._reached else "skipped" if skipped else "steps"] += 1
        self._reached = max(self._reached, step)

    def record(self, *, finished: bool = False) -> float:
        """Accounts for all time since the last record, writes the file, and returns the goodput, 0 to 1.

        Not to be called while the clock measures a cause: what it has taken so far is known at its end only.
        """
        now = self._clock.snapshot()
        spent = {name: value - self._before.get(name, 0.0) for name, value in now.items()}
        measured = {name: spent.get(name, 0.0) for name in MEASURED}
        for cause, s in measured.items():
            self.seconds[cause] += s
        on_steps, taken = spent["total"] - sum(measured.values()), sum(self._taken.values())
        for cause, count in (self._taken if taken else {"other": 1}).items():
            self.seconds[cause] += on_steps * count / max(taken, 1)
        self._before = now
        self._taken.clear()
        if self._path is not None:
            temporary = self._path.with_suffix(".partial")
            with writing(self._path):
                temporary.write_text(json.dumps(self.document(finished), indent=1) + "\n")
                temporary.replace(self._path)
        return self.goodput

    @property
    def goodput(self) -> float:
        total = sum(self.seconds.values())
        return self.seconds["steps"] / total if total else 0.0

    def document(self, finished: bool = False) -> dict[str, Any]:
        """What the file holds; times are seconds since 1970."""
        return {
            "goodput": self.goodput,
            "seconds": dict(self.seconds),
            "started": self._started,
            "recorded": self._began + self._before["total"],
            "restarts": self._restarts,
            "reached": self._reached,
            "finished": finished,
        }

    @property
    def line(self) -> str:
        """For the end of a run: the goodput, and what took the rest, most first."""
        total = sum(self.seconds.values())
        shares = sorted(((s, name) for name, s in self.seconds.items() if name != "steps"), reverse=True)
        rest = ", ".join(f"{name} {s / total:.0%}" for s, name in shares if total and s >= 0.005 * total)
        since = f"{duration(total)} since the first start" if self._restarts else duration(total)
        return f"goodput {self.goodput:.0%} of {since}" + (f"; {rest}" if rest else "")


def _read(path: Path | None) -> dict[str, Any]:
    """The account so far; empty where there is none, or none that can be read."""
    try:
        return json.loads(path.read_text()) if path else {}
    except (OSError, ValueError):
        return {}
