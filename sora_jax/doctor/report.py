"""The report of `sora-jax doctor`, to be sent: JSON, and the same as text beside it."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from sora_jax.doctor.checks import Check
from sora_jax.doctor.selftest import Row
from sora_jax.doctor.versions import versions
from sora_jax.errors import UserError

PREFIXES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "CUDA_VISIBLE", "NVIDIA_VISIBLE", "SLURM_NTASKS", "MEGASCALE_NUM")


def check_out(out: str) -> None:
    """Raises `UserError` where no report can be written, before ten minutes are spent on one."""
    path = Path(out)
    if path.suffix != ".json":
        raise UserError(f"--out is the name of a JSON file, say report.json, not {out}")
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"--out {out} cannot be written: its folder is not there, or may not be written to")


def write_report(document: dict[str, Any], out: str) -> str:
    """Writes both files; returns their names. Neither holds the environment but for what steers JAX."""
    check_out(out)
    path = Path(out)
    whole = {
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "environment": {name: text for name, text in sorted(os.environ.items()) if name.startswith(PREFIXES)},
        **document,
    }
    text = path.with_suffix(".txt")
    path.write_text(json.dumps(whole, indent=2) + "\n")
    text.write_text(as_text(whole))
    return f"{path} and {text}"


def as_text(whole: dict[str, Any]) -> str:
    lines = [f"sora-jax doctor · {whole['made']} · {whole['machine']} · {whole['cores']} cores"]
    lines += [", ".join(f"{name} {text}" for name, text in whole["versions"].items())]
    lines += [f"{name}={text}" for name, text in whole["environment"].items()]
    lines += ["", *(Check(**check).line for check in whole["checks"])]
    for title in ("equality", "speed"):
        if title in whole:
            lines += ["", f"{title}:", *(Row(**row).line for row in whole[title])]
    return "\n".join(lines) + "\n"
