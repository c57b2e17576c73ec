"""Configs: Python files that become one frozen tree of dataclasses.

A config file defines `get_config()` and returns an `ml_collections.ConfigDict` with (some of) the sections of `Config`;
what it leaves out keeps its default, or is as in the config that it names in `BASE`; single sections may be as in
another one, `LIKE = {"data.mix": "world_2"}`. It is found by name (`world`) among the configs that ship with the
package, or by path. Single values are then set by dotted key, `train.steps=1000`, and take the type of what they
replace.

    config = load_config("world", ["train.steps=1000", "optimizer.name=adamw"])

Anything that does not fit is a `UserError` of one line: an unknown key names the nearest known one, a wrong type names
what was expected and what came.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from etils import epath

from sora_jax import config_values
from sora_jax.data.world.scene import Mix
from sora_jax.diffusion.levels import LevelsConfig
from sora_jax.errors import UserError, nearest
from sora_jax.models.autoencoder import AutoencoderConfig
from sora_jax.models.text_encoder import TextEncoderConfig
from sora_jax.models.transformer import TransformerConfig
from sora_jax.training.autoencoder_step import AutoencoderLossConfig
from sora_jax.training.optimizer import OptimizerConfig
from sora_jax.training.text_step import ReadingConfig


@dataclass(frozen=True)
class DataConfig:
    """What is trained on. Sizes are in pixels and frames of the clips; rows are what the transformer sees at once."""

    source: str = "world"  # "world" (rendered on the fly), or the path or URL of a folder of videos
    latents: str = ""  # latent caches of the diffusion stage, "a,b"; "" = WORKDIR/latents, made on the first run
    autoencoder: str = "world"  # the model whose autoencoder makes the latents, and the videos of sample grids
    clips: int = 100_000  # how many clips of the world one epoch has
    held_out: int = 256  # clips kept for validation
    frames: int = 17
    height: int = 64
    width: int = 64
    sizes: tuple[tuple[int, int], ...] = ()  # of the world's clips in turn, (height, width); () = height x width alone
    shots: tuple[tuple[int, ...], ...] = ()  # of the world's clips in turn, frames of each shot; () = uncut clips alone
    mix: Mix = field(default_factory=Mix)  # how often each thing happens in the world
    fps: float = 8.0
    image_share: float = 0.3  # of the clips, cut to one frame
    prefix_share: float = 0.0  # of the clips, cut to a shorter one (diffusion stage)
    window_share: float = (
        0.0  # of the clips, without their first latent, for rolling films (needs levels.modes.rolling)
    )
    caption_dropout: float = 0.1  # of the clips, with the empty prompt, for classifier-free guidance
    shot_dropout: float = 0.0  # of the shots of cut clips, with the empty prompt
    row_tokens: int = 80  # N: tokens in a row
    row_text: int = 160  # L: text tokens in a row
    skip_long_captions: bool = False  # of a clip's captions only those that fit a row; else one too long is an error
    skip_misfits: bool = False  # leave out clips that fit no row, or have no caption that does; else one is an error
    groups: int = 5  # G: noise levels in a row
    packing: Literal["packed", "buckets"] = "packed"  # clips of any shape share a row; or a step has one shape of them
    look_ahead: int = 256  # clips that each row is chosen from
    plan_steps: int = 32  # steps planned together, so that the rows of one cost the same
    workers: int = 0  # processes that read or render batches ahead, in every stage; 0 = a thread of this one
    stalled_seconds: float = 600.0  # without a batch, after which the loader is taken for hung; 0 = never
    seed: int = 0


@dataclass(frozen=True)
class MeshConfig:
    """Length of each mesh axis within a slice; one may be -1 and takes the devices that are left."""

    data: int = -1  # rows of a batch
    fsdp: int = 1  # rows of a batch, and parameters with all that belongs to them
    tensor: int = 1  # heads, and the width of the MLP
    sequence: int = 1  # tokens of a row
    # Slices, which a slow network connects, along data and fsdp: both axes get so many times longer. -1: all slices.
    dcn_data: int = -1
    dcn_fsdp: int = 1


@dataclass(frozen=True)
class TrainConfig:
    """The run. Intervals are in steps, 0 = never."""

    stage: Literal["autoencoder", "text", "diffusion"] = "diffusion"
    steps: int = 10_000
    batch_size: int = 64  # B: rows a step in the diffusion stage, clips a step in the autoencoder stage
    accumulate: int = 1  # passes that a step takes its rows in: less memory for activations, the same loss
    seed: int = 0
    init: str = ""  # a model to start from: a shipped name, a folder or URL, a hub name, or another workdir
    text_init: str = ""  # a model or run whose text encoder is taken in place of that of `init` (diffusion stage)
    deepen: bool = False  # let `init` have fewer layers: blocks that pass their input on are put between its own
    other_latents: bool = False  # let `init` have learned on others: what reads and writes them begins anew
    learns: Literal["all", "transformer", "lora"] = "all"  # in the diffusion stage; what does not is kept as in `init`
    anew: bool = False  # let the transformer that learns start from nothing: `init` gives the text encoder alone
    expert: Literal["", "high", "low"] = ""  # which learns, where `init` has one for high noise and one for low
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations; parameters are float32
    ema: float = 0.999  # decay of the averaged parameters
    log_every: int = 50
    validate_every: int = 1000
    sample_every: int = 2000
    checkpoint_every: int = 1000
    keep: int = 3  # newest checkpoints to keep
    max_skipped: int = 8  # steps in a row with gradients that are not finite or a spike, before the run stops
    wandb: str = ""  # project at Weights & Biases that the metrics go to as well; "" = none
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "keep", "max_skipped"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} must be >= 1, not {getattr(self, name)}")
        for name in ("log_every", "validate_every", "sample_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} must be >= 0 (0 = never), not {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise UserError(f"train.ema must be in [0, 1), not {self.ema}")
        if self.learns != "all" and not self.init:
            raise UserError(f"train.learns={self.learns} keeps the rest of a model as it is: name it in train.init")
        if self.deepen and (self.learns != "all" or not self.init):
            raise UserError(
                "train.deepen makes the model of train.init deeper, and all of it learns then: name a model"
            )
        if self.other_latents and (self.stage != "diffusion" or not self.init or self.anew or self.learns == "lora"):
            raise UserError(
                "train.other_latents keeps the blocks of the transformer of train.init for other latents: name a "
                "model, and let its transformer learn (train.learns=all or transformer, without train.anew)"
            )
        if self.anew and (self.learns != "transformer" or self.expert):
            raise UserError(
                "train.anew starts one transformer from nothing beside a text encoder that is kept: set train.learns="
                "transformer and no train.expert"
            )
        if self.text_init and (self.stage != "diffusion" or self.learns != "all"):
            raise UserError(
                "train.text_init names the text encoder to start from where it learns on beside the transformer: set "
                "train.stage=diffusion and train.learns=all"
            )
        if self.learns == "all" and self.expert:
            raise UserError(f"train.expert={self.expert} tunes one of two: set train.learns to transformer or lora")


@dataclass(frozen=True)
class SampleConfig:
    """How videos are sampled when nothing else is said; sample grids in training use it too."""

    steps: int = 30
    guidance: float = 4.0
    shift: float = 1.0
    solver: Literal["unipc", "dpmpp_2m", "euler", "heun"] = "unipc"
    frames: int = 17
    height: int = 64
    width: int = 64
    fps: float = 8.0
    prompts: tuple[str, ...] = ("a red ball bounces on a blue floor",)  # of the sample grid
    seed: int = 0


@dataclass(frozen=True)
class Config:
    """Everything a run is made of."""

    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reconstruction: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    reading: ReadingConfig = field(default_factory=ReadingConfig)
    levels: LevelsConfig = field(default_factory=LevelsConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        if self.data.window_share > 0 and self.levels.modes.rolling <= 0:
            raise UserError(
                f"data.window_share={self.data.window_share} makes windows that begin inside a span, which are trained "
                "at rising levels alone: give levels.modes.rolling a weight"
            )
        if (self.train.learns == "lora") != bool(self.transformer.lora_rank):
            raise UserError(
                f"train.learns={self.train.learns} and transformer.lora_rank={self.transformer.lora_rank}: adapters "
                "that learn have a rank of at least 1, and others none"
            )


# What may differ between a run and its continuation: how long, how often, on which devices, and what is only shown.
FREE_ON_RESUME = (
    "train.steps",
    "train.log_every",
    "train.validate_every",
    "train.sample_every",
    "train.checkpoint_every",
    "train.keep",
    "train.max_skipped",
    "train.wandb",
    "train.accumulate",
    "train.mesh.",
    "optimizer.spike_sigmas",
    "data.workers",
    "data.stalled_seconds",
    "sample.",
)


# ------------------------------------------------------------------------------------------------------ find and load


def shipped_configs() -> dict[str, Path]:
    """The files of the configs that come with the package, by name: inside it in a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.py"))}
    return {}


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """The config of that name or file, with `overrides` ("train.steps=1000") applied in order."""
    return override(from_dict(_read_file(_find(name_or_path))), overrides)


