"""Processes of one run that share work through files: one goes first, and all wait for each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from sora_jax.errors import UserError

T = TypeVar("T")
LONGEST_WAIT = 7 * 24 * 3600  # seconds; a process that is dead is noticed by its heartbeat, long before


def first_then_others(work: Callable[[], T]) -> T:
    """`work` in the first process, then in all the others at once. Where it fails in the first, it fails in all."""
    if jax.process_count() == 1:
        return work()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    results: list[T] = []
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            results.append(work())
        except Exception as error:  # noqa: BLE001 (raised again below, when the others have been told)
            failure = error
    failed = bool(broadcast_one_to_all(np.int32(failure is not None)))
    if failure is not None:
        raise failure
    if failed:
        raise UserError("the first process of this run could not begin; its last line says why")
    return results[0] if results else work()


def wait_for_all(what: str) -> None:
    """Until all processes have come here; `what` is said once in a run."""
    if jax.process_count() == 1:
        return
    from orbax.checkpoint.multihost import sync_global_processes

    # With the processes named, Orbax waits at the coordinator; without, in a collective of all devices, which gives up.
    sync_global_processes(what, timeout=LONGEST_WAIT, processes=set(range(jax.process_count())))
