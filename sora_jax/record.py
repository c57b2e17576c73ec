"""The record that every file carries of how it was made."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from sora_jax import __version__
from sora_jax.errors import UserError

MAX_SEED = 2**32 - 1

# The IPTC's term for media made by a model that learned from sampled content.
GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
ALGORITHMIC = "http://cv.iptc.org/newscodes/digitalsourcetype/algorithmicMedia"  # and for media that no model made


def check_seed(seed: int) -> None:
    """Raise `UserError` for a seed that no noise is drawn from."""
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed must be a whole number from 0 to {MAX_SEED}, not {seed}")


@dataclass(frozen=True)
class Record:
    """How a file was made: enough to make it again, and the statement that a model made it."""

    prompt: str
    seed: int
    model: str  # with its version: "world-1"
    negative_prompt: str = ""
    frames: int | None = None
    height: int | None = None  # of the model's frames; a file may show them enlarged
    width: int | None = None
    fps: float | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_low: float | None = None  # of the expert for low noise, where it has one of its own
    solver: str | None = None
    shift: float | None = None
    lora: dict[str, float] = dataclasses.field(default_factory=dict)  # files of adapters, with their weights
    given: dict[str, str] = dataclasses.field(default_factory=dict)  # files whose frames were given: {"image": path}
    software: str = f"sora_jax {__version__}"
    digital_source_type: str = GENERATED
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)  # what later versions add

    def to_json(self) -> str:
        return json.dumps({k: v for k, v in dataclasses.asdict(self).items() if v not in (None, {})})

    @staticmethod
    def from_json(text: str) -> Record | None:
        """The record that `to_json` wrote, or None where the text is something else (another program's comment)."""
        try:
            values = json.loads(text)
        except (ValueError, TypeError):
            return None
        if not isinstance(values, dict) or not {"prompt", "seed", "model", "software"} <= set(values):
            return None
        known = {field.name for field in dataclasses.fields(Record)}
        extra = dict(values.pop("extra", {}))
        extra |= {name: values.pop(name) for name in sorted(set(values) - known)}
        return Record(**values, extra=extra)
