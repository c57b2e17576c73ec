"""How a video is sampled: the settings that its record keeps, and the names they go by."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

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
