"""A model as a folder, in the layout of `diffusers`; one format for our own weights and the open ones.

    model_index.json                        what the folder holds
    transformer/ vae/ text_encoder/         config.json and safetensors each, in their names and axes (see `table`)
    transformer_2/                          the expert for low noise, where there are two (Wan 2.2 A14B)
    tokenizer/tokenizer_config.json         ByT5's; or UMT5's, with its tokenizer.json
    scheduler/scheduler_config.json         solver and shift
    sora_jax.json                           ours, optional: sampling defaults and facts for the model card; without it
                                            the model is an open one, and its defaults are in `known`
    README.md                               the model card, optional

No torch is needed for either direction.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from sora_jax.errors import UserError
from sora_jax.models.autoencoder import AutoencoderConfig
from sora_jax.models.text_encoder import TextEncoderConfig
from sora_jax.models.tokenizer import ByteTokenizer, SubwordTokenizer, Tokenizer
from sora_jax.models.transformer import TransformerConfig
from sora_jax.weights.component import FORMAT_VERSION, CheckedComponent, open_component, read_config, save_component
from sora_jax.weights.defaults import SCHEDULERS, SamplingDefaults, SchedulerDefaults
from sora_jax.weights.files import new_folder, parse_json, read_json, read_text, write_json
from sora_jax.weights.known import known_defaults
from sora_jax.weights.umt5 import TEXT_ENCODER
from sora_jax.weights.wan import AUTOENCODER, TRANSFORMER

INDEX = "model_index.json"
SECOND = "transformer_2"
OURS = "sora_jax.json"
FAMILIES = (TRANSFORMER, AUTOENCODER, TEXT_ENCODER)
MOST_SPARE = 1024  # ids of a text encoder that its tokenizer does not make: UMT5's 84 round its rows up
Progress = Callable[[str, int, int], None]
"""`progress(stage, done, total)`: bytes of "load", steps of "denoise", frames of "decode"."""


@dataclass(frozen=True)
class ModelFolder:
    """Everything a folder holds. Parameters are what `nnx.merge(graphdef, params)` takes, split with `graph=False`."""

    transformer_config: TransformerConfig
    transformer: nnx.State
    autoencoder_config: AutoencoderConfig
    autoencoder: nnx.State
    text_encoder_config: TextEncoderConfig
    text_encoder: nnx.State
    tokenizer: Tokenizer = field(default_factory=ByteTokenizer)
    scheduler: SchedulerDefaults = field(default_factory=SchedulerDefaults)
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    path: epath.Path | None = None  # where it was loaded from
    transformer_2: nnx.State | None = None  # the expert for levels below `boundary`, of the same config
    boundary: float | None = None

    def __post_init__(self) -> None:
        check_fit(self.transformer_config, self.autoencoder_config, self.text_encoder_config, self.tokenizer)


def check_fit(
    transformer: TransformerConfig,
    autoencoder: AutoencoderConfig,
    text_encoder: TextEncoderConfig,
    tokenizer: Tokenizer,
) -> None:
    """Raises `UserError` for parts that are not of one model."""
    if transformer.text_dim != text_encoder.d_model:
        raise UserError(
            f"the transformer reads text of width {transformer.text_dim}, the text encoder makes {text_encoder.d_model}"
        )
    if transformer.out_channels != autoencoder.z_dim:
        raise UserError(
            f"the transformer makes latents of {transformer.out_channels} channels, "
            f"the autoencoder reads {autoencoder.z_dim}"
        )
    spare = text_encoder.vocab_size - tokenizer.vocab_size
    if not 0 <= spare < MOST_SPARE:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the text encoder knows {text_encoder.vocab_size}: "
            "it is another model's"
        )


# --- loading -------------------------------------------------------------------------------------------------------


class FolderConfigs(NamedTuple):
    """What the small files of a folder say."""

    transformer: TransformerConfig
    autoencoder: AutoencoderConfig
    text_encoder: TextEncoderConfig
    tokenizer: Tokenizer
    scheduler: SchedulerDefaults
    defaults: SamplingDefaults
    two_experts: bool


@dataclass(frozen=True)
class CheckedFolder:
    """A model whose files are all there and fit each other; not one tensor of them has been read. Raises `UserError`
    for parts that do not."""

    path: epath.Path
    components: Mapping[str, CheckedComponent]  # by folder, "transformer_2" where there are two experts
    tokenizer: Tokenizer
    scheduler: SchedulerDefaults
    defaults: SamplingDefaults
    boundary: float | None

    def __post_init__(self) -> None:
        try:
            check_fit(*self.configs[:4])
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None

    @property
    def two_experts(self) -> bool:
        return SECOND in self.components

    @property
    def configs(self) -> FolderConfigs:
        transformer, autoencoder, text_encoder = (self.components[family.folder].config for family in FAMILIES)
        files = (self.tokenizer, self.scheduler, self.defaults)
        return FolderConfigs(transformer, autoencoder, text_encoder, *files, self.two_experts)

    def load(
        self,
        *,
        mesh: Mesh | None = None,
        dtype: DTypeLike | None = jnp.float32,
        on_host: Collection[str] = (),
        progress: Progress | None = None,
    ) -> ModelFolder:
        """The model; arguments as those of `load_folder`."""
        hosted = {*on_host, TRANSFORMER.folder, SECOND} if self.two_experts else {*on_host}
        params = load_all(self.components, hosted, mesh=mesh, dtype=dtype, progress=progress)
        return ModelFolder(
            self.components[TRANSFORMER.folder].config,
            params[TRANSFORMER.folder],
            self.components[AUTOENCODER.folder].config,
            params[AUTOENCODER.folder],
            self.components[TEXT_ENCODER.folder].config,
            params[TEXT_ENCODER.folder],
            self.tokenizer,
            self.scheduler,
            self.defaults,
            self.path,
            params.get(SECOND),
            self.boundary,
        )


def load_folder(
    path: epath.PathLike,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = jnp.float32,
    on_host: Collection[str] = (),
    progress: Progress | None = None,
) -> ModelFolder:
    """Read a model folder; `mesh` and `dtype` as in `CheckedComponent.load`. Components named in `on_host`
    ("text_encoder", "vae") stay there, and so do the transformers where there are two. `progress` is called with
    "load", the bytes read so far, and those of all.

    Raises `UserError`, naming file and tensor, for anything in it that is missing, damaged or not supported: before
    the first tensor is read.
    """
    return open_folder(path).load(mesh=mesh, dtype=dtype, on_host=on_host, progress=progress)


def open_folder(path: epath.PathLike) -> CheckedFolder:
    """What `load_folder` loads; raises as it does."""
    path = epath.Path(path)
    if not (path / INDEX).exists():
        raise UserError(f"{path} is not a model folder: it has no {INDEX}")
    index = read_index(path)
    found = read_configs(path)  # the small files first: what they have to say should not wait for gigabytes
    opened = {family.folder: open_component(path / family.folder, family) for family in FAMILIES}
    if index.two_experts:
        opened[SECOND] = open_component(path / SECOND, TRANSFORMER)
        if opened[SECOND].config != found.transformer:
            raise UserError(f"{path}: transformer and transformer_2 have different configs")
    return CheckedFolder(path, opened, found.tokenizer, found.scheduler, found.defaults, index.boundary)


def read_configs(path: epath.Path) -> FolderConfigs:
    """What the folder's small files say; its weights need not be there. Raises `UserError` as `load_folder`."""
    index = read_index(path)
    tokenizer = load_tokenizer(path / "tokenizer")
    scheduler = parse_json(path / "scheduler" / "scheduler_config.json", SchedulerDefaults.from_dict)
    defaults = parse_json(path / OURS, SamplingDefaults.from_dict) if (path / OURS).exists() else None
    transformer, autoencoder, text_encoder = (
        read_config(path / family.folder / "config.json", family) for family in FAMILIES
    )
    known = known_defaults(transformer, index.two_experts, takes_frames=index.levels_per_token)
    files = (tokenizer, scheduler, defaults or known)
    return FolderConfigs(transformer, autoencoder, text_encoder, *files, index.two_experts)


