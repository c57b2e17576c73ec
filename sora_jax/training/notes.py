"""What a checkpoint says of itself beside its arrays, and whether a run may go on from it.

config     what was asked for
data       one entry for each source: what it is, how much of it, and digests that tell it from another
code       versions of this package and of what it stands on, and the commit where one can be told
saved      when, UTC
batches    the place of the data loader
averages   of the metrics since their last line
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sora_jax import __version__
from sora_jax import config as configs
from sora_jax.config import Config
from sora_jax.errors import UserError
from sora_jax.training.stage import Stage

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
_ROOT = Path(__file__).parents[2]  # of the checkout, when it is one


def make_notes(config: Config, stage: Stage, averages: Mapping[str, Any]) -> dict[str, Any]:
    """The notes of the checkpoint that is saved now."""
    return {
        "config": configs.to_dict(config),
        "data": list(stage.data),
        "code": code_version(),
        "saved": datetime.now(UTC).isoformat(timespec="seconds"),
        "batches": stage.batches.state(),
        "averages": averages,
    }


def go_on(stage: Stage, notes: Mapping[str, Any], step: int, *, force: bool, say: Callable[[str], None]) -> None:
    """Put the batches of `stage` where the checkpoint of `step` left them.

    Raises `UserError` when the data is not what it was; with `force`, training goes on with the data that is there now,
    from its beginning. Other code is only said. Checkpoints from before there were such notes pass.
    """
    code = code_version()
    if changes := "; ".join(_changes(notes.get("code", code), code)):
        say(f"checkpoint {step} was written by other code ({changes}): results may differ in their last bits")
    try:
        _refuse_other_data(notes.get("data"), stage.data)
        stage.batches.restore(notes["batches"])
    except UserError as error:
        if not force:
            raise UserError(f"{error}; bring the data back, or --force to go on with what is there") from None
        say(f"{error}; going on with what is there, from its beginning (--force)")


def _refuse_other_data(before: Sequence[Any] | None, now: Sequence[Any]) -> None:
    if before is None:
        return
    # As JSON gives it back: tuples are lists there.
    if changes := list(_changes(before, json.loads(json.dumps(now)))):
        raise UserError(f"the data is not what the checkpoint was trained on ({'; '.join(changes)})")


def _changes(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """What differs, as "name: before -> now"; names that only one of them has differ too."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from _changes(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from _changes(old, new, name if len(now) == 1 else f"{name}[{index}]")
    elif before != now:
        yield f"{name or 'sources'}: {_short(before)} -> {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 40 else f"{text[:37]}..."


# ------------------------------------------------------------------------------------------------------------- version


@functools.cache
def code_version() -> dict[str, str]:
    """Versions by package; "commit" is "" where it cannot be told."""
    return {"sora_jax": __version__, "commit": _commit()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """Of the checkout that this package runs from, with "-dirty" for changes since, or of the URL it came from."""
    if (_ROOT / ".git").exists():
        command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ""
    try:
        url = importlib.metadata.distribution("sora-jax").read_text("direct_url.json")
        return json.loads(url or "{}").get("vcs_info", {}).get("commit_id", "")[:12]
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ""


# ---------------------------------------------------------------------------------------------------------- for people


def code_in_short(notes: Mapping[str, Any]) -> str:
    """As "0.1.0 (a7bb0a6cd12e)"; nothing where the notes do not say."""
    code = notes.get("code", {})
    commit = code.get("commit")
    return code.get("sora_jax", "") + (f" ({commit})" if commit else "")


def data_in_short(notes: Mapping[str, Any]) -> str:
    """As "latents of world, 2048 clips"; nothing where the notes do not say."""
    return " + ".join(_in_short(source) for source in notes.get("data", ()))


def _in_short(source: Mapping[str, Any]) -> str:
    inner = source.get("source", source)
    name = inner.get("folder") or next(iter(inner), "data")
    return f"{'latents of ' if 'autoencoder' in source else ''}{name}" + (
        f", {source['clips']} clips" if "clips" in source else ""
    )
