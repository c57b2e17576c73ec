"""The processes that read for a loader: how they start, what they leave to their parent, and how they end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, runtime_checkable

from sora_jax.errors import UserError

LEFT_TO_THE_PARENT = (signal.SIGTERM, signal.SIGINT)


class LoaderError(RuntimeError):
    """No more batches come, through no fault in the data: a process that reads died or hangs."""


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

    def died(self) -> LoaderError | None:
        """That one of them ended otherwise than by itself."""
        codes = [process.exitcode for process in self._own if process.exitcode]
        if not codes:
            return None
        what = f"one of {self.count} processes that read ahead died"
        return LoaderError(f"{what} (exit code {codes[0]}; out of memory, perhaps)")

    def kill(self) -> None:
        """End all at once, stopped ones too; a read that waits for them fails, unless it has half a chunk."""
        if not self._own:
            self.started()
        for process in self._own:
            process.kill()


@runtime_checkable
class Indexed(Protocol):
    """What processes can read from: it travels to them pickled, and `source[number]` depends on the number alone."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...


@dataclass(frozen=True)
class _Caught:
    """`source` whose errors are items, (None, error): raised in a worker they would come with remarks of Grain's."""

    source: Indexed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> tuple[Any, Exception | None]:
        try:
            return self.source[number], None
        except Exception as error:  # noqa: BLE001 (raised again in the parent)
            if not isinstance(error, UserError):  # the parent does not see where it was
                error.add_note("".join(traceback.format_tb(error.__traceback__)))
            return None, error


def in_processes(source: Indexed, start: int, workers: Workers, *, chunk: int = 1) -> Generator[Any, None, None]:
    """source[start], source[start + 1], ... to its end, read by `workers`, `chunk` at a time; in this order, however
    many they are. Raises what `source` raises there, and `LoaderError` when one of them dies."""
    # Grain brings in JAX and absl; whoever reads in this process does without.
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers read their flags, and outside absl.app nobody parses them
    # Chunks are cut before they are dealt to workers: the other way round, the order would depend on their number.
    # They travel as bytes: Grain gives every array a shared memory of its own, which costs small ones more than a copy.
    chunks = grain.MapDataset.source(_Caught(source)).slice(slice(start, None)).batch(chunk, batch_fn=pickle.dumps)
    read = chunks.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers.count, per_worker_buffer_size=2),
        worker_init_fn=start_worker,
    )
    # JAX reads this when it is imported, in the new process before any function of ours runs there; and so long no
    # signal may end it either.
    with environment(JAX_PLATFORMS="cpu"), signals_blocked():
        chunk_iterator = iter(read)
        items = next(chunk_iterator, None)
    workers.started()
    try:
        while items is not None:
            for item, error in pickle.loads(items):
                if error is not None:
                    raise error
                yield item
            items = next(chunk_iterator, None)
    except RuntimeError as error:  # Grain's own, where it is the first to see that one has died
        if died := workers.died():
            raise died from error
        raise
    finally:
        chunk_iterator.close()


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
