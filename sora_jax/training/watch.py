"""Where the time and the memory of a run go: a clock that knows causes, and the rates between two lines of metrics."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from sora_jax.training.metrics import peak_flops
from sora_jax.training.stage import Stage, Work

PAUSES = ("compile", "validation", "samples", "checkpoint")  # what the speed of steps is reckoned without


class Clock:
    """Seconds since the start, and what they went to: "data", "validation", "checkpoint", ...; the rest is steps."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._now = now
        self._start = now()

    @contextmanager
    def spent_on(self, what: str, only_if: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """What the block takes counts as `what`, unless `only_if()` is False at its end: then it was spent on steps."""
        start = self._now()
        try:
            yield
        finally:
            if only_if():
                self.seconds[what] = self.seconds.get(what, 0.0) + self._now() - start

    @property
    def total(self) -> float:
        return self._now() - self._start

    def snapshot(self) -> dict[str, float]:
        return {**self.seconds, "total": self.total}


class Window:
    """Speed between two lines."""

    def __init__(self, clock: Clock, stage: Stage, mesh: jax.sharding.Mesh):
        self._clock, self._stage = clock, stage
        self._mean = Work(stage.tokens_per_step, stage.flops_per_step)
        kind = mesh.devices.flat[0].device_kind
        self._peak = (peak_flops(kind) or 0.0) * mesh.size
        self.begin(0)

    def begin(self, step: int) -> None:
        self._step, self._before = step, self._clock.snapshot()
        self._sent: list[Work] = []

    def did(self, batch: Any) -> None:
        """A step on that batch was sent to the devices."""
        stage = self._stage
        self._sent.append(stage.work(batch) if stage.work else Work(stage.tokens_per_step, stage.flops_per_step))

    def rates(self, step: int) -> dict[str, float]:
        """steps_per_second, seconds_per_step, tokens_per_second, tflops (and mfu where the device's peak is known)
        without the time that validation, samples and checkpoints took, and the share of the rest in which the devices
        had nothing to do for want of data."""
        now = self._clock.snapshot()
        spent = {name: value - self._before.get(name, 0.0) for name, value in now.items()}
        steps = step - self._step
        busy = max(spent["total"] - sum(spent.get(name, 0.0) for name in PAUSES), 1e-9)
        rate = steps / busy
        # Lines come a few steps late, so what was sent since the last one are not the same steps; but as many a step.
        if self._sent:
            self._mean = Work(*(sum(each) / len(self._sent) for each in zip(*self._sent, strict=True)))
        self.begin(step)
        rates = {"steps_per_second": rate, "data_wait": spent.get("data", 0.0) / busy}
        if steps:
            rates["seconds_per_step"] = busy / steps
        if self._mean.tokens:
            rates["tokens_per_second"] = rate * self._mean.tokens
        if flops := rate * self._mean.flops:
            rates["tflops"] = flops / 1e12
            if self._peak:
                rates["mfu"] = flops / self._peak
        return rates


def memory() -> dict[str, float]:
    """GiB that this process holds of the host's memory and, where its devices count theirs, the most that one of them
    holds and has held."""
    held = {"host_gib": _resident_bytes() / 2**30}
    counted = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    for name, key in (("device_gib", "bytes_in_use"), ("device_peak_gib", "peak_bytes_in_use")):
        if found := [stats[key] for stats in counted if key in stats]:
            held[name] = max(found) / 2**30
    return held


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):  # no Linux: the most it has held
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return pages * resource.getpagesize()
