"""A run's lines of metrics at Weights & Biases, where `train.wandb` names a project. The package is imported only then.

One run of ours is one run there, however often it is started again: its id lies in WORKDIR/wandb.id. Where nothing can
be sent, WANDB_MODE=offline keeps everything in WORKDIR/wandb for `wandb sync`.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Mapping
from typing import Any

from etils import epath

from sora_jax.errors import UserError
from sora_jax.training.files import is_url, write_text

ID = "wandb.id"


class WandbRun:
    """The run of `workdir` in `project`; lines are queued, and sent by a process of wandb's own."""

    def __init__(self, project: str, workdir: epath.Path, config: Mapping[str, Any]):
        wandb = import_wandb()
        path = workdir / ID
        if not path.exists():
            write_text(path, uuid.uuid4().hex[:12])
        try:
            self._run = wandb.init(
                project=project,
                name=workdir.name,
                id=path.read_text().strip(),
                resume="allow",
                config=dict(config),
                dir=None if is_url(workdir) else os.fspath(workdir),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise UserError(
                f"Weights & Biases cannot be reached for train.wandb={project} ({' '.join(str(error).split())}): "
                "wandb login, or WANDB_MODE=offline"
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({name: value for name, value in values.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        self._run.finish()


def import_wandb() -> Any:
    """The package, or a `UserError` that says how to get it."""
    try:
        import wandb
    except ImportError:
        raise UserError("train.wandb needs the package wandb: pip install 'sora-jax[wandb]'") from None
    return wandb
