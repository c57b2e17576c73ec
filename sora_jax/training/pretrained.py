"""Parameters to start from: of a run's workdir, or of a model folder (the layout of `diffusers`)."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from sora_jax import config as configs
from sora_jax import sharding
from sora_jax.config import Config
from sora_jax.data.world.questions import answer_counts
from sora_jax.diffusion.levels import LevelsConfig
from sora_jax.errors import UserError
from sora_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sora_jax.models.structure import Make, shapes_of
from sora_jax.models.tokenizer import ByteTokenizer, Tokenizer
from sora_jax.training.adapters import ADAPTERS, learning, networks
from sora_jax.training.checkpoint import Checkpoints, check_place
from sora_jax.training.deepen import deepen
from sora_jax.training.text_step import Reader
from sora_jax.weights.component import load_component
from sora_jax.weights.layout import INDEX, SECOND, load_tokenizer, read_index
from sora_jax.weights.shipped import find_model
from sora_jax.weights.umt5 import TEXT_ENCODER
from sora_jax.weights.wan import AUTOENCODER, TRANSFORMER

LATENT_STATISTICS = "latents.json"  # in the workdir of an autoencoder's run: mean and std of each latent channel
FOLDERS = {"transformer": TRANSFORMER, "text_encoder": TEXT_ENCODER, "autoencoder": AUTOENCODER}


class Run(NamedTuple):
    """What a workdir has learned."""

    config: Config
    step: int
    params: dict[str, nnx.State]  # the averages, by module: "transformer", "text_encoder", "reader", "autoencoder"


def abstract_modules(config: Config) -> dict[str, nnx.State]:
    """The parameters that the stage of `config` trains, as shapes."""
    make: dict[str, Make] = networks(config)
    if config.train.stage == "autoencoder":
        make = {"autoencoder": lambda rngs: Autoencoder(config.autoencoder, rngs=rngs)}
    elif config.train.stage == "text":
        make = {
            "text_encoder": make["text_encoder"],
            "reader": lambda rngs: Reader(config.text_encoder.d_model, answer_counts(config.data.mix), rngs=rngs),
        }
    shapes = {name: shapes_of(module) for name, module in make.items()}
    return learning(config, shapes)[0] if config.train.stage == "diffusion" else shapes


def load_kept(config: Config, mesh: Mesh, dtype: jnp.dtype) -> dict[str, nnx.State]:
    """The modules that do not learn in the diffusion stage of `config`, from `train.init`, in the dtype that
    computes."""
    if config.train.learns == "all":
        return {}
    shapes = learning(config, {name: shapes_of(make) for name, make in networks(config).items()})[1]
    return load_modules(config.train.init, shapes, mesh, expert=config.train.expert, dtype=dtype).params


def load_start(
    config: Config,
    modules: Mapping[str, Any],
    mesh: Mesh,
    *,
    may_differ: Collection[str] = (),
    say: Callable[[str], None],
) -> dict[str, nnx.State]:
    """What a new run starts from in place of random numbers, by module: what learns (given as shapes, by name) and is
    in `train.init`, and the text encoder of `train.text_init`; says so. Parts named in `may_differ` may begin anew."""
    settings = config.train
    params: dict[str, nnx.State] = {}
    if settings.init and not settings.anew:
        wanted = {name: shapes for name, shapes in modules.items() if name != "text_encoder" or not settings.text_init}
        loaded = load_modules(
            settings.init,
            wanted,
            mesh,
            expert=settings.expert,
            may_differ=may_differ,
            n_layers=config.transformer.n_layers if settings.deepen else None,
        )
        params |= loaded.params
        if loaded.params:
            say(f"starting from {', '.join(loaded.params)} of {settings.init}")
        if loaded.left_out:
            say(f"starting anew, in other shapes than its: {', '.join(loaded.left_out)}")
    if settings.text_init:
        params |= load_modules(settings.text_init, {"text_encoder": modules["text_encoder"]}, mesh).params
        say(f"starting from text_encoder of {settings.text_init}")
    return params


def levels_of(config: Config) -> LevelsConfig:
    """The levels that are learned: those of `config`, of which one of two experts has its side of the boundary."""
    levels, expert = config.levels, config.train.expert
    if not expert:
        return levels
    boundary = _boundary(find_pretrained(config.train.init), expert)
    if expert == "high":
        return dataclasses.replace(levels, low=max(levels.low, boundary))
    return dataclasses.replace(levels, high=min(levels.high, boundary))


def _boundary(path: epath.Path, expert: str) -> float:
    """The level between the two experts of a model; 1 where it has one transformer. `expert` must go with that."""
    boundary = None if is_workdir(path) else read_index(path).boundary
    if boundary is None and expert:
        raise UserError(f"train.expert={expert} needs a model folder with two experts, and {path} has one transformer")
    if boundary is not None and not expert:
        raise UserError(
            f"{path} has two experts: train.expert=high tunes the one for levels from {boundary:g} up, low the other"
        )
    return 1.0 if boundary is None else boundary


def tokenizer_of(name: str) -> Tokenizer:
    """The tokenizer of the model or run `name`; of bytes without that model's limit, as rows have one of their own."""
    path = _origin_of_text(find_pretrained(name))
    tokenizer = ByteTokenizer() if is_workdir(path) else load_tokenizer(path / "tokenizer")
    return ByteTokenizer() if isinstance(tokenizer, ByteTokenizer) else tokenizer


