"""`WanTransformer3DModel` and `AutoencoderKLWan` of `diffusers` (Wan 2.1 and 2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any

from sora_jax.errors import UserError, nearest
from sora_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sora_jax.models.transformer import Transformer, TransformerConfig
from sora_jax.shapes import Stride
from sora_jax.weights.table import BIAS, LINEAR, Family, Row, at

# --- transformer ---------------------------------------------------------------------------------------------------

ATTENTION = (
    *at("q", "to_q", LINEAR),
    *at("k", "to_k", LINEAR),
    *at("v", "to_v", LINEAR),
    *at("out", "to_out.0", LINEAR),
    Row("q_norm.scale", "norm_q.weight"),
    Row("k_norm.scale", "norm_k.weight"),
)

BLOCK = (
    Row("modulation", "scale_shift_table", "1 row d -> row d"),
    *at("self_attn", "attn1", ATTENTION),
    Row("cross_norm.scale", "norm2.weight"),
    Row("cross_norm.bias", "norm2.bias"),
    *at("cross_attn", "attn2", ATTENTION),
    *at("ffn.in_proj", "ffn.net.0.proj", LINEAR),
    *at("ffn.out_proj", "ffn.net.2", LINEAR),
)


def transformer_table(config: TransformerConfig) -> tuple[Row, ...]:
    patch = dict(zip("thw", config.patch, strict=True))
    return (
        Row("patch_embed.kernel", "patch_embedding.weight", "d c t h w -> (t h w c) d", sizes=patch),
        Row("patch_embed.bias", "patch_embedding.bias"),
        *at("time_embed.in_proj", "condition_embedder.time_embedder.linear_1", LINEAR),
        *at("time_embed.out_proj", "condition_embedder.time_embedder.linear_2", LINEAR),
        *at("time_proj", "condition_embedder.time_proj", LINEAR),
        *at("text_embed.in_proj", "condition_embedder.text_embedder.linear_1", LINEAR),
        *at("text_embed.out_proj", "condition_embedder.text_embedder.linear_2", LINEAR),
        *at("blocks", "blocks.{n}", BLOCK),
        Row("head_modulation", "scale_shift_table", "1 row d -> row d"),
        *at("head", "proj_out", LINEAR),  # its rows run (t h w c), as our tokens do
    )


# config.json: the keys that are ours under another name, and those that must be what they always were
TRANSFORMER_KEYS = {
    "num_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "attention_head_dim": "head_dim",
    "ffn_dim": "ffn_dim",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "patch_size": "patch",
    "text_dim": "text_dim",
    "freq_dim": "frequency_dim",
    "rope_max_seq_len": "max_positions",
    "eps": "eps",
}
TRANSFORMER_FIXED = {
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}


def read_transformer_config(values: Mapping[str, Any]) -> TransformerConfig:
    """Raises `UserError` on a missing, unknown or unsupported key."""
    values = {key: value for key, value in values.items() if not key.startswith("_")}
    for key, value in values.items():
        if key in TRANSFORMER_FIXED:
            if value != TRANSFORMER_FIXED[key]:
                raise UserError(f"transformer {key} {value!r} is not supported; only {TRANSFORMER_FIXED[key]!r} is")
        elif key not in TRANSFORMER_KEYS:
            raise UserError(f'unknown transformer config key "{key}": {nearest(key, TRANSFORMER_KEYS)}')
    for key in TRANSFORMER_KEYS:
        if key not in values and key not in ("rope_max_seq_len", "eps"):
            raise UserError(f'transformer config lacks "{key}"')
    sizes = {name: values[key] for key, name in TRANSFORMER_KEYS.items() if key in values}
    patch = Stride(*sizes["patch"])
    if not all(isinstance(size, int) and size > 0 for size in patch):
        raise UserError(f"transformer patch_size must be three whole numbers > 0, not {sizes['patch']!r}")
    return TransformerConfig(**sizes | {"patch": patch})


def write_transformer_config(config: TransformerConfig) -> dict[str, Any]:
    sizes = {key: getattr(config, name) for key, name in TRANSFORMER_KEYS.items()}
    return sizes | {"patch_size": list(config.patch)} | TRANSFORMER_FIXED


TRANSFORMER = Family(
    name="WanTransformer3DModel",
    library="diffusers",
    folder="transformer",
    stem="diffusion_pytorch_model",
    module=Transformer,
    table=transformer_table,
    read_config=read_transformer_config,
    write_config=write_transformer_config,
    wide=("time_embed.", "modulation", "norm."),
)

# --- autoencoder ---------------------------------------------------------------------------------------------------

CONV = (Row("kernel", "weight", "o i t h w -> t h w i o"), BIAS)
FRAME_CONV = (Row("kernel", "weight", "o i h w -> h w i o"), BIAS)
TIME_CONV = (Row("kernel", "weight", "o i t 1 1 -> t i o"), BIAS)
POINT = (Row("kernel", "weight", "o i 1 1 1 -> i o"), BIAS)
FRAME_POINT = (Row("kernel", "weight", "o i 1 1 -> i o"), BIAS)

RESIDUAL = (
    Row("norm1.scale", "norm1.gamma", "c 1 1 1 -> c"),
    *at("conv1", "conv1", CONV),
    Row("norm2.scale", "norm2.gamma", "c 1 1 1 -> c"),
    *at("conv2", "conv2", CONV),
    *at("shortcut", "conv_shortcut", POINT),
)

FRAME_ATTENTION = (
    Row("norm.scale", "norm.gamma", "c 1 1 -> c"),
    *at("qkv", "to_qkv", FRAME_POINT),
    *at("out", "proj", FRAME_POINT),
)

RESAMPLE = (
    *at("space_conv", "resample.1", FRAME_CONV),
    *at("time_conv", "time_conv", TIME_CONV),
)

ENDS = (  # of the encoder and of the decoder
    *at("conv_in", "conv_in", CONV),
    *at("middle.resnet1", "mid_block.resnets.0", RESIDUAL),
    *at("middle.attention", "mid_block.attentions.0", FRAME_ATTENTION),
    *at("middle.resnet2", "mid_block.resnets.1", RESIDUAL),
    Row("norm_out.scale", "norm_out.gamma", "c 1 1 1 -> c"),
    *at("conv_out", "conv_out", CONV),
)


def autoencoder_table(config: AutoencoderConfig) -> tuple[Row, ...]:
    return (
        *at("encoder", "encoder", ENDS),
        *at("encoder.down_blocks", "encoder.down_blocks", _encoder_levels(config)),
        *at("quant_conv", "quant_conv", POINT),
        *at("post_quant_conv", "post_quant_conv", POINT),
        *at("decoder", "decoder", ENDS),
        *at("decoder.up_blocks", "decoder.up_blocks", _decoder_levels(config)),
    )


def _encoder_levels(config: AutoencoderConfig) -> list[Row]:
    run = count()

    def theirs(name: str) -> str:
        """2.2 files name a block as we do; 2.1 files number the blocks of all levels in one run."""
        return name if config.is_residual else str(next(run))

    rows: list[Row] = []
    for level in range(len(config.dim_mult)):
        for n in range(config.num_res_blocks):
            rows += at(f"{level}.resnets.{n}", theirs(f"{level}.resnets.{n}"), RESIDUAL)
        if level < len(config.dim_mult) - 1:
            rows += at(f"{level}.downsample", theirs(f"{level}.downsampler"), RESAMPLE)
    return rows


def _decoder_levels(config: AutoencoderConfig) -> list[Row]:
    upsampler = "upsampler" if config.is_residual else "upsamplers.0"
    rows: list[Row] = []
    for level in range(len(config.dim_mult)):
        for n in range(config.num_res_blocks + 1):
            rows += at(f"{level}.resnets.{n}", f"{level}.resnets.{n}", RESIDUAL)
        rows += at(f"{level}.upsample", f"{level}.{upsampler}", RESAMPLE)
    return rows


AUTOENCODER = Family(
    name="AutoencoderKLWan",
    library="diffusers",
    folder="vae",
    stem="diffusion_pytorch_model",
    module=Autoencoder,
    table=autoencoder_table,
    read_config=AutoencoderConfig.from_dict,
    write_config=AutoencoderConfig.to_dict,
)