def _find(name_or_path: str) -> epath.Path:
    known = shipped_configs()
    if name_or_path in known:
        return epath.Path(known[name_or_path])
    path = epath.Path(name_or_path)
    if name_or_path.endswith(".py") and path.exists():
        return path
    if name_or_path.endswith(".py") or "/" in name_or_path:
        raise UserError(
            f"config {name_or_path} is not there: give the path of a .py file, or one of {', '.join(known)}"
        )
    raise UserError(f'unknown config "{name_or_path}": {nearest(name_or_path, known)}, or the path of a .py file')


def _read_file(path: epath.Path) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    try:
        exec(compile(path.read_text(), str(path), "exec", dont_inherit=True), namespace)
        values = namespace["get_config"]().to_dict()
    except KeyError as error:
        if error.args != ("get_config",):
            raise UserError(f"config {path} cannot be read: {error!r}") from error
        raise UserError(f"config {path} defines no get_config()") from None
    except Exception as error:
        raise UserError(f"config {path} cannot be read: {type(error).__name__}: {error}") from error
    base = _read_named(path, "BASE", namespace["BASE"]) if "BASE" in namespace else {}
    for key, name in namespace.get("LIKE", {}).items():
        *parents, last = key.split(".")
        here, there = base, _read_named(path, "LIKE", name)
        for parent in parents:
            here, there = here.setdefault(parent, {}), there.get(parent, {})
        if not isinstance(there.get(last), dict):
            raise UserError(f"config {path} wants {key} as in {name}, which has no such section")
        here[last] = there[last]
    return _over(base, values)


