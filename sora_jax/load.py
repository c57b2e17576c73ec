"""A model by name: from the package, a folder in either layout, a run's workdir, or a hub; adapters merged into it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh

from sora_jax import runtime
from sora_jax.errors import UserError
from sora_jax.models.transformer import TransformerConfig
from sora_jax.sharding import gather
from sora_jax.weights.layout import INDEX, ModelFolder, Progress
from sora_jax.weights.lora import Changes, LiveLoras, check_live, find_changes, live_config, merge_loras
from sora_jax.weights.original import open_model
from sora_jax.weights.shipped import find_model
from sora_jax.weights.umt5 import TEXT_ENCODER
from sora_jax.weights.wan import AUTOENCODER

EXPERTS = ("high", "low")  # of Wan 2.2 A14B: for high noise, for low noise
OFFLOADED = (TEXT_ENCODER.folder, AUTOENCODER.folder)  # what is needed before and after the steps, and not in them


class LoadedModel(NamedTuple):
    """A model, and what it calls itself."""

    folder: ModelFolder
    name: str
    live: LiveAdapters | None  # those that are in `folder` beside the kernels


def load_model(
    model: epath.PathLike,
    mesh: Mesh | None = None,
    dtype: str = "auto",
    lora: Mapping[str, float] | None = None,
    *,
    lora_live: bool = False,
    offload: bool = False,
    progress: Progress | None = None,
) -> LoadedModel:
    """What `model` names. Arguments as those of `Pipeline.load`."""
    if lora_live and not lora:
        raise UserError("lora_live (--lora-live) is about the files of lora (--lora): name one, or leave it out")
    path = find_model(model)
    wanted = runtime.compute_dtype(dtype, None if mesh is None else mesh.devices.ravel().tolist())
    on_host = OFFLOADED if offload else ()
    opened = open_model(path)
    if opened is not None:
        if lora:  # what is wrong with a file of adapters should not wait for gigabytes either
            check_loras(opened.configs.transformer, opened.two_experts, lora, live=lora_live)
        folder = opened.load(mesh=mesh, dtype=wanted, on_host=on_host, progress=progress)
    else:
        # all of training: slow to import, and rarely needed
        from sora_jax.training.pretrained import is_workdir
        from sora_jax.training.trained import model_of_run, transformer_of_run

        if not is_workdir(path):
            raise UserError(
                f"{path} is no model: it has no {INDEX}, none of the files of Wan's authors, and no run's checkpoints"
            )
        if lora:
            check_loras(*transformer_of_run(path), lora, live=lora_live)
        folder = model_of_run(path, mesh=mesh)
        if offload:
            hosted = {name: jax.tree.map(gather, getattr(folder, name)) for name in ("text_encoder", "autoencoder")}
            folder = dataclasses.replace(folder, **hosted)
    name, live = folder.defaults.version or path.name, None
    if lora and lora_live:
        live = LiveAdapters(folder, lora, mesh)
        folder = live.beside(folder, lora)
    elif lora:
        folder = with_loras(folder, lora)
    return LoadedModel(folder, name, live)


# --- adapters ------------------------------------------------------------------------------------------------------


def with_loras(folder: ModelFolder, lora: Mapping[str, float]) -> ModelFolder:
    """The model with adapters merged into its transformer; of two experts into both, or into the one that a name begins
    with: "high:FILE", "low:FILE"."""
    config, second = folder.transformer_config, folder.transformer_2
    of = _of_experts(lora, two_experts=second is not None)
    return dataclasses.replace(
        folder,
        transformer=merge_loras(config, folder.transformer, of["high"]),
        transformer_2=None if second is None else merge_loras(config, second, of["low"]),
    )


class LiveAdapters:
    """Adapters beside the kernels of a model: of two experts of both, or of the one that a name begins with. Both have
    the same config, and so the same program."""

    def __init__(self, folder: ModelFolder, lora: Mapping[str, float], mesh: Mesh | None):
        plain = folder.transformer_config
        changes = check_loras(plain, folder.transformer_2 is not None, lora, live=True)
        self._config = live_config(plain, changes.values())
        self._of = {expert: LiveLoras(self._config, found, mesh) for expert, found in changes.items()}

    def beside(self, folder: ModelFolder, lora: Mapping[str, float]) -> ModelFolder:
        """The model, with adapters or without, with the files of `lora`, which are those it was made with, at their
        weights."""
        second = folder.transformer_2
        of = _of_experts(lora, two_experts=second is not None)
        return dataclasses.replace(
            folder,
            transformer_config=self._config,
            transformer=self._of["high"].beside(folder.transformer, of["high"]),
            transformer_2=None if second is None else self._of["low"].beside(second, of["low"]),
        )


def check_loras(
    config: TransformerConfig, two_experts: bool, lora: Mapping[str, float], *, live: bool
) -> dict[str, Changes]:
    """What the files change, by expert. Raises `UserError` for what `with_loras` or `LiveAdapters` would refuse, by the
    headers of the files alone."""
    of = _of_experts(lora, two_experts=two_experts)
    changes = {expert: find_changes(config, adapters) for expert, adapters in of.items()}
    if live:
        for found in changes.values():
            check_live(found)
    return changes


def _of_experts(lora: Mapping[str, float], *, two_experts: bool) -> dict[str, dict[str, float]]:
    """Files and weights by the expert that they are for."""
    of: dict[str, dict[str, float]] = {expert: {} for expert in EXPERTS}
    for name, weight in lora.items():
        expert, _, file = name.partition(":")
        if expert not in EXPERTS:
            for adapters in of.values():
                adapters[name] = weight
        elif not two_experts:
            raise UserError(f"LoRA {name} is for one of two experts, and this model has one transformer: name {file}")
        else:
            of[expert][file] = weight
    return of
