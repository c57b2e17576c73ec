"""Small files of a run, in a folder or a store of objects; and disks that are full."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

import fsspec.config
from etils import epath

from sora_jax.errors import NoRoomError

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
    with writing(path):
        temporary.write_text(text)
        temporary.replace(path)


@contextlib.contextmanager
def writing(path: os.PathLike[str]) -> Iterator[None]:
    """Around what writes `path`: that there is no room is a `NoRoomError`."""
    try:
        yield
    except OSError as error:
        if reason := no_room(error):
            raise NoRoomError(
                f"{os.fspath(path)} cannot be written: {reason}. Make room and give the same command again"
            ) from error
        raise


def no_room(error: BaseException) -> str:
    """Why there was no room to write, in the system's words; empty when `error` is about something else.

    Errors come wrapped, and TensorStore's are not `OSError`s: their text says what the system said.
    """
    seen: set[int] = set()
    next_one: BaseException | None = error
    while next_one is not None and id(next_one) not in seen:
        seen.add(id(next_one))
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if getattr(next_one, "errno", None) == number or os.strerror(number) in str(next_one):
                return os.strerror(number)
        next_one = next_one.__cause__ or next_one.__context__
    return ""