def _origin_of_text(path: epath.Path) -> epath.Path:
    """Where a model or run has its text encoder from: a run that kept one has it from its own `train.init`."""
    while is_workdir(path):
        config = configs.from_json((path / "config.json").read_text())
        if config.train.stage != "diffusion" or config.train.learns == "all":
            break
        path = find_pretrained(config.train.init)
    return path


def is_workdir(path: epath.PathLike) -> bool:
    path = epath.Path(path)
    return (path / "config.json").exists() and (path / "checkpoints").exists()


def workdir_of(path: epath.PathLike) -> epath.Path:
    """`path`, which must be the workdir of a run."""
    check_place(path)
    if not is_workdir(path):
        raise UserError(f"{path} is not the workdir of a run: it has no config.json and checkpoints")
    return epath.Path(path)


def load_run(workdir: epath.PathLike, mesh: Mesh | None = None) -> Run:
    """The config and the averaged parameters of the newest good checkpoint of a run, placed on `mesh` (default: one
    device). Raises `UserError` when `workdir` is no run or has no checkpoint yet."""
    workdir = workdir_of(workdir)
    config = configs.from_json((workdir / "config.json").read_text())
    mesh = mesh or sharding.make_mesh({"data": 1}, jax.local_devices()[:1])
    shapes = abstract_modules(config)
    placed = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        jax.tree.broadcast(sharding.param_shardings(shapes, mesh), shapes),
    )
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    try:
        restored = checkpoints.restore(placed, part="ema")
    finally:
        checkpoints.close()
    if restored is None:
        raise UserError(f"{workdir} has no checkpoint yet")
    return Run(config, restored.step, restored.state)


def find_pretrained(name: str) -> epath.Path:
    """The folder of a shipped model's name, of a model folder, or of a run."""
    path = find_model(name)
    if (path / INDEX).exists() or is_workdir(path):
        return path
    raise UserError(f"{name} is no shipped model, no model folder (model_index.json) and no workdir of a run")


class Loaded(NamedTuple):
    """Parameters to start from."""

    params: dict[str, nnx.State]  # by module
    left_out: list[str]  # parts that have other shapes there, "autoencoder.decoder"