def load_all(
    opened: Mapping[str, CheckedComponent],
    hosted: Collection[str],
    *,
    mesh: Mesh | None,
    dtype: DTypeLike | None,
    progress: Progress | None,
) -> dict[str, nnx.State]:
    """The parameters of components that have all been checked, by name; those in `hosted` stay on the host."""
    done, total = 0, sum(component.bytes for component in opened.values())

    def tell(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress("load", done, total)

    return {
        name: component.load(mesh=mesh, dtype=dtype, on_host=name in hosted, progress=tell)
        for name, component in opened.items()
    }


class Index(NamedTuple):
    """What model_index.json says beside the classes."""

    two_experts: bool
    boundary: float | None
    levels_per_token: bool


def read_index(path: epath.Path) -> Index:
    """Raises `UserError`, naming what is supported, for a pipeline or a component that is not."""
    index = read_json(path / INDEX)
    if (name := index.get("_class_name")) != "WanPipeline":
        raise UserError(f'{path / INDEX} describes a "{name}"; known: WanPipeline (text to video of Wan 2.1 and 2.2)')

    def class_of(folder: str) -> Any:
        entry = index.get(folder)  # [library, class], or nothing
        return entry[1] if isinstance(entry, list) and len(entry) == 2 else entry or None

    for family in FAMILIES:
        if (found := class_of(family.folder)) != family.name:
            raise UserError(f'{path / INDEX} has "{found}" as {family.folder}, not {family.name}')
    second = class_of(SECOND)
    if second not in (None, TRANSFORMER.name):
        raise UserError(f'{path / INDEX} has "{second}" as {SECOND}, not {TRANSFORMER.name}')
    boundary = index.get("boundary_ratio")
    if (second is None) != (boundary is None):
        raise UserError(
            f"{path / INDEX}: {SECOND} and boundary_ratio, the level it begins at, go together; one is missing"
        )
    if boundary is not None and not (isinstance(boundary, float | int) and 0 <= boundary <= 1):
        raise UserError(f"{path / INDEX}: boundary_ratio must lie in [0, 1], not {boundary!r}")
    return Index(second is not None, boundary, bool(index.get("expand_timesteps")))


def load_tokenizer(folder: epath.Path) -> Tokenizer:
    """The tokenizer in `folder`: tokenizer_config.json and, for one of pieces, tokenizer.json."""
    values = read_json(folder / "tokenizer_config.json")
    if values.get("tokenizer_class") == "ByT5Tokenizer":
        return parse_json(folder / "tokenizer_config.json", ByteTokenizer.from_dict)
    pieces = folder / "tokenizer.json"
    if not pieces.exists():
        kind = values.get("tokenizer_class")
        raise UserError(
            f'{folder / "tokenizer_config.json"} describes a "{kind}", and tokenizer.json, its pieces, is missing'
        )
    try:
        return SubwordTokenizer.from_files(read_text(pieces), values)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


# --- saving --------------------------------------------------------------------------------------------------------


def save_folder(
    path: epath.PathLike,
    model: ModelFolder,
    *,
    dtype: str = "float32",
    card: str | None = None,
    overwrite: bool = False,
) -> epath.Path:
    """Write `model` as a folder that `load_folder` and `diffusers` read; `card` becomes its README.md.

    `dtype` is "float32" or "bfloat16". The folder appears whole or not at all; one that is there is kept, and is a
    `UserError`, unless `overwrite`. So is a model whose adapters lie beside its kernels.
    """
    path = epath.Path(path)
    if model.transformer_config.lora_rank:
        raise UserError(
            "a model with live adapters has no place for them in a folder of this layout: load it without lora_live "
            "(--lora-live), which merges them into its kernels, and save that"
        )
    with new_folder(path, marker=INDEX, overwrite=overwrite) as folder:
        for family, config, params in (
            (TRANSFORMER, model.transformer_config, model.transformer),
            (AUTOENCODER, model.autoencoder_config, model.autoencoder),
            (TEXT_ENCODER, model.text_encoder_config, model.text_encoder),
        ):
            save_component(folder / family.folder, family, config, params, dtype=dtype)
        if model.transformer_2 is not None:
            save_component(folder / SECOND, TRANSFORMER, model.transformer_config, model.transformer_2, dtype=dtype)
        save_tokenizer(folder / "tokenizer", model.tokenizer)
        (folder / "scheduler").mkdir(exist_ok=True)
        write_json(folder / "scheduler" / "scheduler_config.json", model.scheduler.to_dict())
        write_json(folder / OURS, model.defaults.to_dict())
        if card is not None:
            (folder / "README.md").write_text(card)
        write_json(folder / INDEX, _index(model))  # last: a folder without it is no model folder
    return path


def save_tokenizer(folder: epath.Path, tokenizer: Tokenizer) -> None:
    """Write what `load_tokenizer` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tokenizer_config.json", tokenizer.to_dict())
    if isinstance(tokenizer, SubwordTokenizer):
        (folder / "tokenizer.json").write_text(tokenizer.definition)


def _index(model: ModelFolder) -> dict[str, Any]:
    byte = isinstance(model.tokenizer, ByteTokenizer)
    two = model.transformer_2 is not None
    return {
        "_class_name": "WanPipeline",
        "_diffusers_version": FORMAT_VERSION,
        "boundary_ratio": model.boundary,
        # Of Wan 2.2 TI2V: `diffusers` then tells the model the level of every token.
        "expand_timesteps": model.defaults.takes_frames and not byte,
        "scheduler": ["diffusers", SCHEDULERS[model.scheduler.solver][0]],
        "tokenizer": ["transformers", "ByT5Tokenizer" if byte else "T5TokenizerFast"],
        SECOND: [TRANSFORMER.library, TRANSFORMER.name] if two else [None, None],
        **{family.folder: [family.library, family.name] for family in FAMILIES},
    }
