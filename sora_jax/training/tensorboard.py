"""Curves and images for TensorBoard, written by the thread that has them.

tensorboardX's own `SummaryWriter` hands them to a thread through a queue. On a full disk that thread ends without a
word, the queue fills up, and the run waits for it without end.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np


class EventFile:
    """A new file of events in `folder`. With `purge_step`, TensorBoard hides what earlier files have from there on.

    Its methods raise `OSError` when the file cannot be written.
    """

    def __init__(self, folder: Path, purge_step: int | None = None):
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._summary, self._event = summary, Event
        self._writer = EventsWriter(str(folder / "events"))
        if purge_step is not None:
            self._add(purge_step, session_log=SessionLog(status=SessionLog.START))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._add(step, summary=self._summary.scalar(name, value))

    def add_image(self, name: str, image: np.ndarray, step: int) -> None:
        """`image` uint8 [H, W, 3]."""
        self._add(step, summary=self._summary.image(name, image, dataformats="HWC"))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._event(step=step, wall_time=time.time(), **content))