def load_modules(
    name: str,
    modules: Mapping[str, Any],
    mesh: Mesh | None = None,
    *,
    expert: str = "",
    may_differ: Collection[str] = (),
    n_layers: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Loaded:
    """The parameters of these modules (given as shapes, by name) in the model or run `name`; refuses other shapes.

    Adapters are never there: they begin anew. A run that has trained only some of the modules (a text encoder that can
    read) gives these, with the text encoder that it kept; one that has none is refused. Of two experts `expert` names
    the one wanted ("high", "low"). Parts of a module named in `may_differ` are left out, each whole, where their shapes
    are not the same. With `n_layers` the transformer is made that deep (`deepen`).
    """
    path = find_pretrained(name)
    modules = {module: shapes for module, shapes in modules.items() if module != ADAPTERS}
    if "text_encoder" in modules and (origin := _origin_of_text(path)) != path:
        kept = load_modules(os.fspath(origin), {"text_encoder": modules.pop("text_encoder")}, mesh, dtype=dtype)
        options: dict[str, Any] = {"expert": expert, "may_differ": may_differ, "n_layers": n_layers, "dtype": dtype}
        rest = load_modules(name, modules, mesh, **options) if modules else Loaded({}, [])
        return Loaded(rest.params | kept.params, rest.left_out)
    if "transformer" in modules:
        _boundary(path, expert)
    loaded = load_run(path, mesh).params if is_workdir(path) else {}
    if is_workdir(path) and modules and not loaded.keys() & modules.keys():
        raise UserError(f"{path} has trained {', '.join(loaded)} and no {' or '.join(modules)}")
    result, left_out = {}, []
    for module, shapes in modules.items():
        if is_workdir(path):
            if module not in loaded:
                continue
            params = jax.tree.map(lambda leaf: leaf.astype(dtype), loaded[module])
        elif module in FOLDERS:
            folder = SECOND if module == "transformer" and expert == "low" else FOLDERS[module].folder
            params = load_component(path / folder, FOLDERS[module], mesh=mesh, dtype=dtype)[1]
        else:  # the text stage's reader belongs to no model
            continue
        if module == "transformer" and n_layers is not None:
            params = deepen(params, n_layers)
        for part in may_differ:
            if part in shapes and _shapes(params[part]) != _shapes(shapes[part]):
                params, shapes = (nnx.State({k: v for k, v in s.items() if k != part}) for s in (params, shapes))
                left_out.append(f"{module}.{part}")
        _refuse_other_shapes(path, module, params, shapes)
        result[module] = params
    return Loaded(result, left_out)


def load_autoencoder(name: str, mesh: Mesh | None = None) -> tuple[AutoencoderConfig, nnx.State]:
    """Config and parameters of the autoencoder in a model or run; with the latent statistics that a run measured."""
    path = find_pretrained(name)
    if not is_workdir(path):
        return load_component(path / AUTOENCODER.folder, AUTOENCODER, mesh=mesh)
    run = load_run(path, mesh)
    if "autoencoder" not in run.params:
        raise UserError(f"{path} has trained {', '.join(run.params)} and no autoencoder")
    config, statistics = run.config.autoencoder, path / LATENT_STATISTICS
    if statistics.exists():
        measured = json.loads(statistics.read_text())
        config = dataclasses.replace(config, latents_mean=tuple(measured["mean"]), latents_std=tuple(measured["std"]))
    return config, run.params["autoencoder"]


def _shapes(state: nnx.State) -> dict[str, tuple[int, ...]]:
    return {".".join(map(str, path)): variable.get_value().shape for path, variable in nnx.to_flat_state(state)}


def _refuse_other_shapes(path: epath.Path, module: str, params: nnx.State, shapes: nnx.State) -> None:
    ours, theirs = _shapes(shapes), _shapes(params)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            raise UserError(f"{path}: {module}.{name} is {'missing' if name in ours else 'not in this config'}")
        if theirs[name] != ours[name]:
            raise UserError(f"{path}: {module}.{name} has shape {theirs[name]}, and this config makes {ours[name]}")
