"""From plain values to trees of frozen dataclasses, as configs are: every key is known and every value has its type, or
one line says which is not.

A type is a whole number, a number, a text, True or False, one of several texts (`Literal`), a tuple of these, a named
tuple, a dataclass, or any of them or None.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from sora_jax.errors import UserError, nearest

T = TypeVar("T")


def build(root: type[T], values: Mapping[str, Any]) -> T:
    """`root` with these nested values, and defaults elsewhere.

    Raises `UserError` for an unknown key, with the nearest known one, and for a value of another type.
    """
    made: T = _build(root, values, "", root)
    return made


def set_value(root: type, values: dict[str, Any], key: str, text: str) -> None:
    """Put what `text`, of the command line, stands for at the dotted `key` of nested `values`, as the type that `root`
    has there; raises `UserError` as `build` does."""
    value = _parse(text, _hint(key, root), key)
    *parents, last = key.split(".")
    for name in parents:
        values = values[name]
    values[last] = value


def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _known_keys(cls: Any, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in _hints(cls).items():
        keys += _known_keys(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [prefix + name]
    return keys


def _unknown(key: str, root: Any) -> UserError:
    known = _known_keys(root)
    # Rank by the whole key, and list its own section only: all keys together are a wall of text.
    hint = nearest(key, known).split(" (known:")[0]
    if hint.startswith("known:"):
        section = key.rpartition(".")[0]
        siblings = [k for k in known if k.startswith(section + ".")] or [f.name for f in dataclasses.fields(root)]
        hint = "known: " + ", ".join(siblings)
    return UserError(f'unknown config key "{key}": {hint}')


def _hint(key: str, root: Any) -> Any:
    """The type of the value at a dotted key."""
    cls = root
    for name in key.split("."):
        hints = _hints(cls) if dataclasses.is_dataclass(cls) else {}
        if name not in hints:
            raise _unknown(key, root)
        cls = hints[name]
    if dataclasses.is_dataclass(cls):
        raise UserError(f'config key "{key}" is a section: set one of {", ".join(_known_keys(cls, key + "."))}')
    return cls


def _build(cls: Any, values: Any, prefix: str, root: Any) -> Any:
    if not isinstance(values, Mapping):
        raise UserError(f'config key "{prefix[:-1]}" is a section, not a value: {values!r}')
    hints = _hints(cls)
    for name in values:
        if name not in hints:
            raise _unknown(prefix + name, root)
    return cls(**{name: _check(value, hints[name], prefix + name, root) for name, value in values.items()})


def _check(value: Any, hint: Any, key: str, root: Any = None) -> Any:
    """`value` as the type `hint`, where nothing is lost by it; else a `UserError`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, key + ".", root)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _check(value, next(a for a in args if a is not type(None)), key, root)
    if origin is Literal:
        if value in args:
            return value
        raise UserError(f'config key "{key}" cannot be {value!r}: {nearest(str(value), map(str, args))}')
    if origin is tuple and isinstance(value, (tuple, list)):
        inner = args[:1] * len(value) if args[1:] == (...,) else args
        if len(inner) == len(value):
            return tuple(_check(v, h, key) for v, h in zip(value, inner, strict=True))
    elif _is_named_tuple(hint) and isinstance(value, (tuple, list)):
        fields = typing.get_type_hints(hint)
        if len(value) == len(fields):
            return hint(*(_check(v, h, key) for v, h in zip(value, fields.values(), strict=True)))
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif hint is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f'config key "{key}" takes a finite number, not {value}')
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f'config key "{key}" takes {_describe(hint)}, not {value!r} ({type(value).__name__})')


def _parse(text: str, hint: Any, key: str) -> Any:
    """The value that `text` from the command line stands for, as the type `hint`."""
    args = typing.get_args(hint)
    if hint is str:
        return text
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if typing.get_origin(hint) is Literal and all(isinstance(a, str) for a in args):
        return _check(text, hint, key)
    if text.lower() == "none" and type(None) in args:
        return None
    if type(None) in args and str in args:
        return text
    if hint is float:
        try:
            return float(text)
        except ValueError:
            raise UserError(f'config key "{key}" takes {_describe(hint)}, not {text!r}') from None
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise UserError(f'config key "{key}" takes {_describe(hint)}, not {text!r}') from None
    if typing.get_origin(hint) is tuple and not isinstance(value, (tuple, list)):
        value = (value,)
    return _check(value, hint, key)


def _is_named_tuple(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields")


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("None" if a is type(None) else _describe(a) for a in args)
    if _is_named_tuple(hint):
        return f"({', '.join(hint._fields)})"
    if origin is tuple:
        return f"a tuple of {_describe(args[0])}" if args[1:] == (...,) else f"({', '.join(map(_describe, args))})"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
    return names.get(hint) or str(hint)
