"""The captions of a user's folder: `metadata.csv`, or a text file beside each video.

metadata.csv   columns path,text; a path is relative to the folder, and may come again with another caption.
               Open-Sora's other columns (num_frames, height, width, aspect_ratio, resolution, fps) may be there:
               sizes and rates are read from the videos themselves. Without the csv,
cat.mp4        has its captions in
cat.txt        one a line
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from sora_jax.data.video_io import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from sora_jax.errors import UserError, nearest

METADATA = "metadata.csv"
MEDIA_SUFFIXES = (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)


class Captioned(NamedTuple):
    """A video or image of a folder: its name within it, its path, and all its captions."""

    name: str
    path: str
    captions: tuple[str, ...]


def read_folder(folder: str | os.PathLike[str], *, captions: bool = True) -> list[Captioned]:
    """The media of a folder in a fixed order: that of `metadata.csv`, else by name, with those in subfolders.

    Raises `UserError` for a folder without media, a table without its columns or with a row without its file, and
    (if `captions`) for media without a caption.
    """
    root = epath.Path(folder)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder" if root.exists() else f"the data folder {root} is not there")
    table = root / METADATA
    found = _from_table(root, table) if table.exists() else _from_sidecars(root)
    if not found:
        where = f"{table} lists no videos or images" if table.exists() else f"{root} has no videos or images in it"
        raise UserError(f"{where} ({', '.join(MEDIA_SUFFIXES)})")
    if captions and (bare := [media.name for media in found if not media.captions]):
        how = f"fill in its text in {table}" if table.exists() else f"write {_sidecar(bare[0])}, or a {METADATA}"
        raise UserError(f"{len(bare)} of {len(found)} files have no caption; the first is {bare[0]}: {how}")
    return found


def _from_table(root: epath.Path, table: epath.Path) -> list[Captioned]:
    try:
        text = table.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not in UTF-8 ({error.reason} at byte {error.start})") from error
    rows = csv.DictReader(io.StringIO(text, newline=""))
    columns = [name.strip() for name in rows.fieldnames or []]
    rows.fieldnames = columns
    for column in ("path", "text"):
        if column not in columns:
            raise UserError(f'{table} has no column "{column}"; {nearest(column, columns)}')
    found: dict[str, list[str]] = {}
    for row in rows:
        name, text = (row["path"] or "").strip(), (row["text"] or "").strip()
        where = f"{table}, line {rows.line_num}"
        if os.path.splitext(name)[1].lower() not in MEDIA_SUFFIXES:
            raise UserError(f'{where}: "{name}" is no video or image ({", ".join(MEDIA_SUFFIXES)})')
        if name not in found and not (root / name).exists():
            raise UserError(f"{where}: {name} is not there")
        found.setdefault(name, []).extend([text] if text else [])
    return [Captioned(name, os.fspath(root / name), tuple(texts)) for name, texts in found.items()]


def _from_sidecars(root: epath.Path) -> list[Captioned]:
    found = []
    for path in sorted(_media_below(root)):
        name = path.relative_to(root).as_posix()
        sidecar = root / _sidecar(name)
        lines = sidecar.read_text().splitlines() if sidecar.exists() else []
        found.append(Captioned(name, os.fspath(path), tuple(line.strip() for line in lines if line.strip())))
    return found


def _media_below(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in MEDIA_SUFFIXES:
            yield path
        elif path.is_dir():
            yield from _media_below(path)


def _sidecar(name: str) -> str:
    return f"{os.path.splitext(name)[0]}.txt"
