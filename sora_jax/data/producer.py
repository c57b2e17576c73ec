"""What is made ahead in a thread, and what happens when nothing more comes."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Generator
from typing import Any, Self

from sora_jax.data.workers import LoaderError, Workers

PATIENCE = 2.0  # seconds: for what a dead worker had sent to come in, for a thread to end its batch
STARTING = 60.0  # seconds more for the first batch: processes start, files are opened


class Producer:
    """Runs an iterator up to `ahead` items ahead in a thread; errors are raised where the item would have come.

    `workers` are the processes that the iterator reads from. That one of them dies is an error too, and that nothing
    comes for `stalled_seconds` (0: never), which `ahead` = 0 does not notice.
    """

    def __init__(self, items: Generator[Any, None, None], ahead: int, workers: Workers, stalled_seconds: float = 0.0):
        self._items, self._ahead = items, ahead
        self._workers, self._limit = workers, stalled_seconds
        self._queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(max(ahead, 1))
        self._stop = threading.Event()
        self._started = False
        self._end: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        if ahead:
            self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        if self._end is not None:
            raise self._end
        item, self._end = self._await() if self._ahead else self._draw()
        if self._end is not None:
            raise self._end
        return item

    def _await(self) -> tuple[Any, BaseException | None]:
        """What the thread makes next, or why nothing comes any more."""
        count = self._workers.count
        limit = self._limit + (0.0 if self._started or not count else STARTING)
        began = time.monotonic()
        died: float | None = None
        while True:
            with contextlib.suppress(queue.Empty):
                found = self._queue.get(timeout=0.5)
                self._started = True
                return found
            now = time.monotonic()
            if error := self._workers.died():
                died = died or now
                if now - died >= PATIENCE:
                    break
            if self._limit and now - began >= limit:
                hangs = f"one of {count} processes that read ahead hangs" if count else "reading hangs"
                slow = "or the storage is slower than data.stalled_seconds allows"
                error = LoaderError(f"no batch for {limit:g} s: {hangs}, {slow}")
                break
        self._workers.kill()  # the thread may be waiting for one that is stopped
        return None, error

    def _draw(self) -> tuple[Any, BaseException | None]:
        try:
            return next(self._items), None
        except BaseException as error:  # noqa: BLE001 (raised again by __next__, StopIteration among them)
            return None, error

    def _run(self) -> None:
        end = None
        while end is None and not self._stop.is_set():
            item, end = self._draw()
            while not self._stop.is_set():
                with contextlib.suppress(queue.Full):
                    self._queue.put((item, end), timeout=0.1)
                    break
        self._items.close()  # here, for Grain waits in it for workers that may hang

    def close(self) -> None:
        """End the thread and the processes. A thread that hangs in a read goes with this process."""
        self._stop.set()
        if not self._ahead:
            self._items.close()
            return
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self._workers.kill()
            self._thread.join(PATIENCE)
