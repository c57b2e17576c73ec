"""What took minutes to find out, kept on disk beside the compiled programs: a small JSON file for each answer.

The name of a file is a hash of all that the answer depends on. For a compiled program that is its own text, before
optimisation, with the versions of the compilers: another config, mesh or line of code that makes another program has
another name, and one that does not (a comment, a longer run) finds its answer.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any, NamedTuple

from sora_jax.runtime import cache_folder

FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # variables that change what a compiler makes


class Answer(NamedTuple):
    """`kept` is the day on which a kept answer was found, None where it was found just now."""

    found: dict[str, Any]
    kept: str | None


def remembered(parts: Iterable[str], find: Callable[[], dict[str, Any]], *, again: bool = False) -> Answer:
    """What `find` (JSON values) gives, or gave when it was last called with these `parts`; `again` calls it anyway."""
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    path = cache_folder() / "plans" / f"{digest}.json"
    if not again:
        try:
            kept = json.loads(path.read_text())
            return Answer(kept["found"], kept["date"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none there, or one that a full disk cut short
    found, date = find(), dt.date.today().isoformat()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps({"date": date, "found": found}))
        partial.replace(path)
    except OSError:
        pass  # a home that cannot be written to only costs time
    return Answer(found, None)


def compilers() -> list[str]:
    """The versions and flags that decide what becomes of a program."""
    versions = []
    for package in ("jax", "jaxlib", "libtpu"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    return [*versions, *(f"{name}={os.environ.get(name, '')}" for name in FLAGS)]
