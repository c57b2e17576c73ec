"""The files that Wan's authors publish (github.com/Wan-Video), with their names for the same tensors.

    config.json  diffusion_pytorch_model*.safetensors       the transformer; of 2.2 A14B in high_noise_model/ and
                                                            low_noise_model/
    models_t5_umt5-xxl-enc-bf16.pth                         UMT5-XXL, and google/umt5-xxl/tokenizer.json
    Wan2.1_VAE.pth  or  Wan2.2_VAE.pth                      the autoencoder

The tables are those of the `diffusers` names, renamed. What we write ends in .safetensors throughout.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from jax.typing import DTypeLike

from sora_jax.errors import UserError
from sora_jax.models.autoencoder import AutoencoderConfig
from sora_jax.models.text_encoder import TextEncoderConfig
from sora_jax.models.tokenizer import SubwordTokenizer
from sora_jax.models.transformer import TransformerConfig
from sora_jax.weights.component import check_component, save_params
from sora_jax.weights.defaults import SchedulerDefaults
from sora_jax.weights.files import new_folder, parse_json, read_json, read_text, write_json
from sora_jax.weights.known import known_defaults
from sora_jax.weights.layout import INDEX, SECOND, CheckedFolder, ModelFolder, Progress, open_folder, save_tokenizer
from sora_jax.weights.safetensors_io import StoredTensor, read_header, read_headers
from sora_jax.weights.table import Family, Row
from sora_jax.weights.torch_file import read_torch_file
from sora_jax.weights.umt5 import TEXT_ENCODER
from sora_jax.weights.wan import AUTOENCODER, TRANSFORMER

CONFIG = "config.json"
EXPERTS = ("high_noise_model", "low_noise_model")
TOKENIZER = "google/umt5-xxl"
BOUNDARY = 0.875  # of A14B text to video, whose files do not hold it

# --- names ---------------------------------------------------------------------------------------------------------

Renaming = tuple[tuple[str, str], ...]

TRANSFORMER_NAMES: Renaming = (
    (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"\.scale_shift_table$", ".modulation"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"\.norm2\.", ".norm3."),  # the affine norm before cross-attention
)

TEXT_ENCODER_NAMES: Renaming = (
    (r"^shared\.", "token_embedding."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"^encoder\.block\.", "blocks."),
    (r"\.layer\.0\.layer_norm\.", ".norm1."),
    (r"\.layer\.1\.layer_norm\.", ".norm2."),
    (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
    (r"\.layer\.0\.SelfAttention\.", ".attn."),
    (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
    (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."),
    (r"\.layer\.1\.DenseReluDense\.wo\.", ".ffn.fc2."),
)

AUTOENCODER_NAMES: Renaming = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.norm1\.", ".residual.0."),
    (r"(middle\.\d|samples\.\d+)\.conv1\.", r"\1.residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"(middle\.\d|samples\.\d+)\.conv2\.", r"\1.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
)


def _autoencoder_levels(config: AutoencoderConfig) -> Renaming:
    """Levels come first, since what is inside a block is renamed by where it lies."""
    down, up = config.num_res_blocks, config.num_res_blocks + 1
    if config.is_residual:
        return (
            (r"^encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r"encoder.downsamples.\1.downsamples.\2."),
            (r"^encoder\.down_blocks\.(\d+)\.downsampler\.", rf"encoder.downsamples.\1.downsamples.{down}."),
            (r"^decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.", r"decoder.upsamples.\1.upsamples.\2."),
            (r"^decoder\.up_blocks\.(\d+)\.upsampler\.", rf"decoder.upsamples.\1.upsamples.{up}."),
        )
    levels = range(len(config.dim_mult))
    blocks = [
        (rf"^decoder\.up_blocks\.{i}\.resnets\.{n}\.", f"decoder.upsamples.{i * (up + 1) + n}.")
        for i in levels
        for n in range(up)
    ]
    ends = [(rf"^decoder\.up_blocks\.{i}\.upsamplers\.0\.", f"decoder.upsamples.{i * (up + 1) + up}.") for i in levels]
    return ((r"^encoder\.down_blocks\.", "encoder.downsamples."), *blocks, *ends)


def _renamed(family: Family, names: Callable[[Any], Renaming]) -> Family:
    def table(config: Any) -> Sequence[Row]:
        rules = [(re.compile(pattern), to) for pattern, to in names(config)]

        def rename(name: str) -> str:
            for pattern, to in rules:
                name = pattern.sub(to, name)
            return name

        return [dataclasses.replace(row, theirs=rename(row.theirs), also=()) for row in family.table(config)]

    return dataclasses.replace(family, table=table)


ORIGINAL_TRANSFORMER = _renamed(TRANSFORMER, lambda config: TRANSFORMER_NAMES)
ORIGINAL_TEXT_ENCODER = _renamed(TEXT_ENCODER, lambda config: TEXT_ENCODER_NAMES)
ORIGINAL_AUTOENCODER = _renamed(AUTOENCODER, lambda config: (*_autoencoder_levels(config), *AUTOENCODER_NAMES))

# --- configs -------------------------------------------------------------------------------------------------------

# fmt: off
MEAN_21 = (-.7571, -.7089, -.9113, .1075, -.1745, .9653, -.1517, 1.5508, .4134, -.0715, .5517, -.3632, -.1922, -.9497,
           .2503, -.2921)
STD_21 = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382,
          1.1253, 2.8251, 1.9160)
MEAN_22 = (-.2289, -.0052, -.1323, -.2339, -.2799, .0174, .1838, .1557, -.1382, .0542, .2813, .0891, .1570, -.0098,
           .0375, -.1825, -.2246, -.1207, -.0698, .5109, .2665, -.2108, -.2158, .2502, -.2055, -.0322, .1109, .1567,
           -.0729, .0899, -.2799, -.1230, -.0313, -.1649, .0117, .0723, -.2839, -.2083, -.0520, .3748, .0152, .1957,
           .1433, -.2944, .3573, -.0548, -.1681, -.0667)
STD_22 = (.4765, 1.0364, .4514, 1.1677, .5313, .4990, .4818, .5013, .8158, 1.0344, .5894, 1.0901, .6885, .6165, .8454,
          .4978, .5759, .3523, .7135, .6804, .5833, 1.4146, .8986, .5659, .7069, .5338, .4889, .4917, .4069, .4999,
          .6866, .4093, .5709, .6065, .6415, .4944, .5726, 1.2042, .5458, 1.6887, .3971, 1.0600, .3943, .5537, .5444,
          .4089, .7468, .7744)
# fmt: on

AUTOENCODERS = {  # by the stem of the file, which holds no config
    "Wan2.1_VAE": AutoencoderConfig(latents_mean=MEAN_21, latents_std=STD_21),
    "Wan2.2_VAE": AutoencoderConfig(
        base_dim=160,
        decoder_base_dim=256,
        z_dim=48,
        is_residual=True,
        patch_size=2,
        latents_mean=MEAN_22,
        latents_std=STD_22,
    ),
}

KEYS = {
    "ffn_dim": "ffn_dim",
    "freq_dim": "frequency_dim",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "num_heads": "n_heads",
    "num_layers": "n_layers",
    "eps": "eps",
}


def read_config(values: Mapping[str, Any]) -> TransformerConfig:
    """From the config.json of a `WanModel`; raises `UserError` for one that takes more than text."""
    if (kind := values.get("model_type", "t2v")) not in ("t2v", "ti2v"):
        raise UserError(f'model_type "{kind}" is not supported; known: t2v, ti2v')
    for key in ("dim", *KEYS):
        if key not in values:
            raise UserError(f'it lacks "{key}"')
    if not values["num_heads"] or values["dim"] % values["num_heads"]:
        raise UserError(f"dim {values['dim']} is not shared evenly by num_heads {values['num_heads']}")
    sizes = {ours: values[theirs] for theirs, ours in KEYS.items()}
    text_dim = values.get("text_dim", TransformerConfig.text_dim)
    config = TransformerConfig(head_dim=values["dim"] // values["num_heads"], text_dim=text_dim, **sizes)
    if config.in_channels != config.out_channels:
        raise UserError(
            f"{config.in_channels} channels in and {config.out_channels} out: image to video, not supported"
        )
    return config


def write_config(config: TransformerConfig, takes_frames: bool) -> dict[str, Any]:
    sizes = {theirs: getattr(config, ours) for theirs, ours in KEYS.items()}
    kind = "ti2v" if takes_frames else "t2v"
    values = {"_class_name": "WanModel", "dim": config.dim, "model_type": kind, "text_len": 512, **sizes}
    return values if config.text_dim == TransformerConfig.text_dim else values | {"text_dim": config.text_dim}


# --- folders -------------------------------------------------------------------------------------------------------


def is_original(path: epath.Path) -> bool:
    if (path / EXPERTS[0] / CONFIG).exists():
        return True
    return (path / CONFIG).exists() and read_json(path / CONFIG).get("_class_name") == "WanModel"


def open_model(path: epath.Path) -> CheckedFolder | None:
    """The model folder at `path`, in either layout, checked; None where there is none."""
    if (path / INDEX).exists():
        return open_folder(path)
    return open_original(path) if is_original(path) else None


def load_original(
    path: epath.Path,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = jnp.float32,
    on_host: Collection[str] = (),
    progress: Progress | None = None,
) -> ModelFolder:
    """A folder of the authors' files; arguments as those of `load_folder`. Raises `UserError` as it does."""
    return open_original(path).load(mesh=mesh, dtype=dtype, on_host=on_host, progress=progress)


