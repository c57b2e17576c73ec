"""The processes that read for a loader: how they start, what they leave to their parent, and how they end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

LEFT_TO_THE_PARENT = (signal.SIGTERM, signal.SIGINT)


class Workers:
    """The processes that read for one loader.

    Grain sees that one of them has died where nothing more comes from it. But one that dies in the middle of a chunk
    leaves half of it in its pipe, and who reads that waits for ever; so they are watched from outside as well.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._others = set(multiprocessing.active_children())
        self._own: set[BaseProcess] = set()

    def started(self) -> None:
        new = set(multiprocessing.active_children()) - self._others
        self._own |= {process for process in new if process.name.startswith("grain-process-prefetch")}

    def dead(self) -> list[BaseProcess]:
        """Those that ended otherwise than by themselves."""
        return [process for process in self._own if process.exitcode]

    def kill(self) -> None:
        """End all at once, stopped ones too; a read that waits for them fails, unless it has half a chunk."""
        if not self._own:
            self.started()
        for process in self._own:
            process.kill()


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes started by this thread meanwhile do not hear SIGTERM and Ctrl-C, from their first instruction on."""
    resource_tracker.ensure_running()  # it starts with the first process, and would end the block for this thread
    before = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_THE_PARENT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(index: int, count: int) -> None:
    """In a new worker: leave signals to the parent, which saves its state first, and do not outlive it."""
    del index, count
    for number in LEFT_TO_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # a parent killed with SIGKILL tells nobody

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()
