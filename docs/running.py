"""What the scripts that run rows of tables share: which rows, in processes of their own, on what machine."""

from __future__ import annotations

import datetime as dt
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

QUIET = 0.1  # cores that other work may have taken, and a time still be the run's own


class Named(Protocol):
    """A row of a table."""

    @property
    def name(self) -> str: ...
    @property
    def group(self) -> str: ...


T = TypeVar("T", bound=Named)


def named(rows: Sequence[T], which: Sequence[str]) -> list[T]:
    """Those with these names or of these groups, in the order of `rows`; all, where nothing is named."""
    known = {word for row in rows for word in (row.name, row.group)}
    if unknown := set(which) - known:
        raise SystemExit(f"no run or group is called {', '.join(sorted(unknown))}; --list names them")
    return [row for row in rows if not which or {row.name, row.group} & set(which)]


def sora_jax(*command: str) -> str:
    """What `sora-jax COMMAND` prints, in a process of its own; stops the script when that fails."""
    sys.stderr.write(f"sora-jax {' '.join(command)}\n")
    done = subprocess.run([sys.executable, "-m", "sora_jax", *command], check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"stopped: exit code {done.returncode}; the same command goes on from here")
    return done.stdout


class OtherWork:
    """How many cores were busy with something else than our child processes since this was made (Linux)."""

    def __init__(self) -> None:
        self.began = self._now()

    def share(self) -> float | None:
        """In cores; None where the system does not say."""
        now = self._now()
        if now is None or self.began is None:
            return None
        seconds, busy, ours = (after - before for after, before in zip(now, self.began, strict=True))
        return round(max(busy - ours, 0.0) / max(seconds, 1e-9), 2)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _, _, irq, softirq = map(int, stat.read_text().split(maxsplit=8)[1:8])
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, children.ru_utime + children.ru_stime


def machine() -> dict[str, Any]:
    import jax

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "date": dt.date.today().isoformat(),
    }


def _processor() -> str:
    """Its name, where the system says it."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Five digits are more than any figure here has."""
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in values.items()}
