"""`sora-jax train --dry-run`: all that a run would be made of, found out with shapes; nothing is trained or written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from sora_jax import config as configs
from sora_jax.bench.plan import bytes_per_device, training_temporaries
from sora_jax.bench.programs import full_rows, placed_shapes, training_program
from sora_jax.config import Config
from sora_jax.data.loader import make_loader
from sora_jax.models.structure import shapes_of
from sora_jax.runtime import compute_dtype
from sora_jax.tokens.packing import PackedRows
from sora_jax.training.adapters import learning, networks
from sora_jax.training.checkpoint import check_place
from sora_jax.training.diffusion_stage import caption_tokenizer, loader_options, open_latents
from sora_jax.training.loop import mesh_of, refuse_other_config
from sora_jax.training.optimizer import make_optimizer
from sora_jax.training.pretrained import abstract_modules, find_pretrained
from sora_jax.training.stage import Context
from sora_jax.training.stages import STAGES
from sora_jax.training.state import TrainState, abstract_state, make_init

GIB = 2**30


@dataclass(frozen=True)
class DryRun:
    """What `sora-jax train --dry-run` reports. Bytes are of one device."""

    config: dict[str, Any]
    devices: int
    mesh: dict[str, int]
    dtype: str  # of activations
    parameters: dict[str, int]  # that learn, by module; "transformer.blocks"
    kept_parameters: dict[str, int]  # that do not, by module
    memory: dict[str, int]  # what lies on a device all the time: "weights", "optimizer", "average", ...
    peak_bytes: int  # reckoned
    peak_is: str  # what was reckoned
    batch: dict[str, list[Any]]  # of all processes together: name: [dtype, shape]
    batch_is: str  # where it comes from


def dry_run(config: Config, workdir: epath.PathLike, *, force: bool = False) -> DryRun:
    """What `train(config, workdir)` would begin with. Raises the `UserError`s that it would raise, for all that can be
    found out without loading or training anything."""
    check_place(workdir)
    workdir = epath.Path(workdir)
    refuse_other_config(config, workdir, force)
    mesh = mesh_of(config)
    dtype = compute_dtype(config.train.dtype, mesh.devices.ravel().tolist())
    for name in (config.train.init, config.train.text_init):
        if name:
            find_pretrained(name)
    context = Context(
        config, workdir, mesh, make_optimizer(config.optimizer, config.train.steps), dtype, lambda _: None
    )
    shapes = abstract_modules(config)
    kept: dict[str, Any] = {}
    if config.train.stage == "diffusion":
        kept = learning(config, {name: shapes_of(make) for name, make in networks(config).items()})[1]
        batch, batch_is = _first_rows(context)
    else:
        with _opened(STAGES[config.train.stage](context).batches) as batches:
            batch, batch_is = next(batches), "the first one, as it was made here"

    state = _state(config, context, shapes)
    memory = {
        "weights": bytes_per_device(state.params),
        "optimizer": bytes_per_device(state.opt_state),
        "average": bytes_per_device(state.ema),
        "kept modules": bytes_per_device(placed_shapes(kept, mesh, dtype)),
        "batch": sum(leaf.nbytes for leaf in jax.tree.leaves(batch)) * context.part.parts // _rows(mesh),
    }
    peak = sum(memory.values()) + memory["weights"]
    peak_is = "what lies there, and gradients; activations come on top"
    if config.train.stage == "diffusion":
        peak = sum(memory.values()) + training_temporaries(config, training_program(config, mesh, dtype))
        peak_is = "what lies there, gradients and activations, by a formula; sora-jax plan asks the compiler"
    return DryRun(
        config=configs.to_dict(config),
        devices=mesh.size,
        mesh=dict(mesh.shape),
        dtype=str(dtype),
        parameters=_by_module(shapes),
        kept_parameters=_by_module(kept),
        memory={name: size for name, size in memory.items() if size},
        peak_bytes=peak,
        peak_is=peak_is,
        batch={name: [str(leaf.dtype), _whole_shape(leaf, context)] for name, leaf in _named(batch)},
        batch_is=batch_is,
    )


def table(name: str, found: DryRun) -> str:
    """What people read."""
    axes = ", ".join(f"{axis}={n}" for axis, n in found.mesh.items())
    total = sum(found.parameters.values())
    lines = [
        configs.to_json(configs.from_dict(found.config)).rstrip("\n"),
        "",
        f"{name}: stage {found.config['train']['stage']} · {found.config['train']['steps']} steps · {found.dtype}",
        f"mesh: {axes} ({found.devices} device{'s' * (found.devices > 1)})",
        "",
        f"parameters that learn: {total:,}",
        *(f"  {module:40} {count:>16,}" for module, count in found.parameters.items()),
    ]
    if found.kept_parameters:
        lines += [f"parameters that are kept: {sum(found.kept_parameters.values()):,}"]
        lines += [f"  {module:40} {count:>16,}" for module, count in found.kept_parameters.items()]
    lines += ["", "memory of each device:"]
    lines += [f"  {part:40} {size / GIB:12.3f} GiB" for part, size in found.memory.items()]
    lines += [f"  {'peak, reckoned':40} {found.peak_bytes / GIB:12.3f} GiB   ({found.peak_is})"]
    lines += ["", f"first batch: {found.batch_is}"]
    lines += [f"  {field:40} {dtype} [{', '.join(map(str, shape))}]" for field, (dtype, shape) in found.batch.items()]
    return "\n".join(lines)


def _first_rows(context: Context) -> tuple[PackedRows, str]:
    """The first batch of the diffusion stage, from its latent cache; the shapes of one where that is yet to be made."""
    config, folder = context.config, context.workdir / "latents"
    if not config.data.latents and not (folder / "manifest.json").exists():
        clips = f"{config.data.clips} clips of the world" if config.data.source == "world" else config.data.source
        rows = full_rows(config)
        return rows, f"a full one of noise: {clips} would first be encoded into {folder}"
    source = open_latents(config, config.data.latents or folder)
    options = loader_options(config) | context.part._asdict()
    with make_loader(source, tokenize=caption_tokenizer(config).places, **options) as loader:
        rows = PackedRows(**next(loader))
    used = float(np.mean(np.asarray(rows.segment_ids) > 0))
    return rows, f"{used:.1%} of its tokens are used, from {len(source)} clips"


@contextmanager
def _opened(batches: Any) -> Iterator[Any]:
    try:
        yield batches
    finally:
        batches.close()


def _state(config: Config, context: Context, shapes: dict[str, nnx.State]) -> TrainState:
    def zeros(key: jax.Array) -> dict[str, Any]:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    return abstract_state(make_init(zeros, context.optimizer), jax.random.key(config.train.seed), context.mesh)


def _rows(mesh: jax.sharding.Mesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _whole_shape(leaf: np.ndarray, context: Context) -> list[int]:
    return [leaf.shape[0] * context.part.parts, *leaf.shape[1:]]


def _named(batch: Any) -> list[tuple[str, np.ndarray]]:
    if isinstance(batch, np.ndarray):
        return [("clips", batch)]
    fields = batch._asdict() if hasattr(batch, "_asdict") else dataclasses.asdict(batch)
    return list(fields.items())


def _by_module(modules: dict[str, Any]) -> dict[str, int]:
    """Parameters of each module and of its direct parts, in the order of the modules."""
    counts: dict[str, int] = {}
    for module, state in modules.items():
        for path, leaf in nnx.to_flat_state(state):
            part = ".".join((module, *map(str, path[:1])))
            counts[part] = counts.get(part, 0) + math.prod(leaf.get_value().shape)
    return counts
