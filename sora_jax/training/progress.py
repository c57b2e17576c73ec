"""What a person watching a run sees: a bar on a terminal, a line every so often elsewhere; always on stderr."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import rich.console
import rich.progress


class Progress:
    """Progress of a run of `steps` steps. With `say`, lines go there and there is no bar; none at all when `silent`,
    as all processes of a run are but the first."""

    def __init__(self, steps: int, say: Callable[[str], None] | None = None, *, silent: bool = False):
        self._steps = steps
        self._say = (lambda text: None) if silent else say
        self._console = rich.console.Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self._bar: rich.progress.Progress | None = None
        self._task: Any = None
        self._rate = 0.0
        if self._say is None and self._console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                rich.progress.BarColumn(),
                rich.progress.TextColumn("{task.fields[text]}"),
                console=self._console,
                refresh_per_second=4,
            )

    def say(self, text: str) -> None:
        if self._say is not None:
            self._say(text)
        else:
            self._console.print(text)

    def step(self, step: int, loss: float) -> None:
        """After every step: moves the bar."""
        if self._bar is None:
            return
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=self._steps, completed=step, text="")
        self._bar.update(self._task, completed=step, text=f"loss {loss:.4f} · {self._speed(step)}")

    def line(self, step: int, values: Mapping[str, float]) -> None:
        """At every line of metrics."""
        self._rate = values["steps_per_second"]
        if self._bar is not None and "validation_loss" not in values:
            return
        shown = [f"step {step}/{self._steps}", f"loss {values['loss']:.4f}"]
        if "validation_loss" in values:
            shown.append(f"validation loss {values['validation_loss']:.4f}")
        if not math.isnan(worth := values.get("validation_caption_worth", math.nan)):
            shown.append(f"captions worth {worth:.4f}")
        shown += [f"{name} {values[name]:.2f}" for name in ("psnr", "validation_psnr") if name in values]
        shown.append(self._speed(step))
        if values["data_wait"] >= 0.02:
            shown.append(f"{values['data_wait']:.0%} of it waiting for data")
        self.say(" · ".join(shown))

    def _speed(self, step: int) -> str:
        if not self._rate:
            return "compiling"
        speed = f"{self._rate:.2f} steps/s" if self._rate >= 1 else f"{1 / self._rate:.2f} s/step"
        return f"{speed} · {duration((self._steps - step) / self._rate)} left"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def losses_by_skill(values: Mapping[str, float]) -> str:
    """The validation losses of a line of metrics where there are several skills; "" where there are not.

    >>> losses_by_skill({"loss": 0.3, "validation_loss": 0.25, "validation_first_loss": 0.21})
    'validation loss: text to video 0.2500, first 0.2100'
    """
    before, after = "validation_", "_loss"
    skills = {
        name.removeprefix(before).removesuffix(after): value
        for name, value in values.items()
        if name.startswith(before) and name.endswith(after) and name != "validation_loss"
    }
    if not skills:
        return ""
    named = {"text to video": values["validation_loss"], **skills}
    return "validation loss: " + ", ".join(f"{name} {value:.4f}" for name, value in named.items())


def duration(seconds: float) -> str:
    """A span of time for people.

    >>> duration(4.21), duration(75), duration(7260)
    ('4.2 s', '1 min 15 s', '2 h 01 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
