"""`train --profile START:STEPS`: a trace of a few steps, for xprof (`xprof --logdir WORKDIR/profile`)."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath

from sora_jax.errors import UserError
from sora_jax.training.files import is_url


class StepRange(NamedTuple):
    """Steps `first`, `first` + 1, ..., `last`, counted from 1 as in the lines of metrics."""

    first: int
    last: int


def parse_profile(text: str, steps: int) -> StepRange:
    """The steps that "START:STEPS" means in a run that ends after `steps`.

    >>> parse_profile("10:3", 100)
    StepRange(first=10, last=12)
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match:
        raise UserError(f'--profile takes START:STEPS, say 10:5 for the steps 10 to 14, not "{text}"')
    first, count = int(match[1]), int(match[2])
    if first < 1 or count < 1:
        raise UserError(f"--profile {text}: steps are counted from 1, and there must be at least one")
    if first + count - 1 > steps:
        raise UserError(
            f"--profile {text} ends with step {first + count - 1}, and the run with step {steps}; nearest: "
            f"{max(min(first, steps - count + 1), 1)}:{min(count, steps)}"
        )
    return StepRange(first, first + count - 1)


class Profiler:
    """Traces the steps of `steps` (None: none) into `folder`, a path or URL. `settle` waits for earlier
    steps."""

    def __init__(
        self, folder: epath.Path, steps: StepRange | None, settle: Callable[[], None], say: Callable[[str], None]
    ):
        self._folder, self._steps, self._settle, self._say = folder, steps, settle, say
        self._into: Path | None = None  # while a trace is taken

    def before(self, step: int) -> None:
        """Must be called before each step."""
        if self._steps is None or self._into or step < self._steps.first:
            return
        if step > self._steps.first:
            self._say(f"step {self._steps.first} is past: nothing is traced")
            self._steps = None
            return
        self._settle()
        remote = is_url(self._folder)
        self._into = Path(tempfile.mkdtemp(prefix="sora_jax-profile-")) if remote else Path(self._folder)
        jax.profiler.start_trace(str(self._into))

    def after(self, step: int, results: Any) -> None:
        """Must be called after each step; `results` are arrays that it makes."""
        if self._into and self._steps and step == self._steps.last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes what was traced so far; must be called when the run ends, however it does."""
        if not self._into:
            return
        jax.profiler.stop_trace()
        into, self._into, self._steps = self._into, None, None
        if into != Path(self._folder):
            for source in (path for path in into.rglob("*") if path.is_file()):
                target = self._folder / source.relative_to(into)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read_bytes())
        self._say(f"traced: xprof --logdir {self._folder}")