def open_original(path: epath.Path) -> CheckedFolder:
    """What `load_original` loads; raises as it does."""
    folders = [path / name for name in EXPERTS] if (path / EXPERTS[0]).exists() else [path]
    configs = [parse_json(folder / CONFIG, read_config) for folder in folders]
    if configs[0] != configs[-1]:
        raise UserError(f"{path}: {EXPERTS[0]} and {EXPERTS[1]} have different configs")
    takes_frames = read_json(folders[0] / CONFIG).get("model_type") == "ti2v"
    pieces = path / TOKENIZER / "tokenizer.json"
    if not pieces.exists():
        raise UserError(f"{pieces} is missing: it holds the vocabulary of UMT5")
    settings = pieces.parent / "tokenizer_config.json"
    tokenizer = SubwordTokenizer.from_files(read_text(pieces), read_json(settings) if settings.exists() else {})
    autoencoder_file = _only(path, [f"{stem}.*" for stem in AUTOENCODERS], "the autoencoder")
    text_file = _only(path, ["models_t5_*"], "the text encoder")
    text_tensors = _tensors(text_file)
    text_config = text_encoder_config(text_tensors, text_file)

    autoencoder_config = AUTOENCODERS[autoencoder_file.stem]
    two = len(folders) == 2
    opened = {
        name: check_component(ORIGINAL_TRANSFORMER, config, read_headers(folder, TRANSFORMER.stem), folder)
        for name, folder, config in zip((TRANSFORMER.folder, SECOND), folders, configs, strict=False)
    }
    opened[AUTOENCODER.folder] = check_component(
        ORIGINAL_AUTOENCODER, autoencoder_config, _tensors(autoencoder_file), autoencoder_file
    )
    opened[TEXT_ENCODER.folder] = check_component(ORIGINAL_TEXT_ENCODER, text_config, text_tensors, text_file)
    return CheckedFolder(
        path,
        opened,
        tokenizer,
        SchedulerDefaults("unipc", _shift(configs[0], two)),
        known_defaults(configs[0], two, takes_frames=takes_frames),
        BOUNDARY if two else None,
    )


