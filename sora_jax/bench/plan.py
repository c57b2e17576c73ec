"""Does it fit? A step of training or of sampling, compiled for a grid of TPU chips (none is needed), for the devices at
hand, or reckoned for one device of a given size; with what each device would hold, and what would make it fit.

The compiler's numbers are for the very program that runs: `training_program` is the step of `sora-jax train`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sora_jax.bench import reckon
from sora_jax.bench.compute import (
    autoencoder_flops,
    compute,
    count_collectives,
    link_bytes,
    sampling_flops,
    training_flops,
)
from sora_jax.bench.memo import compilers, remembered
from sora_jax.bench.programs import (
    Program,
    TrainingProgram,
    autoencoder_config,
    autoencoder_program,
    peak_bytes,
    placed_shapes,
    sampling_program,
    training_program,
)
from sora_jax.bench.targets import Target
from sora_jax.config import Config
from sora_jax.errors import UserError
from sora_jax.models.autoencoder import Autoencoder
from sora_jax.models.structure import shapes_of
from sora_jax.models.transformer import Transformer
from sora_jax.runtime import compute_dtype, cpu_fingerprint
from sora_jax.shapes import Extent, Stride, latent_extent, token_extent
from sora_jax.sharding import make_mesh
from sora_jax.training.adapters import learning, networks

# Of a device's memory, for what is not counted: fragmentation, the loader's next batch, buffers of links.
HEADROOM = 0.08
ANSWERS = "compiled 1"  # raise it when other things are read out of a compiled program: answers that are kept go stale


@dataclass(frozen=True)
class Plan:
    """What `sora-jax plan` reports. Bytes are of one device; fields are None where nothing was compiled.

    Seconds and what follows from them (`seconds_at_best`, `at_mfu`) are arithmetic from vendors' figures: nothing was
    timed but the compiler.
    """

    program: str
    target: str
    method: str  # "compiled", "reckoned", or "refused": the compiler would not, for want of memory
    mesh: dict[str, int]
    remat: str | None  # what training recomputes
    parameters: int  # of the transformer; in the autoencoder stage of the autoencoder
    devices: int
    chips: int
    rows: int  # videos a step
    tokens: int  # a step, of all rows; in the autoencoder stage latents
    flops_per_step: float  # of the model: forward, and twice that again for what learns; without recomputation
    executed_flops_per_step: float  # of the program as it is
    seconds_at_best: dict[str, float] | None  # "products", "memory", "links": no step is faster than any of them
    at_mfu: dict[str, dict[str, float]] | None  # "40%": seconds_per_step, videos_per_second, ..., reachable
    argument_bytes_per_device: int
    peak_bytes_per_device: int
    hbm_bytes_per_device: int
    fits: bool  # with a headroom of `HEADROOM`
    parts: dict[str, int]  # what of the arguments is what, and what the step needs beside them
    collectives: dict[str, dict[str, int]] | None  # kind: how many a step runs, and their bytes on one device
    compile_seconds: float | None
    compiled_on: str | None  # the day, where the compiler's answer was kept from an earlier plan
    advice: tuple[str, ...] = ()  # what would make it fit


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


def plan_training(config: Config, target: Target, mesh_sizes: Mapping[str, int], *, again: bool = False) -> Plan:
    """The train step of `config`: weights, optimizer, average, what is kept, a batch, and what the step needs.

    `mesh_sizes` take the place of `config.train.mesh`, which one device has no use for. `again` compiles although the
    compiler's answer for this program is kept.
    """
    mesh = _mesh(target, mesh_sizes or (dataclasses.asdict(config.train.mesh) if target.devices else {}))
    _check_rows(config.train.batch_size, mesh, config.train.accumulate)
    dtype, platform = _dtype(target), _platform(target)
    autoencoder = config.train.stage == "autoencoder"
    if autoencoder and target.devices is None:
        raise UserError("the autoencoder stage is compiled, not reckoned: name a --topology")
    program = (autoencoder_program if autoencoder else training_program)(config, mesh, dtype)
    learns = config.train.learns
    return _finish(
        config,
        target,
        program,
        "autoencoder step" if autoencoder else f"train step, {learns} learns" if learns != "all" else "train step",
        config.train.batch_size,
        _size(program.state.params) if autoencoder else module_sizes(config)["transformer"],
        (autoencoder_flops if autoencoder else training_flops)(config, program, platform),
        parts={
            "weights": bytes_per_device(program.state.params),
            "optimizer": bytes_per_device(program.state.opt_state),
            "average": bytes_per_device(program.state.ema),
            "kept modules": bytes_per_device(program.kept),
            "batch": bytes_per_device(program.rows),
        },
        reckoned=0 if autoencoder else training_temporaries(config, program),
        again=again,
    )


def plan_sampling(
    config: Config,
    target: Target,
    mesh_sizes: Mapping[str, int],
    rows: int,
    *,
    offload: bool = False,
    again: bool = False,
) -> Plan:
    """A guided solver step of `rows` videos, beside text encoder and autoencoder unless these are offloaded, all in
    bfloat16. Of two experts the one at work is on the devices, the other on the host."""
    mesh = _mesh(target, mesh_sizes)
    if rows > 1:
        _check_rows(rows, mesh)
    dtype = _dtype(target)
    transformer, text = (_weights(config, name, mesh, dtype) for name in ("transformer", "text_encoder"))
    make = lambda rngs: Autoencoder(autoencoder_config(config), rngs=rngs)  # noqa: E731
    autoencoder = bytes_per_device(placed_shapes(shapes_of(make), mesh, dtype))
    program = sampling_program(config, mesh, dtype, rows)
    return _finish(
        config,
        target,
        program,
        "sampler step",
        rows,
        module_sizes(config)["transformer"],
        sampling_flops(program, _platform(target)),
        parts={"transformer": transformer} | ({} if offload else {"text encoder": text, "autoencoder": autoencoder}),
        reckoned=int(2 * rows * reckon.layer_activations(config.transformer, config.data.row_tokens, dtype)),
        again=again,
    )


def _finish(
    config: Config,
    target: Target,
    program: Program,
    name: str,
    rows: int,
    parameters: int,
    flops: tuple[float, float],
    *,
    parts: dict[str, int],
    reckoned: int,
    again: bool,
) -> Plan:
    sampling, autoencoder = name == "sampler step", config.train.stage == "autoencoder"
    mesh = program.mesh
    compiled: dict[str, Any] = {}
    compiled_on = None
    arguments, peak = sum(parts.values()), sum(parts.values()) + reckoned
    if target.devices is not None:
        compiled, compiled_on = _ask_compiler(program, target, again)
        # Text encoder and autoencoder lie on the devices while the steps are made, and are no arguments of them.
        beside = sum(parts.get(name, 0) for name in ("text encoder", "autoencoder"))
        peak = compiled["peak"] + beside * (not compiled["refused"])
        arguments = compiled["arguments"] or arguments
    parts = parts | {"the step itself": max(peak - sum(parts.values()), 0)}
    # What a step reads at least once: all that lies there; training writes it again, and what it keeps meanwhile too.
    memory = arguments if sampling else 2 * arguments + 2 * parts["the step itself"]
    collectives = compiled.get("collectives")
    traffic = {"memory": float(memory)}
    if target.slices == 1:  # what goes between slices takes another network, whose speed is not the chips' to say
        traffic["links"] = link_bytes(collectives or {})
    work = compute(
        *flops,
        target.devices or [],
        target.kind,
        rows,
        tokens := rows * (_latents(config) if autoencoder else config.data.row_tokens),
        traffic,
    )
    fits = peak <= (1 - HEADROOM) * target.hbm_bytes
    return Plan(
        program=name,
        target=target.name,
        method="refused" if compiled.get("refused") else "compiled" if compiled else "reckoned",
        mesh={axis: n for axis, n in mesh.shape.items() if n > 1},
        remat=None if sampling or autoencoder else config.transformer.remat,
        parameters=parameters,
        devices=mesh.size,
        chips=target.chips,
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
        compile_seconds=compiled.get("seconds"),
        compiled_on=compiled_on,
        advice=() if fits else tuple(_advice(config, mesh, parts, name)),
    )


def _advice(config: Config, mesh: Mesh, parts: Mapping[str, int], program: str) -> list[str]:
    """What would help, most first; said by where the bytes are."""
    advice = []
    largest = max(parts, key=lambda name: parts[name])
    if config.train.stage == "autoencoder":
        if config.train.batch_size > mesh.shape["data"] * mesh.shape["fsdp"]:
            advice.append("fewer clips a device: --batch-size")
        return [*advice, "split the frames: --mesh sequence=N", "smaller or shorter clips: --height --width --frames"]
    if largest == "the step itself":
        if program != "sampler step" and config.transformer.remat != "full":
            advice.append("recompute activations: --remat full")
        advice.append("split the tokens: --mesh sequence=N")
        if config.train.batch_size > mesh.shape["data"] * mesh.shape["fsdp"] and program != "sampler step":
            advice.append("fewer rows a device: --batch-size")
            advice.append("fewer rows at once: --config.train.accumulate=N takes them in N passes")
    else:
        advice.append("split the parameters over more devices: --mesh fsdp=N")
    if "text encoder" in parts:
        advice.append("keep text encoder and autoencoder on the host while the steps are made: --offload")
    if "weights" in parts and config.train.learns == "all":
        advice.append("learn less: --config.train.learns=transformer keeps the text encoder, lora all but adapters")
    elif config.train.learns == "transformer" and "weights" in parts:
        advice.append("learn adapters alone: --config.train.learns=lora --config.transformer.lora_rank=16")
    return advice


# --- bytes ---------------------------------------------------------------------------------------------------------


def _mesh(target: Target, sizes: Mapping[str, int]) -> Mesh:
    devices = target.devices or jax.devices()[:1]
    return make_mesh(dict(sizes) or ({"data": 1, "fsdp": -1} if len(devices) > 1 else {"data": 1}), devices)


def _check_rows(rows: int, mesh: Mesh, accumulate: int = 1) -> None:
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % (devices * accumulate):
        passes = f" in {accumulate} passes" if accumulate > 1 else ""
        raise UserError(f"{rows} rows cannot be split over data x fsdp = {devices} devices{passes}: give --batch-size")


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


def module_sizes(config: Config) -> dict[str, int]:
    """Parameters of the transformer (without adapters) and of the text encoder."""
    plain = dataclasses.replace(config.transformer, lora_rank=0)
    make = {**networks(config), "transformer": lambda rngs: Transformer(plain, rngs=rngs)}
    return {name: _size(shapes_of(build)) for name, build in make.items()}


def parameter_counts(config: Config) -> tuple[int, int]:
    """Of the diffusion stage: what learns, and what is kept."""
    modules = {name: shapes_of(build) for name, build in networks(config).items()}
    return tuple(_size(part) for part in learning(config, modules))  # type: ignore[return-value]


def _size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _latents(config: Config) -> int:
    data = config.data
    return latent_extent(Extent(data.frames, data.height, data.width), config.autoencoder.stride).volume


def training_temporaries(config: Config, program: TrainingProgram) -> int:
    """Reckoned: gradients as large as what learns, and what `reckon` says of activations."""
    shape = program.mesh.shape
    rows = config.train.batch_size // (shape["data"] * shape["fsdp"] * config.train.accumulate)
    tokens = rows * -(-config.data.row_tokens // shape["sequence"])
    return bytes_per_device(program.state.params) + int(reckon.activations(config.transformer, tokens, program.dtype))


# --- what the compiler says ----------------------------------------------------------------------------------------


def _ask_compiler(program: Program, target: Target, again: bool) -> tuple[dict[str, Any], str | None]:
    """What the compiler says of a program (bytes of one device), and the day on which it said so if not now."""
    lowered = program.lower()
    machine = [target.name, *sorted({device.device_kind for device in program.mesh.devices.flat})]
    if target.name == "local":
        machine += [str(program.mesh.size), cpu_fingerprint()]

    def compile_() -> dict[str, Any]:
        began = time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return {"refused": True, "peak": over_budget(str(error)), "arguments": None}
        found = compiled.memory_analysis()
        return {
            "refused": False,
            "seconds": round(time.perf_counter() - began, 1),
            "arguments": int(found.argument_size_in_bytes),
            "peak": peak_bytes(compiled) or 0,
            "statistics": {name: getattr(found, name) for name in dir(found) if name.endswith("_in_bytes")},
            "collectives": count_collectives(compiled.as_text()),
        }

    return remembered([ANSWERS, *machine, *compilers(), lowered.as_text()], compile_, again=again)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def over_budget(message: str) -> int:
    """The bytes that a program would have needed, at least, out of the compiler's refusal `message`.

    Raises `UserError` where the compiler refuses for another reason.
    """
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? (?:hbm|HBM)", message)
    # where one kind of buffer is too much already: "required for HLO temporaries (40.61G) exceeds available HBM"
    found = found or re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available (?:hbm|HBM)", message)
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        raise UserError(f"the compiler refuses the program: {message.splitlines()[0]}")
    return int(float(found[1]) * _UNITS[found[2]])
