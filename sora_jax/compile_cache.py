"""The programs that JAX keeps on disk between runs, and those of them that cannot be read any more.

A process that is killed while it writes one leaves half of it. JAX (0.10) warns that it cannot read it, compiles anew,
and does not write over what is there, so it compiles at every run from then on. With the unreadable file gone it keeps
the new one. A file that is whole carries a checksum, which `zlib` and `zstd` hold it against.
"""

from __future__ import annotations

import importlib
import zlib
from pathlib import Path

SUFFIX = "-cache"  # of JAX's files
UNREADABLE = "Error reading persistent compilation cache entry"  # how JAX's warning begins
_ZSTD = b"\x28\xb5\x2f\xfd"


def programs(folder: Path) -> list[Path]:
    """The files of compiled programs in a cache's folder."""
    return sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []


def unreadable(folder: Path) -> list[Path]:
    """Those that cannot be unpacked; reads all of them."""
    return [path for path in programs(folder) if not _whole(path)]


def remove_unreadable(folder: Path) -> list[Path]:
    """Deletes them, so that they are made again where they are needed; returns which they were."""
    found = unreadable(folder)
    for path in found:
        path.unlink(missing_ok=True)
        path.with_name(path.name.removesuffix(SUFFIX) + "-atime").unlink(missing_ok=True)
    return found


def _whole(path: Path) -> bool:
    try:
        data = path.read_bytes()
        if data.startswith(_ZSTD):
            return _whole_zstd(data)
        zlib.decompress(data)
    except FileNotFoundError:  # another process has removed it
        return True
    except (OSError, zlib.error):
        return False
    return True


def _whole_zstd(data: bytes) -> bool:
    """JAX packs with zstd where Python has it (3.14) or the package zstandard is installed."""
    for name in ("compression.zstd", "zstandard"):
        try:
            zstd = importlib.import_module(name)
        except ImportError:
            continue
        try:
            zstd.decompress(data)
        except Exception:  # noqa: BLE001  each module has an error of its own
            return False
        return True
    return True  # nothing here can read it, JAX neither
