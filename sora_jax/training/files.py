"""Small files of a run, in a folder or a store of objects."""

from __future__ import annotations

import os

import fsspec.config
from etils import epath

# gcsfs keeps every listing, and would miss what TensorStore and other processes write.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


COMMITTED = "commit_success.txt"  # Orbax's marker


def is_url(path: epath.PathLike) -> bool:
    return "://" in os.fspath(path)


def finished_steps(checkpoints: epath.Path) -> list[int]:
    """The steps of the checkpoints in a folder, without Orbax. On a disk a step gets its name when it is whole; in a
    store, where nothing is renamed, it gets a marker."""
    if not checkpoints.exists():
        return []
    steps = [path for path in checkpoints.iterdir() if path.name.isdecimal()]
    return sorted(int(path.name) for path in steps if not is_url(path) or (path / COMMITTED).exists())


def write_text(path: epath.Path, text: str) -> None:
    """The whole file or none of it."""
    if is_url(path):  # an object appears whole
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / (path.name + ".partial")
    temporary.write_text(text)
    temporary.replace(path)
