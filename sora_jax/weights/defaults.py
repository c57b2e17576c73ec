"""What a model folder says about sampling: the scheduler's file, and our own `sora_jax.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sora_jax.diffusion.solvers import TRAIN_STEPS
from sora_jax.errors import UserError, nearest

# solver: (class in the scheduler's file, its key for the shift)
SCHEDULERS = {
    "unipc": ("UniPCMultistepScheduler", "flow_shift"),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", "flow_shift"),
    "euler": ("FlowMatchEulerDiscreteScheduler", "shift"),
    "heun": ("FlowMatchHeunDiscreteScheduler", "shift"),
}
# What else a scheduler's file must say for its solver to be ours: key, the value, and what the class takes for a
# missing key.
_FLOW = (("prediction_type", "flow_prediction", "epsilon"), ("use_flow_sigmas", True, False))
_SECOND_ORDER = (("solver_order", 2, 2), ("lower_order_final", True, True), ("final_sigmas_type", "zero", "zero"))
NEEDED: Mapping[str, tuple[tuple[str, Any, Any], ...]] = {
    "unipc": (*_FLOW, *_SECOND_ORDER, ("solver_type", "bh2", "bh2"), ("predict_x0", True, True)),
    "dpmpp_2m": (
        *_FLOW,
        *_SECOND_ORDER,
        ("solver_type", "midpoint", "midpoint"),
        ("algorithm_type", "dpmsolver++", "dpmsolver++"),
        ("euler_at_final", False, False),
    ),
    "euler": (),
    "heun": (),
}


@dataclass(frozen=True)
class SchedulerDefaults:
    """The solver, and the shift s of its noise levels: sigma' = s sigma / (1 + (s - 1) sigma)."""

    solver: str = "unipc"
    shift: float = 5.0

    def __post_init__(self) -> None:
        if self.solver not in SCHEDULERS:
            raise UserError(f'unknown solver "{self.solver}": {nearest(self.solver, SCHEDULERS)}')
        if not self.shift > 0:
            raise UserError(f"the shift of the noise levels must be > 0, not {self.shift}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SchedulerDefaults:
        """From a scheduler_config.json of `diffusers`; `UserError` when it is not for a flow with a fixed shift."""
        names = {name: (solver, key) for solver, (name, key) in SCHEDULERS.items()}
        name = values.get("_class_name")
        if name not in names:
            raise UserError(f'scheduler "{name}" is not supported: {nearest(str(name), names)}')
        solver, key = names[name]
        any_flow = (("num_train_timesteps", TRAIN_STEPS, TRAIN_STEPS), ("use_dynamic_shifting", False, False))
        for name, value, absent in (*any_flow, *NEEDED[solver]):
            if (found := values.get(name, absent)) != value:
                raise UserError(f"scheduler {name} {found!r} is not supported; only {value!r} is")
        return cls(solver, float(values.get(key, 1.0)))

    def to_dict(self) -> dict[str, Any]:
        name, key = SCHEDULERS[self.solver]
        needed = {needed: value for needed, value, _ in NEEDED[self.solver]}
        return {"_class_name": name, "num_train_timesteps": TRAIN_STEPS, key: self.shift, **needed}


@dataclass(frozen=True)
class SamplingDefaults:
    """What `sample` takes when it is not told; the defaults are those of Wan 2.1."""

    version: str = ""  # such as "world-1"
    frames: int = 81
    height: int = 480
    width: int = 832
    fps: float = 16.0
    steps: int = 50
    guidance: float = 5.0
    negative_prompt: str = ""
    card: Mapping[str, Any] = field(default_factory=dict)  # facts for the model card: data, licence, figures
    takes_frames: bool = True  # whether given frames may lie beside noise: levels per latent frame were trained
    guidance_low: float | None = None  # of the expert for low noise, where there are two; None: as `guidance`

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingDefaults:
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise UserError(f'unknown key "{key}": {nearest(key, known)}')
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if value is not None}
