"""Does it fit? A step of training or of sampling, compiled for a grid of TPU chips (none is needed), for the devices at
hand, or reckoned for one device of a given size; with what each device would hold, and what would make it fit.

The compiler's numbers are for the very program that runs: `training_program` is the step of `sora-jax train`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sora_jax.bench.compute import compute, count_collectives, link_bytes, sampling_flops, training_flops
from sora_jax.bench.programs import TrainingProgram, peak_bytes, placed_shapes, sampling_program, training_program
from sora_jax.config import Config
from sora_jax.errors import UserError, nearest
from sora_jax.models.structure import shapes_of
from sora_jax.models.transformer import Transformer
from sora_jax.runtime import compute_dtype
from sora_jax.shapes import Extent, Stride, latent_extent, token_extent
from sora_jax.sharding import make_mesh
from sora_jax.training.adapters import networks

GIB = 2**30
# Of a device's memory, for what is not counted: fragmentation, the loader's next batch, buffers of links.
HEADROOM = 0.08

# Memory of one JAX device, GiB, and the grids that product names stand for.
HBM = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 96}
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}  # by chips
CUBES = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8", 1024: "8x8x8"}
PRODUCTS = {
    **{f"{kind}-{n}": f"{kind}:{grid}" for kind in ("v5e", "v6e") for n, grid in FLAT.items()},
    **{f"{kind}-{n}": f"{kind}:{grid}" for kind in ("v4", "v5p", "tpu7x") for n, grid in CUBES.items()},
}


@dataclass(frozen=True)
class Target:
    """What a program is planned for. `devices` are None where it is reckoned, not compiled."""

    name: str
    devices: list[Any] | None
    hbm_bytes: int  # of one device
    slices: int = 1  # of that grid, which a slower network connects


@dataclass(frozen=True)
class Plan:
    """What `sora-jax plan` reports. Bytes are of one device; fields are None where nothing was compiled."""

    program: str
    target: str
    method: str  # "compiled", "reckoned", or "refused": the compiler would not, for want of memory
    mesh: dict[str, int]
    parameters: int  # of the transformer
    devices: int
    rows: int  # videos a step
    tokens: int  # a step, of all rows
    flops_per_step: float  # of the model: forward, and twice that again for what learns; without recomputation
    executed_flops_per_step: float  # of the program as it is
    seconds_at_best: dict[str, float] | None  # arithmetic: "products", "memory", "links", by the vendor's figures
    at_mfu: dict[str, dict[str, float]] | None  # arithmetic: "40%": seconds_per_step, videos_per_second, ...
    argument_bytes_per_device: int
    peak_bytes_per_device: int
    hbm_bytes_per_device: int
    fits: bool  # with a headroom of `HEADROOM`
    parts: dict[str, int]  # what of the arguments is what, and what the step needs beside them
    collectives: dict[str, dict[str, int]] | None  # kind: how many a step runs, and their bytes on one device
    compile_seconds: float | None
    advice: tuple[str, ...] = ()  # what would make it fit


# --- targets -------------------------------------------------------------------------------------------------------


def find_target(topology: str | None, hbm: float | None) -> Target:
    """`topology` is a grid ("v5p:4x4x4"), a product ("v5p-128"), several slices of one ("2xv5p-128") or "local"; or
    `hbm` GiB of one device are given."""
    if (topology is None) == (hbm is None):
        raise UserError("name what is planned for: --topology GRID (or local), or --hbm GIB for one device")
    if hbm is not None:
        if not hbm > 0:
            raise UserError(f"--hbm must be > 0, not {hbm:g}")
        return Target(f"one device of {hbm:g} GiB", None, int(hbm * GIB))
    assert topology is not None
    if topology == "local":
        return Target("local", jax.devices(), _local_memory())
    several = re.fullmatch(r"([1-9]\d*)x(\D.*)", topology)
    slices, one = (int(several[1]), several[2]) if several else (1, topology)
    grid = PRODUCTS.get(one, one)
    kind = grid.partition(":")[0]
    if ":" not in grid or kind not in HBM:
        raise UserError(f'unknown topology "{topology}"; {nearest(one, [*PRODUCTS, "local"])}')
    name = f"{grid} x {slices}" if slices > 1 else grid
    return Target(name, _tpu_devices(grid, slices), HBM[kind] * GIB, slices)


def _local_memory() -> int:
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # the CPU computes in the host's memory


def _tpu_devices(grid: str, slices: int) -> list[Any]:
    import importlib.util

    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for TPU needs the TPU compiler (no TPU): pip install 'sora-jax[tpu]'")
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if grid.endswith(":1x1") else {}
    if slices > 1:
        options["num_slices"] = slices
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=grid, **options).devices)
    except Exception as error:  # noqa: BLE001  the compiler's own error, of no narrower type
        raise UserError(f'the TPU compiler knows no topology "{grid}": {str(error).splitlines()[0]}') from None


# --- sizes ---------------------------------------------------------------------------------------------------------


def with_size(config: Config, stride: Stride, extent: Extent, rows: int | None) -> Config:
    """`config` with rows of one video of `extent` each, and `rows` rows a step where they are given."""
    tokens = token_extent(latent_extent(extent, stride, config.transformer.patch), config.transformer.patch)
    data = dataclasses.replace(
        config.data,
        frames=extent.frames,
        height=extent.height,
        width=extent.width,
        row_tokens=tokens.volume,
        groups=tokens.frames,
    )
    train = config.train if rows is None else dataclasses.replace(config.train, batch_size=rows)
    return dataclasses.replace(config, data=data, train=train)


# --- plans ---------------------------------------------------------------------------------------------------------


def plan_training(config: Config, target: Target, mesh_sizes: Mapping[str, int]) -> Plan:
    """The train step of `config`: weights, optimizer, average, what is kept, a batch, and what the step needs."""
    mesh = _mesh(target, mesh_sizes)
    rows = config.train.batch_size
    shards = mesh.shape["data"] * mesh.shape["fsdp"] * config.train.accumulate
    if rows % shards:
        passes = f" in {config.train.accumulate} passes" if config.train.accumulate > 1 else ""
        devices = shards // config.train.accumulate
        raise UserError(f"{rows} rows cannot be split over data x fsdp = {devices} devices{passes}: give --batch-size")
    dtype = _dtype(target)
    program = training_program(config, mesh, dtype)
    parts = {
        "weights": bytes_per_device(program.state.params),
        "optimizer": bytes_per_device(program.state.opt_state),
        "average": bytes_per_device(program.state.ema),
        "kept modules": bytes_per_device(program.kept),
        "batch": bytes_per_device(program.rows),
    }
    flops = training_flops(config, program, _platform(target))
    return _finish(
        config,
        target,
        mesh,
        f"train step, {config.train.learns} learns" if config.train.learns != "all" else "train step",
        rows,
        flops,
        parts,
        compile_=program.compile if target.devices else None,
        reckoned=training_temporaries(config, program, rows // shards, dtype),
    )


def plan_sampling(
    config: Config, target: Target, mesh_sizes: Mapping[str, int], rows: int, *, offload: bool = False
) -> Plan:
    """A guided solver step of `rows` videos, beside the text encoder unless that is offloaded, all in bfloat16."""
    mesh = _mesh(target, mesh_sizes)
    dtype = _dtype(target)
    transformer, text = (_weights(config, name, mesh, dtype) for name in ("transformer", "text_encoder"))
    parts = {"transformer": transformer} | ({} if offload else {"text encoder": text})
    program = sampling_program(config, mesh, dtype, rows)
    flops = sampling_flops(program, _platform(target))
    return _finish(
        config,
        target,
        mesh,
        "sampler step",
        rows,
        (flops, flops),
        parts,
        compile_=program.compile if target.devices else None,
        reckoned=2 * rows * _layer_activations(config, config.data.row_tokens, dtype),
    )


def _finish(
    config: Config,
    target: Target,
    mesh: Mesh,
    program: str,
    rows: int,
    flops: tuple[float, float],
    parts: dict[str, int],
    compile_: Any,
    reckoned: int,
) -> Plan:
    method, seconds, collectives = "reckoned", None, None
    arguments, peak = sum(parts.values()), sum(parts.values()) + reckoned
    if compile_ is not None:
        began = time.perf_counter()
        try:
            compiled = compile_()
        except jax.errors.JaxRuntimeError as error:
            method, peak = "refused", _over_budget(str(error))
        else:
            method, seconds = "compiled", round(time.perf_counter() - began, 1)
            found = compiled.memory_analysis()
            outside = parts.get("text encoder", 0)  # lies on the devices, and is no argument of the step
            arguments, peak = int(found.argument_size_in_bytes), (peak_bytes(compiled) or 0) + outside
            collectives = count_collectives(compiled.as_text())
    parts = parts | {"the step itself": max(peak - sum(parts.values()), 0)}
    # What a step reads at least once: all that lies there; training writes it again, and what it keeps meanwhile too.
    memory = arguments if program == "sampler step" else 2 * arguments + 2 * parts["the step itself"]
    traffic = {"memory": float(memory)}
    if target.slices == 1:  # what goes between slices takes another network, whose speed is not the chips' to say
        traffic["links"] = link_bytes(collectives or {})
    tokens = rows * config.data.row_tokens
    devices = target.devices or []
    work = compute(*flops, devices, target.name.partition(":")[0], rows, tokens, traffic)
    fits = peak <= (1 - HEADROOM) * target.hbm_bytes
    return Plan(
        program=program,
        target=target.name,
        method=method,
        mesh={axis: n for axis, n in mesh.shape.items() if n > 1},
        parameters=_parameters(config),
        devices=mesh.size,
        rows=rows,
        tokens=tokens,
        flops_per_step=work.flops,
        executed_flops_per_step=work.executed_flops,
        seconds_at_best=work.seconds_at_best,
        at_mfu=work.at_mfu,
        argument_bytes_per_device=arguments,
        peak_bytes_per_device=peak,
        hbm_bytes_per_device=target.hbm_bytes,
        fits=fits,
        parts=parts,
        collectives=collectives,
        compile_seconds=seconds,
        advice=() if fits else tuple(_advice(config, mesh, parts, program)),
    )


def _advice(config: Config, mesh: Mesh, parts: Mapping[str, int], program: str) -> list[str]:
    """What would help, most first; said by where the bytes are."""
    advice = []
    largest = max(parts, key=lambda name: parts[name])
    if largest == "the step itself":
        if program != "sampler step" and config.transformer.remat != "full":
            advice.append("recompute activations: --remat full")
        advice.append("split the tokens: --mesh sequence=N")
        if config.train.batch_size > mesh.shape["data"] * mesh.shape["fsdp"] and program != "sampler step":
            advice.append("fewer rows a device: --batch-size")
    else:
        advice.append("split the parameters over more devices: --mesh fsdp=N")
    if "text encoder" in parts:
        advice.append("keep the text encoder on the host while the steps are made: --offload")
    if "weights" in parts and config.train.learns == "all":
        advice.append("learn less: --config.train.learns=transformer keeps the text encoder, lora all but adapters")
    elif config.train.learns == "transformer" and "weights" in parts:
        advice.append("learn adapters alone: --config.train.learns=lora --config.transformer.lora_rank=16")
    return advice


# --- bytes ---------------------------------------------------------------------------------------------------------


def _mesh(target: Target, sizes: Mapping[str, int]) -> Mesh:
    devices = target.devices or jax.devices()[:1]
    return make_mesh(dict(sizes) or ({"data": 1, "fsdp": -1} if len(devices) > 1 else {"data": 1}), devices)


def _platform(target: Target) -> str:
    """What a program there is lowered for."""
    if target.name == "local":
        platform = jax.devices()[0].platform
        return "cuda" if platform == "gpu" else platform
    return "tpu" if target.devices else "cuda"


def _dtype(target: Target) -> jnp.dtype:
    """What computes there: what "auto" means on the devices at hand, bfloat16 on those that are planned for."""
    return compute_dtype("auto" if target.name == "local" else "bfloat16")


def bytes_per_device(tree: Any) -> int:
    """Of arrays or shapes with shardings: what one device holds of them."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        shape = leaf.sharding.shard_shape(leaf.shape) if getattr(leaf, "sharding", None) is not None else leaf.shape
        total += math.prod(shape) * np.dtype(leaf.dtype).itemsize
    return total


