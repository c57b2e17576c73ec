"""One component of a model folder (`transformer/`, `vae/`, `text_encoder/`) <-> its config and parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from sora_jax.errors import UserError, nearest
from sora_jax.models.structure import shapes_of
from sora_jax.sharding import param_shardings, put
from sora_jax.weights.files import parse_json, write_json
from sora_jax.weights.safetensors_io import (
    DTYPES,
    StoredTensor,
    read_headers,
    tensor_reader,
    write_tensors,
)
from sora_jax.weights.table import Family, Row

SAVE_DTYPES = {"float32": DTYPES["F32"], "bfloat16": DTYPES["BF16"]}
NAMED = 10  # of tensors that are missing or unexpected, so many are named
FORMAT_VERSION = "0.35.1"  # of `diffusers`: what a folder we write is compatible with

Config = Any  # the frozen config dataclass of a family


def abstract_params(family: Family, config: Config) -> nnx.State:
    """The parameters that a config has, as shapes: the state that `nnx.merge(graphdef, params)` takes."""
    return shapes_of(lambda rngs: family.module(config, rngs=rngs))


def match_rows(family: Family, config: Config, params: nnx.State) -> list[tuple[tuple, Row]]:
    """The row of every parameter, with the parameter's path, in the order of the table.

    A parameter without a row is a fault of the table and not of a user: `ValueError`.
    """
    paths = {".".join(map(str, path)): path for path, _ in nnx.to_flat_state(params)}
    rows = [(paths[row.ours], row) for row in family.table(config) if row.ours in paths]
    if without := sorted(set(paths) - {row.ours for _, row in rows}):
        raise ValueError(f"the table of {family.name} has no row for {', '.join(without)}")
    return rows


# --- loading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckedComponent:
    """A component whose tensors are all there, by name, shape and dtype; not one of them has been read."""

    family: Family
    config: Config
    stored: Mapping[str, StoredTensor]
    params: nnx.State  # shapes
    rows: list[tuple[tuple, Row]]
    keys: dict[str, list[str]]  # the stored names of each parameter

    @property
    def bytes(self) -> int:
        return sum(self.stored[key].stop - self.stored[key].start for keys in self.keys.values() for key in keys)

    def load(
        self,
        *,
        mesh: Mesh | None = None,
        dtype: DTypeLike | None = jnp.float32,
        on_host: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> nnx.State:
        """The parameters, converted to `dtype` (None: as they are stored; those that the family keeps `wide` to
        float32) and placed on `mesh` by their logical axes, or on the default device; `on_host` they stay numpy arrays.

        One pass over the files: beside what stays, host memory holds one parameter and one stored tensor at a time.
        `progress` is told of the bytes of each tensor as it is read.
        """
        flat = dict(nnx.to_flat_state(self.params))
        shardings = dict(nnx.to_flat_state(param_shardings(self.params, mesh))) if mesh is not None else {}
        with tensor_reader() as read:
            for path, row in self.rows:
                tensors = [self.stored[key] for key in self.keys[row.ours]]
                wide = any(part in row.ours for part in self.family.wide)
                wanted = DTYPES[tensors[0].dtype] if dtype is None else jnp.dtype(jnp.float32 if wide else dtype)
                array = np.empty(flat[path].shape, wanted)
                for n, tensor in enumerate(tensors):
                    array[n if row.stacked else ...] = row.to_ours(read(tensor))
                    if progress is not None:
                        progress(tensor.stop - tensor.start)
                _check_repeats(row, array, self.stored, read)
                flat[path] = flat[path].replace(array if on_host else put(array, shardings.get(path)))
        return nnx.from_flat_state(list(flat.items()))


def open_component(folder: epath.PathLike, family: Family) -> CheckedComponent:
    """The component in `folder` (`config.json` and safetensors).

    The first tensor that is missing, unexpected, of the wrong shape or dtype, or cut off is named by a `UserError`.
    """
    folder = epath.Path(folder)
    config = read_config(folder / "config.json", family)
    return check_component(family, config, read_headers(folder, family.stem), folder / f"{family.stem}.safetensors")


def check_component(
    family: Family, config: Config, stored: Mapping[str, StoredTensor], file: epath.Path
) -> CheckedComponent:
    """The component of that config among the tensors `stored` in `file`; raises as `open_component`."""
    params = abstract_params(family, config)
    rows = match_rows(family, config, params)
    shapes = {path: variable.shape for path, variable in nnx.to_flat_state(params)}
    keys = check_tensors(file, stored, [(row, shapes[path]) for path, row in rows])
    return CheckedComponent(family, config, stored, params, rows, keys)


def load_component(folder: epath.PathLike, family: Family, **options: Any) -> tuple[Config, nnx.State]:
    """The config and parameters in `folder`; `options` are those of `CheckedComponent.load`. Raises `UserError` as
    `open_component`."""
    component = open_component(folder, family)
    return component.config, component.load(**options)


def read_config(path: epath.Path, family: Family) -> Config:
    """The config of a component; a `UserError` names the file it is about."""

    def parse(values: dict[str, Any]) -> Config:
        name = values.get("_class_name") or (values.get("architectures") or [None])[0]
        if name != family.name:
            raise UserError(f'it describes a "{name}", not a {family.name}')
        return family.read_config(values)

    return parse_json(path, parse)


def check_tensors(
    path: epath.Path, stored: Mapping[str, StoredTensor], rows: list[tuple[Row, tuple[int, ...]]]
) -> dict[str, list[str]]:
    """The stored names of each of our parameters (given as rows and our shapes), all of them checked."""
    keys: dict[str, list[str]] = {}
    known: set[str] = set()
    for row, shape in rows:
        expected = row.their_shape(shape)
        names = row.keys(shape)
        if not row.stacked:
            names = [next((name for name in (row.theirs, *row.also) if name in stored), row.theirs)]
        for name in names:
            if name not in stored:
                missing = [n for r, s in rows for n in r.keys(s) if n not in stored]
                raise UserError(f"{path} lacks tensor{'s' * (len(missing) > 1)} {_quoted(missing)}")
            if stored[name].shape != expected:
                found = list(stored[name].shape)
                raise UserError(
                    f'{path}: tensor "{name}" has the wrong shape: expected {list(expected)}, found {found}'
                )
        keys[row.ours] = names
        known |= {*names, *row.also}
    unexpected = [name for name in stored if name not in known]
    if unexpected:
        raise UserError(f"{path} has unexpected tensor{'s' * (len(unexpected) > 1)} {_quoted(unexpected)}")
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            raise UserError(f'{path}: tensor "{name}" has dtype {tensor.dtype}; known: {", ".join(DTYPES)}')
    return keys


def _quoted(names: list[str]) -> str:
    """The first ten names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(f'"{name}"' for name in names[:NAMED]) + more


