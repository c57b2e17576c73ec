"""Trees of arrays by dotted names, as a checkpoint holds them: "params.transformer.blocks.attn.q.kernel"."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.errors import UserError


def by_name(tree: Any, part: str = "") -> dict[str, Any]:
    """Arrays (or their shapes) by dotted name; random keys as the uint32 words they are made of."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(path, part): _words(leaf) for path, leaf in flat}


def from_names(arrays: Mapping[str, Any], like: Any, part: str = "") -> Any:
    """A tree like `like` of the arrays that `by_name` names so; words become random keys again."""

    def take(path: tuple[Any, ...], leaf: Any) -> Any:
        array = arrays[_name(path, part)]
        return jax.random.wrap_key_data(array, impl=_key_impl(leaf)) if _is_key(leaf) else array

    return jax.tree_util.tree_map_with_path(take, like)


def _name(path: tuple[Any, ...], part: str) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
    return f"{part}.{name}" if part else name


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Any) -> Any:
    """The implementation of a random key that may be a shape only."""
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return found[0]


def _words(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf) if _is_key(leaf) else leaf
    words = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=leaf.sharding)


def bytes_of(array: Any) -> int:
    """Of an array, or of what has its shape and dtype."""
    return int(math.prod(array.shape)) * np.dtype(array.dtype).itemsize


def check_arrays(step: int, wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises `UserError`, naming the array, unless what is `saved` at `step` is what is `wanted`, in names, shapes and
    dtypes."""
    for name in sorted(wanted.keys() | saved.keys()):
        if name not in saved:
            raise UserError(f"checkpoint {step} lacks the array {name}: it was made by another config or version")
        if name not in wanted:
            raise UserError(f"checkpoint {step} has the array {name}, which this config does not make")
        for what in ("shape", "dtype"):
            there, here = getattr(saved[name], what), getattr(wanted[name], what)
            if (tuple(there) != tuple(here)) if what == "shape" else (np.dtype(there) != np.dtype(here)):
                raise UserError(f"checkpoint {step}: {name} has {what} {there}, and this config makes {here}")
