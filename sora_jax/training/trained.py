"""A run's workdir as a model: what sampling, evaluation and export take beside model folders."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from etils import epath
from flax import nnx
from jax.sharding import Mesh

from sora_jax import config as configs
from sora_jax.config import Config
from sora_jax.data.world.words import world_prompts, world_words
from sora_jax.errors import UserError
from sora_jax.models.autoencoder import AutoencoderConfig
from sora_jax.models.structure import shapes_of
from sora_jax.models.tokenizer import ByteTokenizer
from sora_jax.models.transformer import TransformerConfig
from sora_jax.training.adapters import ADAPTERS, merge_adapters, networks
from sora_jax.training.encoding import autoencoder_hash
from sora_jax.training.pretrained import (
    Run,
    abstract_modules,
    find_pretrained,
    is_workdir,
    load_autoencoder,
    load_modules,
    load_run,
    workdir_of,
)
from sora_jax.weights.defaults import SamplingDefaults, SchedulerDefaults
from sora_jax.weights.layout import ModelFolder, load_folder, read_configs


def model_of_run(workdir: epath.Path, *, mesh: Mesh | None = None, autoencoder: str = "") -> ModelFolder:
    """The averaged parameters of a diffusion run, with the autoencoder that its latents were made by, or with
    `autoencoder`, whose encoder must be that one's: a model or run whose decoder alone has learned since.

    Raises `UserError` for a run without a checkpoint, and for one that trained an autoencoder alone.
    """
    _config_of(workdir)
    run = load_run(workdir, mesh)
    config = run.config
    autoencoder_config, autoencoder_params = load_autoencoder(config.data.autoencoder, mesh)
    if autoencoder:
        ours = autoencoder_hash(autoencoder_config, autoencoder_params)
        autoencoder_config, autoencoder_params = load_autoencoder(autoencoder, mesh)
        if autoencoder_hash(autoencoder_config, autoencoder_params) != ours:
            raise UserError(
                f"{autoencoder} makes other latents than {config.data.autoencoder}, which {workdir} was trained on; "
                "give one whose decoder alone was trained since (reconstruction.train_encoder=False)"
            )
    reader = config.train.anew and _is_of_the_text_stage(config.train.init)
    if config.train.learns != "all" and not reader:
        return _tuned(run, mesh, workdir, autoencoder_config, autoencoder_params)
    facts = facts_of_run(config, run.step, workdir)
    if reader:
        facts = {"tuned from": config.train.init, **facts}
        shapes = {"text_encoder": shapes_of(networks(config)["text_encoder"])}
        text_encoder = load_modules(config.train.init, shapes, mesh).params["text_encoder"]
    else:
        text_encoder = run.params["text_encoder"]
    return ModelFolder(
        transformer_config=config.transformer,
        transformer=run.params["transformer"],
        autoencoder_config=autoencoder_config,
        autoencoder=autoencoder_params,
        text_encoder_config=config.text_encoder,
        text_encoder=text_encoder,
        # Sampling gives every prompt as many places as training rows had text.
        tokenizer=ByteTokenizer(max_length=config.data.row_text),
        scheduler=SchedulerDefaults(config.sample.solver, config.sample.shift),
        defaults=SamplingDefaults(**_sampling(config), version=f"{workdir.name}-{run.step}", card=facts),
        path=workdir,
    )


def _is_of_the_text_stage(name: str) -> bool:
    """Whether `name` is a run that has learned to read, which is no model."""
    path = find_pretrained(name)
    return is_workdir(path) and configs.from_json((path / "config.json").read_text()).train.stage == "text"


def _config_of(workdir: epath.Path) -> Config:
    """The config of a run; raises `UserError` for one that makes no videos."""
    config = configs.from_json((workdir_of(workdir) / "config.json").read_text())
    if config.train.stage != "diffusion":
        raise UserError(
            f"{workdir} has trained {' and '.join(abstract_modules(config))} alone, which makes no videos: name a run "
            "of the diffusion stage"
        )
    return config


def transformer_of_run(workdir: epath.Path) -> tuple[TransformerConfig, bool]:
    """The sizes of the transformer of `model_of_run`, and whether there are two experts: by the small files alone."""
    config = _config_of(workdir)
    if config.train.learns == "all" or config.train.anew:
        return dataclasses.replace(config.transformer, lora_rank=0), False
    base = find_pretrained(config.train.init)
    if is_workdir(base):
        return transformer_of_run(base)
    found = read_configs(base)
    return found.transformer, found.two_experts


def _tuned(
    run: Run, mesh: Mesh | None, workdir: epath.Path, autoencoder_config: AutoencoderConfig, autoencoder: nnx.State
) -> ModelFolder:
    """The model that a run kept, with the transformer that the run has tuned."""
    config = run.config
    base = find_pretrained(config.train.init)
    model = model_of_run(base, mesh=mesh) if is_workdir(base) else load_folder(base, mesh=mesh)
    place = "transformer_2" if config.train.expert == "low" else "transformer"
    if config.train.learns == "lora":
        transformer = merge_adapters(config.transformer, getattr(model, place), run.params[ADAPTERS])
    else:
        transformer = run.params["transformer"]
    facts = {"tuned from": config.train.init, **facts_of_run(config, run.step, workdir)}
    for of_base in ("words", "prompts"):  # its vocabulary has grown by words that are not known here
        facts.pop(of_base, None)
    tuned: dict[str, Any] = {place: transformer}
    defaults = model.defaults
    if config.train.anew:  # of that model there is the text encoder alone
        tuned["transformer_config"] = config.transformer
        defaults = SamplingDefaults()
    if config.train.anew or is_workdir(base):  # a run samples as its config says, an open model as its folder does
        tuned["scheduler"] = SchedulerDefaults(config.sample.solver, config.sample.shift)
        defaults = dataclasses.replace(defaults, **_sampling(config))
    return dataclasses.replace(
        model,
        **tuned,
        autoencoder_config=autoencoder_config,
        autoencoder=autoencoder,
        defaults=dataclasses.replace(defaults, version=f"{workdir.name}-{run.step}", card=facts),
        path=workdir,
    )


def _sampling(config: Config) -> dict[str, Any]:
    return {name: getattr(config.sample, name) for name in ("frames", "height", "width", "fps", "steps", "guidance")}


def facts_of_run(config: Config, step: int, workdir: epath.Path) -> dict[str, Any]:
    """What the model card says of the training: data, length, and the last validation before `step`."""
    world = config.data.source == "world"
    mix = config.data.mix
    read = {"words": list(world_words(mix)), "prompts": list(world_prompts(mix))} if world else {}
    return {
        "data": "the procedural world of sora_jax (rendered; no footage of anyone)" if world else config.data.source,
        "clips": config.data.clips,
        "steps": step,
        "batch_size": config.train.batch_size,
        "licence": "Apache-2.0" if world else "that of its training data",
        "figures": _last_validation(workdir / "metrics.jsonl", step),
        **read,  # what its captions said, for a warning when a prompt says something else
    }


def _last_validation(metrics: epath.Path, step: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    for text in metrics.read_text().splitlines() if metrics.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # a line torn by a kill
        if line.get("step", 0) <= step and "validation_loss" in line:
            figures = {name: value for name, value in line.items() if name.startswith("validation")}
    return figures
