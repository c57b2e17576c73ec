"""The config by which a model is planned: the sizes and sampling defaults of its folder, in the recipe by which the
open models are tuned."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from etils import epath

from sora_jax import config as configs
from sora_jax.bench.plan import with_size
from sora_jax.config import Config
from sora_jax.errors import UserError
from sora_jax.shapes import Extent
from sora_jax.training.pretrained import is_workdir
from sora_jax.weights.layout import INDEX, FolderConfigs, read_configs
from sora_jax.weights.original import is_original, open_original
from sora_jax.weights.shipped import HUB_CONFIGS, find_model

RECIPE = "wan_1_3b"  # its transformer learns; the text encoder is kept


def config_of_model(name: str, overrides: Sequence[str] = ()) -> Config:
    """Of a run its own config; of a model folder (of a name on the hub its configs alone are fetched) `RECIPE` in that
    model's sizes, one video of its default size in a row. Raises `UserError` for what is no model."""
    path = find_model(name, HUB_CONFIGS)
    if is_workdir(path):
        return configs.override(configs.from_json((path / "config.json").read_text()), overrides)
    found, recipe = _configs_of(path), configs.load_config(RECIPE)
    defaults, scheduler = found.defaults, found.scheduler
    told = {field: getattr(defaults, field) for field in ("frames", "height", "width", "fps", "steps", "guidance")}
    config = dataclasses.replace(
        recipe,
        autoencoder=found.autoencoder,
        transformer=dataclasses.replace(found.transformer, remat=recipe.transformer.remat),
        text_encoder=found.text_encoder,
        data=dataclasses.replace(recipe.data, autoencoder=name, fps=defaults.fps, row_text=found.tokenizer.max_length),
        levels=dataclasses.replace(recipe.levels, shift=scheduler.shift),
        train=dataclasses.replace(recipe.train, init=name, expert="high" if found.two_experts else ""),
        sample=dataclasses.replace(recipe.sample, **told, shift=scheduler.shift, solver=scheduler.solver),  # type: ignore[arg-type]
    )
    size = Extent(defaults.frames, defaults.height, defaults.width)
    return configs.override(with_size(config, found.autoencoder.stride, size, None), overrides)


def _configs_of(path: epath.Path) -> FolderConfigs:
    if (path / INDEX).exists():
        return read_configs(path)
    if is_original(path):
        return open_original(path).configs
    raise UserError(
        f"{path} is no model: it has no {INDEX}, none of the files of Wan's authors, and no run's checkpoints"
    )
