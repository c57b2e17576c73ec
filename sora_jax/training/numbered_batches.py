"""Batches that are a function of their number alone, made a few ahead in a thread; so the state is one number."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from sora_jax.errors import UserError


class NumberedBatches:
    """Endless: `make(0)`, `make(1)`, ... `identity` is what must be the same for a run to go on, as JSON."""

    def __init__(self, make: Callable[[int], Any], identity: Mapping[str, Any], *, prefetch: int = 2):
        self._make, self._identity, self._prefetch = make, dict(identity), prefetch
        self._next = 0
        self._worker: _Worker | None = None

    def __next__(self) -> Any:
        if self._worker is None:
            self._worker = _Worker(self._make, self._next, self._prefetch)
        batch = self._worker.take()
        self._next += 1
        return batch

    def state(self) -> dict[str, Any]:
        return {"next": self._next, **self._identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name, now in self._identity.items():
            if state[name] != now:
                raise UserError(f"the data cannot go on where it stopped: {name} was {state[name]} and is {now}")
        self.close()
        self._next = int(state["next"])

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


class _Worker:
    """A thread that makes batches `first`, `first` + 1, ... and keeps `ahead` of them ready."""

    def __init__(self, make: Callable[[int], Any], first: int, ahead: int):
        self._make = make
        self._ready: queue.Queue[Any] = queue.Queue(max(ahead, 1))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(first,), name="batches", daemon=True)
        self._thread.start()

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            try:
                item = self._make(number)
            except BaseException as error:  # noqa: BLE001 (raised again where the batch is taken)
                item = error
            while not self._stop.is_set():
                try:
                    self._ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            number += 1

    def take(self) -> Any:
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
