"""Small files of a run."""

from __future__ import annotations

from etils import epath


def write_text(path: epath.Path, text: str) -> None:
    """The whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / (path.name + ".partial")
    temporary.write_text(text)
    temporary.replace(path)
