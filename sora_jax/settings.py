"""How a video is sampled: the settings that its record keeps, and the names they go by."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sora_jax.canvas import Canvas
from sora_jax.diffusion.sampler import find_solver, level_schedule
from sora_jax.errors import UserError, nearest
from sora_jax.record import Record

# What the pipelines of `diffusers` call our options (docs/open_models.md).
DIFFUSERS_NAMES = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "guidance_scale_2": "guidance_low",
    "num_frames": "frames",
    "num_videos_per_prompt": "num_videos",
    "generator": "seed",
    "latents": "noise",
    "output_type": "output",
    "flow_shift": "shift",
    "callback_on_step_end": "progress",
}


def refuse_other_names(options: Iterable[str], known: Iterable[str]) -> None:
    """An option that is not `known` is refused, with our name for what `diffusers` calls so."""
    known = set(known)
    for name in options:
        if name in DIFFUSERS_NAMES:
            raise UserError(f"{name} is called `{DIFFUSERS_NAMES[name]}` here")
        if name not in known:
            raise UserError(f"sample has no option {name}: {nearest(name, known)}")


def real(name: str, value: Any) -> float:
    """`value`, which must be a number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{name} must be a number, not {value!r}") from None


def whole(name: str, value: Any) -> int:
    """`value`, which must be a whole number: 2.5 steps are not 2."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise UserError(f"{name} must be a whole number, not {value!r}")
    return int(value)


def check_frames(name: str, value: Any, axes: str) -> None:
    """`value` must be uint8 pixels with these axes, say "H W 3"."""
    if not isinstance(value, np.ndarray):
        raise UserError(f"{name} must be a uint8 array [{axes}], not {value!r}; media.read_media makes one of a file")
    if value.dtype != np.uint8 or value.ndim != len(axes.split()) or value.shape[-1] != 3:
        raise UserError(f"{name} must be a uint8 array [{axes}], not {value.dtype} {list(value.shape)}")


@dataclass(frozen=True)
class Settings:
    """How a video is sampled; refuses what no solver can do."""

    steps: int
    guidance: float
    solver: str
    shift: float
    negative_prompt: str
    guidance_low: float | None = None  # of the expert for low noise, where there are two

    def __post_init__(self) -> None:
        if not isinstance(self.negative_prompt, str):
            raise UserError(f"a negative prompt is a text, not {self.negative_prompt!r}")
        level_schedule(find_solver(self.solver), self.steps, self.shift)
        for scale in (self.guidance, self.guidance_low or 0.0):
            if not math.isfinite(scale):
                raise UserError(f"guidance must be a finite number, not {scale}")

    def record(self, canvas: Canvas, seed: int, model: str, fps: float, lora: dict[str, float]) -> Record:
        return Record(
            prompt=" | ".join(dict.fromkeys(canvas.prompts)),
            seed=seed,
            model=model,
            frames=canvas.frames,
            height=canvas.height,
            width=canvas.width,
            fps=fps,
            lora=lora,
            **dataclasses.asdict(self),
        )
