"""How many programs a function was compiled to, as JAX itself reports them."""

from __future__ import annotations

import threading
from typing import Self

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"  # also where the program comes from the persistent cache


class Compilations:
    """Counts what this thread compiles while it is in the block, which may be entered again and again:

        programs = Compilations()
        with programs:
            step(state, batch)  # compiles for each new shape
        programs.count

    (`_cache_size` of a jitted function would count ways of calling it: one program may be there twice.)
    """

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILED and threading.get_ident() == self._thread:
            self.count += 1
