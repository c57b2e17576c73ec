"""Batches that are a function of their number alone, made a few ahead, in a thread or in processes; so the state is one
number."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from sora_jax.data.producer import Producer
from sora_jax.data.workers import Workers, in_processes
from sora_jax.errors import UserError

_ENDLESS = 2**62  # a length: Grain wants one


class NumberedBatches:
    """Endless: `make(0)`, `make(1)`, ... `identity` is what must be the same for a run to go on, as JSON.

    With `workers` so many processes make them, and `make` must travel to these; else a thread of this one. When one of
    the processes dies, or nothing comes for `stalled_seconds` (0: never), `LoaderError` is raised.
    """

    def __init__(
        self,
        make: Callable[[int], Any],
        identity: Mapping[str, Any],
        *,
        prefetch: int = 2,
        workers: int = 0,
        stalled_seconds: float = 0.0,
    ):
        self._make, self._identity = make, dict(identity)
        self._prefetch, self._workers, self._stalled_seconds = max(prefetch, 1), workers, stalled_seconds
        self._next = 0
        self._producer: Producer | None = None

    def __next__(self) -> Any:
        if self._producer is None:
            workers = Workers(self._workers)
            batches = _batches(self._make, self._next, workers)
            self._producer = Producer(batches, self._prefetch, workers, self._stalled_seconds)
        batch = next(self._producer)
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
        if self._producer is not None:
            self._producer.close()
            self._producer = None


@dataclass(frozen=True)
class _Endless:
    """`make` as what processes read from."""

    make: Callable[[int], Any]

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, number: int) -> Any:
        return self.make(number)


def _batches(make: Callable[[int], Any], number: int, workers: Workers) -> Generator[Any, None, None]:
    """Batch `number` and those after it."""
    if workers.count:
        yield from in_processes(_Endless(make), number, workers)
    while True:
        yield make(number)
        number += 1
