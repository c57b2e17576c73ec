"""A model by name: from the package, a folder in either layout, a run's workdir, or a hub; adapters merged into it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
from etils import epath
from jax.sharding import Mesh

from sora_jax import runtime
from sora_jax.errors import UserError
from sora_jax.models.transformer import TransformerConfig
from sora_jax.sharding import gather
from sora_jax.weights.layout import INDEX, ModelFolder, Progress
from sora_jax.weights.original import open_model
from sora_jax.weights.shipped import find_model
from sora_jax.weights.umt5 import TEXT_ENCODER
from sora_jax.weights.wan import AUTOENCODER, TRANSFORMER

EXPERTS = ("high", "low")  # of Wan 2.2 A14B: for high noise, for low noise
OFFLOADED = (TEXT_ENCODER.folder, AUTOENCODER.folder)  # what is needed before and after the steps, and not in them


def load_model(
    model: epath.PathLike,
    mesh: Mesh | None = None,
    dtype: str = "auto",
    lora: Mapping[str, float] | None = None,
    *,
    offload: bool = False,
    progress: Progress | None = None,
) -> tuple[ModelFolder, str]:
    """What `model` names, and how it calls itself. Arguments as those of `Pipeline.load`."""
    path = find_model(model)
    wanted = runtime.compute_dtype(dtype, None if mesh is None else mesh.devices.ravel().tolist())
    on_host = OFFLOADED if offload else ()
    opened = open_model(path)
    if opened is not None:
        if lora:  # what is wrong with a file of adapters should not wait for gigabytes either
            check_loras(opened.components[TRANSFORMER.folder].config, lora, two_experts=opened.two_experts)
        folder = opened.load(mesh=mesh, dtype=wanted, on_host=on_host, progress=progress)
    else:
        # all of training: slow to import, and rarely needed
        from sora_jax.training.pretrained import is_workdir
        from sora_jax.training.trained import model_of_run

        if not is_workdir(path):
            raise UserError(
                f"{path} is no model: it has no {INDEX}, none of the files of Wan's authors, and no run's checkpoints"
            )
        folder = model_of_run(path, mesh=mesh)
        if offload:
            hosted = {name: jax.tree.map(gather, getattr(folder, name)) for name in ("text_encoder", "autoencoder")}
            folder = dataclasses.replace(folder, **hosted)
    if lora:
        folder = with_loras(folder, lora)
    return folder, folder.defaults.version or path.name


def with_loras(folder: ModelFolder, lora: Mapping[str, float]) -> ModelFolder:
    """The model with adapters merged into its transformer; of two experts into both, or into the one that a name begins
    with: "high:FILE", "low:FILE"."""
    from sora_jax.weights.lora import merge_loras

    config, second = folder.transformer_config, folder.transformer_2
    of = _of_experts(lora, two_experts=second is not None)
    return dataclasses.replace(
        folder,
        transformer=merge_loras(config, folder.transformer, of["high"]),
        transformer_2=None if second is None else merge_loras(config, second, of["low"]),
    )


def check_loras(config: TransformerConfig, lora: Mapping[str, float], *, two_experts: bool) -> None:
    """Raises `UserError` for what `with_loras` would refuse, by the headers of the files alone."""
    from sora_jax.weights.lora import find_changes

    for adapters in _of_experts(lora, two_experts=two_experts).values():
        find_changes(config, adapters)


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
