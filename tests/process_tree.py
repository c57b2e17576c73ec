"""Who is whose child, and who is still there, from Linux's /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path


def descendants(pid: int) -> list[int]:
    try:
        # every thread has children of its own
        text = " ".join(
            Path(f"/proc/{pid}/task/{thread}/children").read_text() for thread in os.listdir(f"/proc/{pid}/task")
        )
    except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
        return []
    children = [int(child) for child in text.split()]
    return [*children, *(below for child in children for below in descendants(child))]


def arguments_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except FileNotFoundError:
        return []


def environment_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


def loader_workers(pid: int) -> list[int]:
    """The processes that read for a run."""
    return [child for child in descendants(pid) if any("spawn_main" in word for word in arguments_of(child))]


def is_alive(pid: int) -> bool:
    """Not so of one that has ended and that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def outlive(pids: Iterable[int], seconds: float = 5.0) -> list[int]:
    """Which of these processes are still there after so long."""
    end = time.monotonic() + seconds
    left = list(pids)
    while left and time.monotonic() < end:
        time.sleep(0.05)
        left = [pid for pid in left if is_alive(pid)]
    return left