def save_original(path: epath.PathLike, model: ModelFolder, *, dtype: str = "float32", overwrite: bool = False) -> None:
    """Write `model` under the authors' names, all of it as safetensors; whole or not at all, as `save_folder`."""
    path = epath.Path(path)
    if not isinstance(model.tokenizer, SubwordTokenizer):
        raise UserError("the original layout is Wan's, and this model reads bytes: use the layout diffusers")
    stem = next((stem for stem, config in AUTOENCODERS.items() if config == model.autoencoder_config), None)
    if stem is None:
        raise UserError(
            f"the original layout has no config of the autoencoder: the name of its file, {' or '.join(AUTOENCODERS)}, "
            "stands for sizes and statistics of latents, and this one has others: use the layout diffusers"
        )
    with new_folder(path, marker=TOKENIZER, overwrite=overwrite) as folder:
        experts = [model.transformer] if model.transformer_2 is None else [model.transformer, model.transformer_2]
        for name, params in zip(EXPERTS if len(experts) == 2 else (".",), experts, strict=True):
            (folder / name).mkdir(parents=True, exist_ok=True)
            file = folder / name / f"{TRANSFORMER.stem}.safetensors"
            save_params(file, ORIGINAL_TRANSFORMER, model.transformer_config, params, dtype=dtype)
            write_json(folder / name / CONFIG, write_config(model.transformer_config, model.defaults.takes_frames))
        for file_stem, family, config, params in (
            (stem, ORIGINAL_AUTOENCODER, model.autoencoder_config, model.autoencoder),
            ("models_t5_umt5-xxl-enc", ORIGINAL_TEXT_ENCODER, model.text_encoder_config, model.text_encoder),
        ):
            save_params(folder / f"{file_stem}.safetensors", family, config, params, dtype=dtype)
        save_tokenizer(folder / TOKENIZER, model.tokenizer)


