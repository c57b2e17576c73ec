"""`sora-jax doctor --selftest`: the user's own devices put to the test, within ten minutes.

Equality rows compute one thing in two ways that must agree; speed rows time what most of a run's time goes into. Each
group runs in a process of its own, which prints a line of JSON for each row, so that a crash of one leaves the others.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

LIMIT = 600.0  # seconds, for everything
# module, and its rows in one process or each in its own
GROUPS = (("equality", ("",)), ("speed", ("rates", "world-sampler-step", "world-train-step", "autoencoder-decode")))


class Row(NamedTuple):
    """A row of the report: what was found, and for equality the bound it must keep."""

    name: str
    state: Literal["ok", "failed", "not run"]
    found: float | None
    unit: str  # "largest difference", "TFLOP/s", ...
    bound: float | None = None
    note: str = ""

    @property
    def line(self) -> str:
        found = "" if self.found is None else f"{self.found:.4g} {self.unit}"
        bound = "" if self.bound is None else f" (at most {self.bound:g})"
        facts = ", ".join(text for text in (found + bound, self.note) if text)
        return f"{self.state:8} {self.name:32} {facts}"


def selftest(platform: str, say: Callable[[str], None], limit: float = LIMIT) -> dict[str, Any]:
    """{"equality": rows, "speed": rows, "seconds": ...}; `say` gets each row as it comes."""
    end = time.monotonic() + limit
    document: dict[str, Any] = {}
    for title, parts in GROUPS:
        say("")
        rows: list[Row] = []
        for part in parts:
            rows += _run(f"sora_jax.doctor.{title}", part, platform, end - time.monotonic(), say)
        document[title] = [row._asdict() for row in rows]
    document["seconds"] = round(limit - (end - time.monotonic()), 1)
    return document


def _run(module: str, part: str, platform: str, limit: float, say: Callable[[str], None]) -> list[Row]:
    """The rows that `python -m module platform part` prints in `limit` seconds, and one more where it fails."""
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        say(row.line)

    name = part or module.rpartition(".")[2]
    if limit <= 0:
        add(Row(name, "not run", None, "", note="the ten minutes were over"))
        return rows
    child = subprocess.Popen(
        [sys.executable, "-m", module, platform, part], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    errors: list[str] = []
    assert child.stdout is not None
    assert child.stderr is not None
    reader = threading.Thread(target=lambda: errors.extend(child.stderr or ()), daemon=True)
    reader.start()
    alarm = threading.Timer(limit, child.kill)
    alarm.start()
    try:
        for line in child.stdout:
            if line.startswith('{"name"'):
                add(Row(**json.loads(line)))
        code = child.wait()
    finally:
        timed_out = not alarm.is_alive()
        alarm.cancel()
        if child.poll() is None:
            child.kill()
            child.wait()
    reader.join(timeout=5)
    if timed_out:
        add(Row(name, "not run", None, "", note="the ten minutes were over"))
    elif code:
        last = next((line.strip() for line in reversed(errors) if line.strip()), f"code {code}")
        add(Row(name, "failed", None, "", note=last[:300]))
    return rows


def report(row: Row) -> None:
    """What a child prints."""
    print(json.dumps(row._asdict()), flush=True)  # noqa: T201
