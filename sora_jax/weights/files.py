"""JSON files with errors that name them, and folders that appear whole or not at all; paths may be URLs (`epath`)."""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from etils import epath

from sora_jax.errors import UserError

T = TypeVar("T")


def read_json(path: epath.Path) -> dict[str, Any]:
    """A JSON object; a missing or broken file is a `UserError` that names it."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values


def read_text(path: epath.Path) -> str:
    """Of a file that is there; one that is not text is a `UserError` that names it."""
    try:
        return path.read_text()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text") from None


def parse_json(path: epath.Path, parse: Callable[[dict[str, Any]], T]) -> T:
    """The dataclass that `parse` makes of a JSON object; its `UserError` gets the file's name in front.

    A field whose default is a number or a text must have got one.
    """
    values = read_json(path)
    try:
        parsed = parse(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError) as error:  # no list where one belongs, and the like
        raise UserError(f"{path} has a value of the wrong type: {str(error).splitlines()[0]}") from None
    for field in dataclasses.fields(parsed):  # type: ignore[arg-type]
        value, kind = getattr(parsed, field.name), type(field.default)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if kind in (bool, int, float, str) and not fits:
            raise UserError(
                f"{path} has a value of the wrong type: {field.name} is {value!r}, not of type {kind.__name__}"
            )
    return parsed


def write_json(path: epath.Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(path: epath.Path, *, marker: str, overwrite: bool = False) -> Iterator[epath.Path]:
    """A folder to fill, which becomes `path` when the block ends without an exception, and else is gone.

    A folder that is there is refused with a `UserError`; with `overwrite` it is replaced if it holds the file
    `marker` (so that a mistyped path cannot cost anyone their home directory). On object stores nothing can be renamed
    at once: there files are written in place, and whoever fills the folder writes `marker` last.
    """
    if path.exists() and any(path.iterdir() if path.is_dir() else [path]):
        if not (path / marker).exists():
            raise UserError(
                f"{path} exists and is not a folder written by this command (no {marker}): choose another name"
            )
        if not overwrite:
            raise UserError(f"{path} exists: choose another name, or ask to overwrite it")
    if "://" in os.fspath(path):
        (path / marker).unlink(missing_ok=True)
        yield path
        return
    partial = path.parent / f".{path.name}-{uuid.uuid4().hex[:8]}.partial"
    replaced = partial.with_suffix(".replaced")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    try:
        yield partial
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
        replaced.rmtree(missing_ok=True)
    except BaseException:  # Ctrl-C leaves nothing behind either
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        partial.rmtree(missing_ok=True)
        raise