def _only(path: epath.Path, patterns: Sequence[str], what: str) -> epath.Path:
    found = sorted(
        file for pattern in patterns for file in path.glob(pattern) if file.suffix in (".pth", ".safetensors")
    )
    if len(found) != 1:
        listed = ", ".join(file.name for file in found) or "none"
        raise UserError(f"{path} should hold one file of {what} ({' or '.join(patterns)}), and has {listed}")
    return found[0]


def _tensors(file: epath.Path) -> dict[str, StoredTensor]:
    return read_torch_file(file) if file.suffix == ".pth" else read_header(file)


def text_encoder_config(stored: Mapping[str, StoredTensor], file: epath.Path) -> TextEncoderConfig:
    """The sizes of a UMT5 encoder, by the shapes of its tensors: the file holds no config."""
    try:
        vocabulary, width = stored["token_embedding.weight"].shape
        inner = stored["blocks.0.attn.q.weight"].shape[0]
        buckets, heads = stored["blocks.0.pos_embedding.embedding.weight"].shape
        hidden = stored["blocks.0.ffn.fc1.weight"].shape[0]
        d_kv = inner // heads
    except KeyError as error:
        raise UserError(f"{file} is not a UMT5 encoder: it lacks tensor {error}") from None
    except (ValueError, IndexError, ZeroDivisionError):
        raise UserError(f"{file} is not a UMT5 encoder: its tensors have other axes") from None
    return TextEncoderConfig(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=d_kv,
        d_ff=hidden,
        num_layers=len({name.split(".")[1] for name in stored if name.startswith("blocks.")}),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )


def _shift(config: TransformerConfig, two_experts: bool) -> float:
    """Of the authors' sampling scripts and model cards."""
    if two_experts:
        return 12.0
    return 8.0 if config.dim == TransformerConfig().dim else 5.0
