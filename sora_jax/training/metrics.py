"""Metrics of a run, off its hot path: device values are fetched a few steps late, when they have long been computed.

    WORKDIR/metrics.jsonl     one JSON object a line: "step", "loss" and what else there is
    WORKDIR/tensorboard/      the same as curves, and sample grids
    Weights & Biases          the same again, where `train.wandb` names a project

A line's loss is the mean over the steps since the last one that was a multiple of `train.log_every`. Only the first
process writes. Objects in a store do not append, so the files of a run whose workdir is a URL lie on the local disk
(`MetricsWriter.folder`) and are uploaded at each checkpoint.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from sora_jax.training.files import is_url, writing
from sora_jax.training.tensorboard import EventFile
from sora_jax.training.wandb_run import WandbRun

JSONL = "metrics.jsonl"
GOODPUT = "goodput.json"  # written by `goodput.Goodput`
TENSORBOARD = "tensorboard"
WEIGHT = " weight"  # "NAME weight" among a step's metrics: how much its NAME counts in the mean over steps


class MetricsWriter:
    """The files of a run. On resume, lines past `step` and a torn last line are dropped. `folder` is where they lie,
    and None where they are not written (`active` is False)."""

    def __init__(self, workdir: epath.PathLike, step: int = 0, *, active: bool = True, wandb: WandbRun | None = None):
        self.folder: Path | None = None
        self._wandb = wandb
        if not active:
            return
        self._remote = epath.Path(workdir) if is_url(workdir) else None
        self.folder = Path(tempfile.mkdtemp(prefix="sora_jax-metrics-")) if self._remote else Path(workdir)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (JSONL, GOODPUT):
            if self._remote and (self._remote / name).exists():
                (self.folder / name).write_text((self._remote / name).read_text())
        kept = _lines_up_to(self.folder / JSONL, step)
        _replace(self.folder / JSONL, "".join(kept))
        self._file = (self.folder / JSONL).open("a")
        self._tensorboard = EventFile(self.folder / TENSORBOARD, step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line. JSON has no NaN: a value that is not finite becomes null, and is not in a curve (the loss of a band
        of levels that no token was at, say)."""
        if self.folder is None:
            return
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = dict.fromkeys(values) | finite
        with writing(self.folder):
            self._file.write(json.dumps({"step": step, **line}) + "\n")
            self._file.flush()
            for name, value in finite.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb:
            self._wandb.log(step, finite)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """`image` uint8 [H, W, 3], to TensorBoard."""
        if self.folder is not None:
            with writing(self.folder):
                self._tensorboard.add_image(name, image, step)
                self._tensorboard.flush()

    def upload(self) -> None:
        """Bring the files to a remote workdir; nothing to do for a local one."""
        if self.folder is None or self._remote is None:
            return
        for source in [self.folder / JSONL, *self.folder.glob(GOODPUT), *(self.folder / TENSORBOARD).glob("*")]:
            target = self._remote / source.relative_to(self.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())

    def close(self) -> None:
        if self.folder is not None:
            with writing(self.folder):
                self._file.close()
                self._tensorboard.close()
            self.upload()
        if self._wandb:
            self._wandb.close()


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
        """Values that are NaN (a noise band without a token, a skipped step) do not count; those that come with a
        weight (`WEIGHT`) count so much."""
        for name, value in values.items():
            if name.endswith(WEIGHT):
                continue
            total = self._sums.setdefault(name, [0.0, 0.0])
            if not math.isnan(value):
                weight = values.get(name + WEIGHT, 1.0)
                total[0] += value * weight
                total[1] += weight

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

    def idle(self) -> bool:
        """Whether the devices have done all steps they were given, and wait for more."""
        return not self._queue or all(value.is_ready() for value in self._queue[-1][1].values())  # type: ignore[attr-defined]

    def _drain(self, keep: int) -> None:
        while len(self._queue) > keep:
            step, metrics = self._queue.popleft()
            self._receive(step, {name: float(value) for name, value in jax.device_get(dict(metrics)).items()})


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