def _read_named(path: epath.Path, word: str, name: str) -> dict[str, Any]:
    """The values of the config that the one at `path` names."""
    found = _find(name)
    if found == path:
        raise UserError(f"config {path} names itself as its {word}")
    return _read_file(found)


def _over(base: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `values` in place of its own, section by section."""
    nested = {name: _over(base[name], value) for name, value in values.items() if isinstance(base.get(name), dict)}
    return {**base, **values, **nested}


def from_dict(values: Mapping[str, Any]) -> Config:
    """The config with these (nested) values, defaults elsewhere; checks every key and type."""
    return config_values.build(Config, values)


def override(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with each "dotted.key=value" set; a value is read as the type of what it replaces."""
    values = to_dict(config)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"override {text!r} has no value: write {key}=VALUE")
        config_values.set_value(Config, values, key, value)
    return from_dict(values)


# -------------------------------------------------------------------------------------------------------- to and from


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dicts of plain values; `from_dict` gives the config back."""
    return dataclasses.asdict(config)


def to_json(config: Config) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    return from_dict(json.loads(text))


def difference(old: Config, new: Config, free: Sequence[str] = ()) -> list[str]:
    """One line for each value that differs, "key: old -> new", except for keys that start with one of `free`."""
    before, after = dict(_leaves(to_dict(old))), dict(_leaves(to_dict(new)))
    return [
        f"{key}: {before[key]!r} -> {after[key]!r}"
        for key in before
        if before[key] != after[key] and not key.startswith(tuple(free))
    ]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
