"""Low-rank adapters on a transformer (LoRA; Hu et al. 2021, arXiv:2106.09685), merged into its kernels:

    W + weight * alpha / r * B A,      A [r, in], B [out, r]

read from the safetensors files that PEFT and `diffusers`, or tools with the Wan authors' names, write.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import nnx

from sora_jax.errors import UserError
from sora_jax.models.transformer import TransformerConfig
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
from sora_jax.weights.table import Family
from sora_jax.weights.wan import TRANSFORMER

PREFIX = re.compile(r"^(base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|transformer\.)+")
PART = re.compile(r"^(.*)\.(lora_A|lora_B|lora_down|lora_up)(?:\.\w+)?\.weight$")
DOWN = ("lora_A", "lora_down")


class Adapter(NamedTuple):
    """What is added to one kernel of one layer; A and B as stored."""

    down: StoredTensor  # A [r, in]
    up: StoredTensor  # B [out, r]
    alpha: float | None


class Target(NamedTuple):
    """A kernel that an adapter may have: of a stack of layers, the one at `layer`."""

    path: tuple[Any, ...]
    layer: int | None


def targets(family: Family, config: TransformerConfig) -> dict[str, Target]:
    """Every linear kernel by its name on disk, without ".weight"."""
    params = abstract_params(family, config)
    shapes = dict(nnx.to_flat_state(params))
    found = {}
    for path, row in match_rows(family, config, params):
        if row.axes == "o i -> i o":
            for n, key in enumerate(row.keys(shapes[path].shape)):
                found[key.removesuffix(".weight")] = Target(path, n if row.stacked else None)
    return found


def read_adapters(path: epath.Path) -> dict[str, Adapter]:
    """The adapters of a file by the name of their module, prefixes left off. Raises `UserError` for a file that holds
    anything else."""
    stored = read_header(path)
    alphas: dict[str, float] = {}
    parts: dict[str, dict[bool, StoredTensor]] = {}
    strange = []
    with tensor_reader() as read:
        for name, tensor in stored.items():
            bare = PREFIX.sub("", name)
            if match := PART.match(bare):
                parts.setdefault(match[1], {})[match[2] in DOWN] = tensor
            elif bare.endswith(".alpha"):
                if tensor.dtype not in DTYPES or math.prod(tensor.shape) != 1:
                    raise UserError(f'{path}: "{name}" is no float number')
                alphas[bare.removesuffix(".alpha")] = float(read(tensor).reshape(()))
            else:
                strange.append(name)
    if strange or not parts:
        what = f'"{strange[0]}" among {len(strange)} others' if strange else "no adapter"
        raise UserError(f"{path} is not a LoRA file that is supported: it holds {what}; known: lora_A, lora_B, alpha")
    for module, halves in parts.items():
        for tensor in halves.values():
            if tensor.dtype not in DTYPES:
                raise UserError(f"{path}: the adapter of {module} has dtype {tensor.dtype}; known: {', '.join(DTYPES)}")
    general = _alpha_of_all(path)
    adapters = {}
    for module, halves in parts.items():
        if len(halves) != 2:
            raise UserError(f"{path}: the adapter of {module} has one half (lora_{'A' if True in halves else 'B'})")
        adapters[module] = Adapter(halves[True], halves[False], alphas.get(module, general))
    return adapters


def _alpha_of_all(path: epath.Path) -> float | None:
    """The alpha in the metadata that `diffusers` writes; None where there is none, which means alpha = r."""
    try:
        values = json.loads(read_metadata(path).get("lora_adapter_metadata", "{}"))
    except ValueError:
        return None
    found = [value for key, value in values.items() if key.endswith("lora_alpha")]
    return float(found[0]) if found else None


Changes = dict[tuple[Any, ...], list[tuple[Target, Adapter, float]]]


def find_changes(config: TransformerConfig, loras: Mapping[str, float]) -> Changes:
    """What the adapters of each file, at its weight, change in the kernels of a transformer of that config: by the
    headers of the files alone. Raises `UserError` for a file that is no LoRA, or one for another model."""
    known = targets(TRANSFORMER, config) | targets(ORIGINAL_TRANSFORMER, config)
    shapes = dict(nnx.to_flat_state(abstract_params(TRANSFORMER, config)))
    changes: Changes = {}
    for name, weight in loras.items():
        path = epath.Path(name)
        if not path.exists() or path.is_dir():
            raise UserError(f"LoRA file {name} {'is a folder' if path.exists() else 'does not exist'}")
        if not math.isfinite(weight):
            raise UserError(f"LoRA file {name} must have a finite weight, not {weight}")
        adapters = read_adapters(path)
        unknown = [module for module in adapters if module not in known]
        if unknown:
            listed = ", ".join(unknown[:10])
            raise UserError(
                f"{path} is for another model: {len(unknown)} of its modules are not in this one ({listed})"
            )
        for module, adapter in adapters.items():
            target = known[module]
            n_in, n_out = shapes[target.path].shape[-2:]
            rank = adapter.down.shape[0] if adapter.down.shape else 0
            if not rank or adapter.down.shape != (rank, n_in) or adapter.up.shape != (n_out, rank):
                raise UserError(
                    f"{path} is for another model: {module} has {adapter.down.shape[1:]} in and {adapter.up.shape[:1]} "
                    f"out there, and ({n_in},) and ({n_out},) here"
                )
            changes.setdefault(target.path, []).append((target, adapter, float(weight)))
    return changes


def merge_loras(config: TransformerConfig, params: nnx.State, loras: Mapping[str, float]) -> nnx.State:
    """`params` with the adapters of each file added at its weight, kernel by kernel on the host, in float32; parameters
    that lie on the host stay there. Raises `UserError`, before anything is changed, as `find_changes`."""
    flat = dict(nnx.to_flat_state(params))
    work = find_changes(config, loras)
    with tensor_reader() as read:
        for where, changes in work.items():
            array = flat[where].get_value()
            kernel = np.array(array, np.float32)
            for target, adapter, weight in changes:
                scale = weight * (1.0 if adapter.alpha is None else adapter.alpha / adapter.down.shape[0])
                change = read(adapter.down).astype(np.float32).T @ read(adapter.up).astype(np.float32).T
                kernel[... if target.layer is None else target.layer] += scale * change
            merged = kernel.astype(array.dtype)
            flat[where] = flat[where].replace(
                merged if isinstance(array, np.ndarray) else jax.device_put(merged, array.sharding)
            )
    return nnx.from_flat_state(list(flat.items()))


def save_lora(path: epath.PathLike, config: TransformerConfig, adapters: nnx.State, *, dtype: str = "float32") -> None:
    """Write adapters (`training.adapters`) as a file that PEFT and `diffusers` read; whole or not at all."""
    path = epath.Path(path)
    plain = dataclasses.replace(config, lora_rank=0, lora_alpha=0.0)
    flat = {where: leaf.get_value() for where, leaf in nnx.to_flat_state(adapters)}
    tensors: dict[str, np.ndarray] = {}
    for module, target in targets(TRANSFORMER, plain).items():
        for half, name in (("adapter_a", "lora_A"), ("adapter_b", "lora_B")):
            if (where := (*target.path[:-1], half)) in flat:
                array = np.asarray(flat[where])
                tensors[f"transformer.{module}.{name}.weight"] = (
                    array if target.layer is None else array[target.layer]
                ).T
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