def _check_repeats(
    row: Row, array: np.ndarray, stored: Mapping[str, StoredTensor], read: Callable[[StoredTensor], np.ndarray]
) -> None:
    """A tensor that is stored again under another name must be the same; else which of them is meant?"""
    for name in row.also:
        if name in stored and not np.array_equal(array, row.to_ours(read(stored[name])).astype(array.dtype)):
            raise UserError(f'{stored[name].path}: tensor "{name}" differs from "{row.theirs}", which it must repeat')


# --- saving --------------------------------------------------------------------------------------------------------


def save_component(
    folder: epath.PathLike, family: Family, config: Config, params: nnx.State, *, dtype: str = "float32"
) -> None:
    """Write `config.json` and one safetensors file into `folder`, one tensor in memory at a time.

    `dtype` is "float32" or "bfloat16". Raises `ValueError` when `params` are not those of `config`.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_params(folder / f"{family.stem}.safetensors", family, config, params, dtype=dtype)
    write_json(folder / "config.json", config_header(family, dtype) | family.write_config(config))


def save_params(file: epath.Path, family: Family, config: Config, params: nnx.State, *, dtype: str = "float32") -> None:
    """Write one safetensors file, as `save_component` says."""
    if dtype not in SAVE_DTYPES:
        raise UserError(f'weights cannot be saved as "{dtype}": {nearest(dtype, SAVE_DTYPES)}')
    shapes = {path: variable.shape for path, variable in nnx.to_flat_state(abstract_params(family, config))}
    flat = {path: variable.get_value() for path, variable in nnx.to_flat_state(params)}
    if (found := {path: array.shape for path, array in flat.items()}) != shapes:
        wrong = sorted(".".join(map(str, path)) for path, _ in found.items() ^ shapes.items())
        raise ValueError(f"these are not the parameters of the {family.name} config: {', '.join(wrong)}")
    rows = match_rows(family, config, params)

    def tensors() -> Iterator[np.ndarray]:
        for path, row in rows:
            array = np.asarray(flat[path])
            for layer in array if row.stacked else array[None]:
                yield row.to_theirs(layer)

    written = {key: row.their_shape(shapes[path]) for path, row in rows for key in row.keys(shapes[path])}
    write_tensors(file, written, SAVE_DTYPES[dtype], tensors())


def config_header(family: Family, dtype: str) -> dict[str, Any]:
    if family.library == "transformers":
        return {"architectures": [family.name], "dtype": dtype}
    return {"_class_name": family.name, "_diffusers_version": FORMAT_VERSION}
