"""The programs that most time goes into, for any mesh: a step of training (of either network) and a step of sampling.

They are built from a config alone, with shapes in place of arrays, so that they can be compiled for machines that are
not at hand (TPU topologies) as well as run here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from sora_jax import sharding
from sora_jax.config import Config
from sora_jax.diffusion.guidance import classifier_free_guidance, guided_condition
from sora_jax.diffusion.sampler import SamplerState, denoise, find_solver
from sora_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sora_jax.models.structure import parameters_of, shapes_of, structure_of
from sora_jax.models.transformer import model_time
from sora_jax.shapes import Condition, Stride
from sora_jax.tokens.packing import PackedRows
from sora_jax.training.adapters import learning, networks
from sora_jax.training.autoencoder_step import MODULE, make_autoencoder_step
from sora_jax.training.diffusion_step import DiffusionModules, make_diffusion_step
from sora_jax.training.optimizer import make_optimizer
from sora_jax.training.state import TrainState, abstract_state, init_state, make_init
from sora_jax.weights.component import read_config
from sora_jax.weights.shipped import shipped_models
from sora_jax.weights.wan import AUTOENCODER


@dataclass(frozen=True)
class Program:
    """`step(*arguments)`, of which there are shapes and shardings."""

    step: Any
    mesh: Mesh
    arguments: tuple[Any, ...]

    def lower(self) -> Any:
        with jax.set_mesh(self.mesh):
            return self.step.lower(*self.arguments)

    def compile(self) -> Any:
        return self.lower().compile()


@dataclass(frozen=True)
class TrainingProgram(Program):
    """Its arguments are the state, a batch, and in the diffusion stage the modules that do not learn."""

    init: Any
    dtype: jnp.dtype

    @property
    def state(self) -> TrainState:
        return self.arguments[0]

    @property
    def rows(self) -> Any:
        """Packed rows; in the autoencoder stage uint8 clips [B, T, H, W, 3]."""
        return self.arguments[1]

    @property
    def kept(self) -> dict[str, Any]:
        return self.arguments[2] if self.arguments[2:] else {}

    def start(self) -> TrainState:
        return init_state(self.init, jax.random.key(0), self.mesh)


def training_program(config: Config, mesh: Mesh, dtype: jnp.dtype) -> TrainingProgram:
    """The diffusion train step of `config` on `mesh`: optimiser, clipping and average included."""

    make = networks(config)

    def make_params(key: jax.Array) -> dict[str, Any]:
        return learning(config, {name: parameters_of(build(nnx.Rngs(params=key))) for name, build in make.items()})[0]

    structure = DiffusionModules(**{name: structure_of(build) for name, build in make.items()})
    kept = learning(config, {name: shapes_of(build) for name, build in make.items()})[1]
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    init = make_init(make_params, optimizer)
    step = make_diffusion_step(
        structure,
        optimizer,
        config.levels,
        clip_norm=config.optimizer.clip_norm,
        spike_sigmas=config.optimizer.spike_sigmas,
        ema_decay=config.train.ema,
        dtype=dtype,
        accumulate=config.train.accumulate,
        route_share=config.transformer.route_share,
    )
    state = abstract_state(init, jax.random.key(0), mesh)
    batch = sharding.batch_sharding(mesh)
    one = full_rows(dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=1)))
    rows = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((config.train.batch_size, *leaf.shape[1:]), leaf.dtype, sharding=batch), one
    )
    return TrainingProgram(step, mesh, (state, rows, placed_shapes(kept, mesh, dtype)), init, dtype)


def autoencoder_program(config: Config, mesh: Mesh, dtype: jnp.dtype) -> TrainingProgram:
    """The train step of the autoencoder of `config` on whole clips of `config.data`."""
    make, data = lambda rngs: Autoencoder(config.autoencoder, rngs=rngs), config.data
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    init = make_init(lambda key: {MODULE: parameters_of(make(nnx.Rngs(params=key)))}, optimizer)
    step = make_autoencoder_step(
        structure_of(make),
        config.autoencoder,
        optimizer,
        config.reconstruction,
        clip_norm=config.optimizer.clip_norm,
        spike_sigmas=config.optimizer.spike_sigmas,
        ema_decay=config.train.ema,
        dtype=dtype,
        accumulate=config.train.accumulate,
    )
    shape = (config.train.batch_size, data.frames, data.height, data.width, 3)
    clips = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=sharding.batch_sharding(mesh))
    return TrainingProgram(step, mesh, (abstract_state(init, jax.random.key(0), mesh), clips), init, dtype)


def autoencoder_stride(config: Config) -> Stride:
    return autoencoder_config(config).stride


def autoencoder_config(config: Config) -> AutoencoderConfig:
    """Of the autoencoder that the config names, where it is at hand; else of the one it describes."""
    folder = epath.Path(shipped_models().get(config.data.autoencoder, config.data.autoencoder)) / AUTOENCODER.folder
    described = read_config(folder / "config.json", AUTOENCODER) if (folder / "config.json").exists() else None
    return described or config.autoencoder


def placed_shapes(params: Any, mesh: Mesh, dtype: jnp.dtype) -> Any:
    """The shapes of parameters, in `dtype` and with their places on `mesh`."""
    places = jax.tree.broadcast(sharding.param_shardings(params, mesh), params)
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place), params, places)


def full_rows(config: Config, seed: int = 0) -> PackedRows:
    """A batch in which one clip fills each row; latents and texts are noise."""
    B, data, patch = config.train.batch_size, config.data, config.transformer.patch
    N, L, G = data.row_tokens, data.row_text, data.groups
    channels = config.transformer.in_channels * patch.time * patch.height * patch.width
    rng = np.random.default_rng(seed)
    token = np.arange(N)
    frame = token * G // N

    def rows(one: np.ndarray) -> np.ndarray:
        return np.broadcast_to(one.astype(np.int32), (B, *one.shape)).copy()

    return PackedRows(
        tokens=rng.standard_normal((B, N, channels), np.float32),
        positions=rows(np.stack([frame, token // 4 % 4, token % 4], axis=-1)),
        segment_ids=rows(np.ones(N)),
        prompt_ids=rows(np.ones(N)),
        level_ids=rows(frame),
        group_segment=rows(np.ones(G)),
        group_frame=rows(np.arange(G)),
        group_count=rows(np.full(G, G)),
        text_tokens=rng.integers(3, 259, (B, L)).astype(np.int32),
        text_ids=rows(np.ones(L)),
    )


def sampling_program(config: Config, mesh: Mesh, dtype: jnp.dtype, rows: int = 1) -> Program:
    """One guided solver step of `rows` videos for `mesh`; the batch lies over its data axes."""
    transformer, data, solver = config.transformer, config.data, find_solver(config.sample.solver)
    make = networks(config)["transformer"]
    graphdef, params = structure_of(make), shapes_of(make)

    def velocity(params: Any, tokens: jax.Array, levels: jax.Array, condition: Condition) -> jax.Array:
        return nnx.merge(graphdef, params)(tokens, model_time(levels, whole=solver.whole_times), condition, dtype=dtype)

    guided = classifier_free_guidance(velocity)

    def step(params: Any, tokens: jax.Array, ids: dict[str, jax.Array], texts: list[jax.Array]) -> jax.Array:
        given = ids["segment_ids"] == 0
        prompt, without = (Condition(**ids, given=given, text=text) for text in texts)
        condition = guided_condition(prompt, without, jnp.full((rows,), config.sample.guidance))
        schedule = jnp.broadcast_to(jnp.array([1.0, 0.9])[:, None, None], (2, rows, data.groups))
        state = SamplerState(tokens, solver.history(tokens, schedule[0]))
        return denoise(guided, params, condition, state, schedule, solver=solver).tokens

    place = sharding.batch_sharding(mesh) if rows > 1 else sharding.replicated(mesh)
    N, L, patch = data.row_tokens, data.row_text, transformer.patch
    shapes = {
        "positions": (rows, N, 3),
        **dict.fromkeys(("segment_ids", "prompt_ids", "level_ids"), (rows, N)),
        "text_ids": (rows, L),
    }
    channels = transformer.in_channels * patch.time * patch.height * patch.width
    arguments = (
        placed_shapes(params, mesh, dtype),
        jax.ShapeDtypeStruct((rows, N, channels), jnp.float32, sharding=place),
        {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place) for name, shape in shapes.items()},
        [jax.ShapeDtypeStruct((rows, L, transformer.text_dim), dtype, sharding=place)] * 2,
    )
    return Program(jax.jit(step), mesh, arguments)


def peak_bytes(compiled: Any) -> int | None:
    """What a compiled program needs on one device: arguments, results and temporaries, aliases counted once."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    return int(
        found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes - found.alias_size_in_bytes
    )
