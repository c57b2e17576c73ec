"""Low-rank adapters on a transformer (LoRA; Hu et al. 2021, arXiv:2106.09685): merged into its kernels, or beside them,

    W + weight * alpha / r * B A,      A [r, in], B [out, r]

read from the safetensors files that PEFT and `diffusers`, or tools with the Wan authors' names, write. Those of
distilled models also hold whole differences, `X.diff`, `X.diff_b` and `X.diff_m`, which are merged into weight, bias
and modulation of X.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from sora_jax.errors import UserError
from sora_jax.models.transformer import TransformerConfig
from sora_jax.sharding import param_shardings, put
from sora_jax.weights.component import SAVE_DTYPES, abstract_params, match_rows
from sora_jax.weights.original import ORIGINAL_TRANSFORMER
from sora_jax.weights.safetensors_io import (
    DTYPES,
    StoredTensor,
    read_header,
    read_metadata,
    tensor_reader,
    write_tensors,
)
from sora_jax.weights.table import LINEAR, Family, Row
from sora_jax.weights.wan import TRANSFORMER

PREFIX = re.compile(r"^(base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|transformer\.)+")
PART = re.compile(r"^(.*)\.(lora_A|lora_B|lora_down|lora_up)(?:\.\w+)?\.weight$")
DOWN = ("lora_A", "lora_down")
HALVES = ("adapter_a", "adapter_b")  # what A and B are called beside a kernel
WHOLE = re.compile(r"^.*\.(diff|diff_b|diff_m)$")
KNOWN = "lora_A, lora_B, alpha, diff, diff_b, diff_m"

Where = tuple[Any, ...]  # a parameter's path
Read = Callable[[StoredTensor], np.ndarray]


class Target(NamedTuple):
    """A parameter that may be changed: of a stack of layers, the one at `layer`."""

    path: Where
    layer: int | None
    row: Row  # how its axes lie on disk

    @property
    def index(self) -> Any:
        return ... if self.layer is None else self.layer


class Adapter(NamedTuple):
    """What is added to one kernel of one layer; A and B as stored."""

    down: StoredTensor  # A [r, in]
    up: StoredTensor  # B [out, r]
    alpha: float | None

    @property
    def rank(self) -> int:
        return self.down.shape[0] if self.down.shape else 0

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


class Change(NamedTuple):
    """What one file does to one parameter of one layer: an adapter, or a difference that is added whole."""

    target: Target
    what: Adapter | StoredTensor
    file: str  # as it was named
    weight: float

    def read(self, read: Read) -> np.ndarray:
        """What is added, float32 [in, out] or with the axes of the parameter."""
        if isinstance(self.what, StoredTensor):
            return self.weight * self.target.row.to_ours(read(self.what).astype(np.float32))
        down, up = (read(part).astype(np.float32) for part in (self.what.down, self.what.up))
        return self.weight * self.what.scale * (down.T @ up.T)


Changes = dict[Where, list[Change]]


def parameters(family: Family, config: TransformerConfig, params: nnx.State) -> dict[str, Target]:
    """Every one of `params` (shapes, of that config) by its name on disk."""
    shapes = dict(nnx.to_flat_state(params))
    return {
        key: Target(path, n if row.stacked else None, row)
        for path, row in match_rows(family, config, params)
        for n, key in enumerate(row.keys(shapes[path].shape))
    }


def targets(known: Mapping[str, Target]) -> dict[str, Target]:
    """Of parameters the linear kernels, which adapters may lie on, without ".weight"."""
    kernel = LINEAR[0].axes
    return {name.removesuffix(".weight"): target for name, target in known.items() if target.row.axes == kernel}


# --- reading -------------------------------------------------------------------------------------------------------


class LoraFile(NamedTuple):
    """What a file holds, by the name of its module, prefixes left off."""

    adapters: dict[str, Adapter]
    differences: dict[str, StoredTensor]  # "MODULE.diff", and so on


def read_adapters(path: epath.Path) -> LoraFile:
    """By the header alone, and the alphas. Raises `UserError` for a file that holds anything else."""
    stored = read_header(path)
    alphas: dict[str, float] = {}
    parts: dict[str, dict[bool, StoredTensor]] = {}
    differences: dict[str, StoredTensor] = {}
    strange = []
    with tensor_reader() as read:
        for name, tensor in stored.items():
            bare = PREFIX.sub("", name)
            if match := PART.match(bare):
                parts.setdefault(match[1], {})[match[2] in DOWN] = tensor
            elif WHOLE.match(bare):
                differences[bare] = tensor
            elif bare.endswith(".alpha"):
                if tensor.dtype not in DTYPES or math.prod(tensor.shape) != 1:
                    raise UserError(f'{path}: "{name}" is no float number')
                alphas[bare.removesuffix(".alpha")] = float(read(tensor).reshape(()))
            else:
                strange.append(name)
    if strange or not (parts or differences):
        what = f'"{strange[0]}" among {len(strange)} others' if strange else "no adapter"
        raise UserError(f"{path} is not a LoRA file that is supported: it holds {what}; known: {KNOWN}")
    halves = [(f"the adapter of {module}", half) for module, both in parts.items() for half in both.values()]
    for what, tensor in [*halves, *differences.items()]:
        if tensor.dtype not in DTYPES:
            raise UserError(f"{path}: {what} has dtype {tensor.dtype}; known: {', '.join(DTYPES)}")
    general = _alpha_of_all(path)
    adapters = {}
    for module, both in parts.items():
        if len(both) != 2:
            raise UserError(f"{path}: the adapter of {module} has one half (lora_{'A' if True in both else 'B'})")
        adapters[module] = Adapter(both[True], both[False], alphas.get(module, general))
    return LoraFile(adapters, differences)


def _alpha_of_all(path: epath.Path) -> float | None:
    """The alpha in the metadata that `diffusers` writes; None where there is none, which means alpha = r."""
    try:
        values = json.loads(read_metadata(path).get("lora_adapter_metadata", "{}"))
    except ValueError:
        return None
    found = [value for key, value in values.items() if key.endswith("lora_alpha")]
    return float(found[0]) if found else None


def find_changes(config: TransformerConfig, loras: Mapping[str, float]) -> Changes:
    """What each file, at its weight, changes in the parameters of a transformer of that config: by the headers of the
    files alone. Raises `UserError` for a file that is no LoRA, or one for another model."""
    changes: Changes = {}
    if not loras:
        return changes
    params = abstract_params(TRANSFORMER, config)
    shapes = {path: leaf.shape for path, leaf in nnx.to_flat_state(params)}
    known = parameters(TRANSFORMER, config, params) | parameters(ORIGINAL_TRANSFORMER, config, params)
    for name, weight in loras.items():
        path = epath.Path(name)
        if not path.exists() or path.is_dir():
            raise UserError(f"LoRA file {name} {'is a folder' if path.exists() else 'does not exist'}")
        check_weight(name, weight)
        for module, target, what in _find_in(read_adapters(path), known, path):
            _check_shape(path, module, target, what, shapes[target.path])
            changes.setdefault(target.path, []).append(Change(target, what, name, float(weight)))
    return changes


def check_weight(name: str, weight: float) -> None:
    if not math.isfinite(weight):
        raise UserError(f"LoRA file {name} must have a finite weight, not {weight}")


def _find_in(
    file: LoraFile, known: Mapping[str, Target], path: epath.Path
) -> list[tuple[str, Target, Adapter | StoredTensor]]:
    """What the file holds, with its names and targets among the parameters that are `known`."""
    kernels = targets(known)
    found: list[tuple[str, Target | None, Adapter | StoredTensor]] = []
    for module, adapter in file.adapters.items():
        found.append((module, kernels.get(module), adapter))
    for name, tensor in file.differences.items():
        module, _, kind = name.rpartition(".")
        part = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}[kind]
        found.append((name, known.get(f"{module}.{part}"), tensor))
    unknown = [name for name, target, _ in found if target is None]
    if unknown:
        listed = ", ".join(unknown[:10])
        raise UserError(f"{path} is for another model: {len(unknown)} of its modules are not in this one ({listed})")
    return [(name, target, what) for name, target, what in found if target is not None]


def _check_shape(
    path: epath.Path, module: str, target: Target, what: Adapter | StoredTensor, shape: tuple[int, ...]
) -> None:
    if isinstance(what, StoredTensor):
        if what.shape != (expected := target.row.their_shape(shape)):
            raise UserError(
                f"{path} is for another model: {module} has the shape {list(what.shape)}, and {list(expected)} here"
            )
        return
    n_in, n_out = shape[-2:]
    if not what.rank or what.down.shape != (what.rank, n_in) or what.up.shape != (n_out, what.rank):
        raise UserError(
            f"{path} is for another model: {module} has {what.down.shape[1:]} in and {what.up.shape[:1]} "
            f"out there, and ({n_in},) and ({n_out},) here"
        )


# --- merged --------------------------------------------------------------------------------------------------------


def merge_loras(config: TransformerConfig, params: nnx.State, loras: Mapping[str, float]) -> nnx.State:
    """`params` with what each file holds added at its weight, one by one on the host, in float32; parameters that lie
    on the host stay there. Raises `UserError`, before anything is changed, as `find_changes`."""
    flat = dict(nnx.to_flat_state(params))
    work = find_changes(config, loras)
    with tensor_reader() as read:
        for where, changes in work.items():
            array = flat[where].get_value()
            wide = np.array(array, np.float32)
            for change in changes:
                wide[change.target.index] += change.read(read)
            merged = wide.astype(array.dtype)
            flat[where] = flat[where].replace(
                merged if isinstance(array, np.ndarray) else jax.device_put(merged, array.sharding)
            )
    return nnx.from_flat_state(list(flat.items()))


# --- live ----------------------------------------------------------------------------------------------------------


def check_live(changes: Changes) -> None:
    """Raises `UserError` where a file holds more than adapters."""
    for change in (change for some in changes.values() for change in some):
        if isinstance(change.what, StoredTensor):
            raise UserError(
                f"{change.file} holds whole differences (.diff), which lie beside no kernel and can only be merged: "
                "load it without lora_live (--lora-live)"
            )


def live_config(config: TransformerConfig, several: Iterable[Changes]) -> TransformerConfig:
    """`config` with adapters beside every kernel that any of `several` changes, of a rank that holds those of all files
    side by side."""
    ranks: dict[tuple[Where, int | None], int] = {}
    for change in (change for changes in several for some in changes.values() for change in some):
        assert isinstance(change.what, Adapter)
        place = (change.target.path, change.target.layer)
        ranks[place] = ranks.get(place, 0) + change.what.rank
    modules = sorted({".".join(str(part) for part in path[:-1]).removeprefix("blocks.") for path, _ in ranks})
    return dataclasses.replace(config, lora_rank=max(ranks.values()), lora_alpha=0.0, lora_targets=",".join(modules))


class _Factor(NamedTuple):
    """One adapter, and where it lies in the stack."""

    index: Any  # of the layer
    ranks: slice
    file: str
    scale: float  # alpha / r
    down: np.ndarray  # A and B as stored
    up: np.ndarray


class LiveLoras:
    """The adapters of files beside the kernels of one transformer, stacked along their rank, kernel by kernel:

        W + A B,    A [in, R]: those of all files,    B [R, out]: each file's times its weight and alpha / r

    What no file fills is zero. The factors stay on the host, so that weights can be changed.
    """

    def __init__(self, config: TransformerConfig, changes: Changes, mesh: Mesh | None):
        """`config` is from `live_config`; reads the files."""
        shapes = abstract_params(TRANSFORMER, config)
        self._shapes = {path: leaf for path, leaf in nnx.to_flat_state(shapes) if path[-1] in HALVES}
        self._places = {} if mesh is None else dict(nnx.to_flat_state(param_shardings(shapes, mesh)))
        self._factors: dict[Where, list[_Factor]] = {}
        with tensor_reader() as read:
            for where, some in changes.items():
                filled: dict[int | None, int] = {}
                for target, adapter, file, _ in some:
                    assert isinstance(adapter, Adapter)
                    begin = filled.get(target.layer, 0)
                    filled[target.layer] = begin + adapter.rank
                    ranks = slice(begin, begin + adapter.rank)
                    halves = read(adapter.down), read(adapter.up)
                    factor = _Factor(target.index, ranks, file, adapter.scale, *halves)
                    self._factors.setdefault(where, []).append(factor)

    def beside(self, params: nnx.State, weights: Mapping[str, float]) -> nnx.State:
        """`params` of the transformer (adapters in it are left out), with those of every file at its weight: in the
        dtype of the kernels beside them, and on the host where these are. Kernels are not copied."""
        flat = dict(nnx.to_flat_state(params))
        for where, leaf in self._shapes.items():
            kernel = flat[*where[:-1], "kernel"].get_value()
            array = self._stack(where, leaf.shape, weights).astype(kernel.dtype)
            flat[where] = leaf.replace(array if isinstance(kernel, np.ndarray) else put(array, self._places.get(where)))
        return nnx.from_flat_state(list(flat.items()))

    def _stack(self, where: Where, shape: tuple[int, ...], weights: Mapping[str, float]) -> np.ndarray:
        stack = np.zeros(shape, np.float32)
        for factor in self._factors.get((*where[:-1], "kernel"), ()):
            if where[-1] == HALVES[0]:
                stack[factor.index][:, factor.ranks] = factor.down.astype(np.float32).T
            else:
                scale = weights[factor.file] * factor.scale
                stack[factor.index][factor.ranks] = scale * factor.up.astype(np.float32).T
        return stack


# --- writing -------------------------------------------------------------------------------------------------------


def save_lora(path: epath.PathLike, config: TransformerConfig, adapters: nnx.State, *, dtype: str = "float32") -> None:
    """Write adapters (`training.adapters`) as a file that PEFT and `diffusers` read; whole or not at all."""
    path = epath.Path(path)
    plain = dataclasses.replace(config, lora_rank=0, lora_alpha=0.0)
    params = abstract_params(TRANSFORMER, plain)
    flat = {where: leaf.get_value() for where, leaf in nnx.to_flat_state(adapters)}
    tensors: dict[str, np.ndarray] = {}
    for module, target in targets(parameters(TRANSFORMER, plain, params)).items():
        for half, name in zip(HALVES, ("lora_A", "lora_B"), strict=True):
            if (where := (*target.path[:-1], half)) in flat:
                array = np.asarray(flat[where])
                tensors[f"transformer.{module}.{name}.weight"] = array[target.index].T
    alpha = config.lora_alpha or config.lora_rank
    modules = sorted({name.removeprefix("transformer.").rsplit(".lora_", 1)[0] for name in tensors})
    noted = {
        "transformer.r": config.lora_rank,
        "transformer.lora_alpha": alpha,
        "transformer.target_modules": modules,
    }
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    metadata = {"lora_adapter_metadata": json.dumps(noted)}
    partial = path.parent / f".{path.name}.partial"
    try:
        write_tensors(partial, shapes, SAVE_DTYPES[dtype], tensors.values(), metadata)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