def _weights(config: Config, module: str, mesh: Mesh, dtype: jnp.dtype) -> int:
    return bytes_per_device(placed_shapes(shapes_of(networks(config)[module]), mesh, dtype))


def _parameters(config: Config) -> int:
    plain = dataclasses.replace(config.transformer, lora_rank=0)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes_of(lambda rngs: Transformer(plain, rngs=rngs))))


def _layer_activations(config: Config, tokens: int, dtype: jnp.dtype) -> int:
    """What one layer of one row keeps at once: about ten arrays of the model's width, and two of the MLP's."""
    t = config.transformer
    return tokens * (10 * t.dim + 2 * t.ffn_dim) * dtype.itemsize


def training_temporaries(config: Config, program: TrainingProgram, rows: int, dtype: jnp.dtype) -> int:
    """Reckoned: gradients as large as what learns, a layer at work, and what remat lets the layers keep."""
    t, tokens = config.transformer, config.data.row_tokens
    working = 3 * rows * _layer_activations(config, tokens, dtype)
    kept = {
        "offload": 0,
        "full": tokens * t.dim * dtype.itemsize,
        "dots": tokens * (7 * t.dim + t.ffn_dim) * dtype.itemsize,  # those of the text are few
    }
    of_layer = kept.get(t.remat, _layer_activations(config, tokens, dtype))
    return bytes_per_device(program.state.params) + working + rows * t.n_layers * of_layer


# --- what the compiler says ----------------------------------------------------------------------------------------

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _over_budget(message: str) -> int:
    """The bytes that a program would have needed, out of the compiler's refusal. Raises it when it is about more."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? (?:hbm|HBM)", message)
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        raise UserError(f"the compiler refuses the program: {message.splitlines()[0]}")
    return int(float(found[1]) * _UNITS[found[2]])
