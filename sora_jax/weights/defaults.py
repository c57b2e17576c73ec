"""What a model folder says about sampling: the scheduler's file, and our own `sora_jax.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sora_jax.errors import UserError, nearest

# solver: (class in the scheduler's file, its key for the shift)
SCHEDULERS = {
    "unipc": ("UniPCMultistepScheduler", "flow_shift"),
    "euler": ("FlowMatchEulerDiscreteScheduler", "shift"),
    "heun": ("FlowMatchHeunDiscreteScheduler", "shift"),
}
TRAIN_STEPS = 1000  # model time is 1000 * sigma


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
        needed: dict[str, tuple[Any, Any]] = {
            "num_train_timesteps": (TRAIN_STEPS, TRAIN_STEPS),
            "use_dynamic_shifting": (False, False),
        }
        if solver == "unipc":
            needed |= {"prediction_type": ("flow_prediction", "epsilon"), "use_flow_sigmas": (True, False)}
        for name, (value, absent) in needed.items():  # the second is what the class takes for a missing key
            if (found := values.get(name, absent)) != value:
                raise UserError(f"scheduler {name} {found!r} is not supported; only {value!r} is")
        return cls(solver, float(values.get(key, 1.0)))

    def to_dict(self) -> dict[str, Any]:
        name, key = SCHEDULERS[self.solver]
        values: dict[str, Any] = {"_class_name": name, "num_train_timesteps": TRAIN_STEPS, key: self.shift}
        if self.solver == "unipc":
            values |= {
                "prediction_type": "flow_prediction",
                "use_flow_sigmas": True,
                "solver_order": 2,
                "solver_type": "bh2",
                "predict_x0": True,
                "lower_order_final": True,
                "final_sigmas_type": "zero",
            }
        return values


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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingDefaults:
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise UserError(f'unknown key "{key}": {nearest(key, known)}')
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
