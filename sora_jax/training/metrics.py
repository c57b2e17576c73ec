"""Metrics of a run, off its hot path: device values are fetched a few steps late, when they have long been computed.

    WORKDIR/metrics.jsonl     one JSON object a line: "step", "loss" and what else there is
    WORKDIR/tensorboard/      the same as curves, and sample grids

A line's loss is the mean over the steps since the last one that was a multiple of `train.log_every`. Only the first
process writes. Objects in a store do not append, so the files of a run whose workdir is a URL lie on the local disk and
are uploaded at each checkpoint.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from sora_jax.training.files import is_url, writing
from sora_jax.training.tensorboard import EventFile

JSONL = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class MetricsWriter:
    """The files of a run. On resume, lines past `step` and a torn last line are dropped."""

    def __init__(self, workdir: epath.PathLike, step: int = 0, *, active: bool = True):
        self._active = active
        if not active:
            return
        self._remote = epath.Path(workdir) if is_url(workdir) else None
        self._local = Path(tempfile.mkdtemp(prefix="sora_jax-metrics-")) if self._remote else Path(workdir)
        if self._remote and (self._remote / JSONL).exists():
            (self._local / JSONL).write_text((self._remote / JSONL).read_text())
        self._local.mkdir(parents=True, exist_ok=True)
        kept = _lines_up_to(self._local / JSONL, step)
        _replace(self._local / JSONL, "".join(kept))
        self._file = (self._local / JSONL).open("a")
        self._tensorboard = EventFile(self._local / TENSORBOARD, step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line. JSON has no NaN: a value that is not finite becomes null."""
        if not self._active:
            return
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with writing(self._local):
            self._file.write(json.dumps({"step": step, **line}) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """`image` uint8 [H, W, 3], to TensorBoard."""
        if self._active:
            with writing(self._local):
                self._tensorboard.add_image(name, image, step)
                self._tensorboard.flush()

    def upload(self) -> None:
        """Bring the files to a remote workdir; nothing to do for a local one."""
        if not self._active or self._remote is None:
            return
        for source in [self._local / JSONL, *(self._local / TENSORBOARD).glob("*")]:
            target = self._remote / source.relative_to(self._local)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())

    def close(self) -> None:
        if self._active:
            with writing(self._local):
                self._file.close()
                self._tensorboard.close()
            self.upload()


def _lines_up_to(path: Path, step: int) -> list[str]:
    if not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                continue
        except (ValueError, KeyError, TypeError):
            continue
        kept.append(line)
    return kept


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".partial")
    temporary.write_text(text)
    temporary.replace(path)


class Averages:
    """Running means of named values between lines. What it holds is part of a checkpoint, so that a line does not
    depend on where a run was interrupted."""

    def __init__(self, state: Mapping[str, Any] | None = None):
        self._sums: dict[str, list[float]] = {name: list(pair) for name, pair in (state or {}).items()}

    def add(self, values: Mapping[str, float]) -> None:
        """Values that are NaN (a noise band without a token, a skipped step) do not count."""
        for name, value in values.items():
            total = self._sums.setdefault(name, [0.0, 0.0])
            if not math.isnan(value):
                total[0] += value
                total[1] += 1.0

    def means(self) -> dict[str, float]:
        """The means so far, NaN where nothing counted."""
        return {name: total / count if count else math.nan for name, (total, count) in self._sums.items()}

    def clear(self) -> None:
        self._sums.clear()

    def state(self) -> dict[str, list[float]]:
        return {name: list(pair) for name, pair in self._sums.items()}


class LateMetrics:
    """A queue of metrics still on the device: `push` hands back those of the step `delay` steps ago.

    Waiting for them keeps Python no more than `delay` steps ahead of the device.
    """

    def __init__(self, receive: Callable[[int, dict[str, float]], None], delay: int = 2):
        self._receive, self._delay = receive, delay
        self._queue: deque[tuple[int, Mapping[str, jax.Array]]] = deque()

    def push(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        self._queue.append((step, metrics))
        self._drain(self._delay)

    def flush(self) -> None:
        self._drain(0)

    def _drain(self, keep: int) -> None:
        while len(self._queue) > keep:
            step, metrics = self._queue.popleft()
            self._receive(step, {name: float(value) for name, value in jax.device_get(dict(metrics)).items()})


class Clock:
    """Seconds since the start, and what they went to: "data", "validation", "checkpoint", ...; the rest is steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def spent_on(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start

    @property
    def total(self) -> float:
        return time.perf_counter() - self._start

    def snapshot(self) -> dict[str, float]:
        return {**self.seconds, "total": self.total}


# Peak dense bfloat16 FLOP/s of a device, by a part of its `device_kind` (vendors' data sheets).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 1154e12,  # a device is one of the chip's two cores
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L4": 121e12,
}


def peak_flops(kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device of this kind; None where it is not known (any CPU)."""
    # The longest name that fits: "TPU v5 lite" before "TPU v5".
    fits = [name for name in PEAK_FLOPS if name.lower() in kind.lower()]
    return PEAK_FLOPS[max(fits, key=len)] if fits else None
