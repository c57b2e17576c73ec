"""The commands of `sora-jax`, one small module each.

A module has `HELP` (one line), `EXAMPLES` (shown under its help), `add_arguments(parser)` and `run(args)`, and imports
nothing slow at its top: `sora-jax --help` reads all of them. `run` returns None, or the document that `--json` prints.
A command whose `OVERRIDES` is True takes `--config.a.b=v` flags, and finds them in `args.overrides` as "a.b=v". One
whose `CLUSTER` is True may be run by several processes at once (`sora_jax.cluster`); one whose `ALONE` is True refuses
to be, as all would write the same. One whose `STARTS_JAX` is False runs before JAX looks for devices. One that has
`exit_code(document)` may find something wrong without failing itself. One that has `dtype_of(args)` says by it which
dtype the head of the run is to name; otherwise that is `args.dtype`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

GROUPS: dict[str, tuple[str, ...]] = {
    "Make": ("sample", "export"),
    "Train": ("train", "plan", "checkpoint", "bench", "devices", "doctor"),
    "Data": ("encode", "data"),
    "Trust": ("eval", "verify-model"),
}

NAMES = tuple(name for names in GROUPS.values() for name in names)


def load(name: str) -> ModuleType:
    return importlib.import_module(f"sora_jax.commands.{name.replace('-', '_')}")
