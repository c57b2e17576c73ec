"""Processes of one run that share work through files: one goes first, and all wait for each other.

They talk through the coordinator of the run, and not by collectives of their devices, which give up on each other while
one still works, and whose library prints to stdout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from sora_jax.errors import UserError

T = TypeVar("T")
LONGEST_WAIT = 7 * 24 * 3600  # seconds; a process that is dead is noticed by its heartbeat, long before


def first_then_others(what: str, work: Callable[[], T]) -> T:
    """`work` in the first process, then in all the others at once; where it fails in the first, it fails in all.
    `what` is said once in a run."""
    if jax.process_count() == 1:
        return work()
    key = f"sora_jax/{what}"
    if jax.process_index():
        if _client().blocking_key_value_get(key, LONGEST_WAIT * 1000) != "done":
            raise UserError(f"the first process of this run failed to {what}; its last line says why")
        return work()
    outcome = "failed"
    try:
        result = work()
        outcome = "done"
    finally:
        _client().key_value_set(key, outcome)
    return result


def wait_for_all(what: str) -> None:
    """Until all processes have come here; `what` is said once in a run."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(f"sora_jax/{what}", LONGEST_WAIT * 1000)


def _client() -> Any:
    """Of the coordinator. JAX has no public name for it; Orbax, which needs it as we do, gives it one."""
    from orbax.checkpoint import multihost

    return multihost.get_jax_distributed_client()
