"""`UMT5EncoderModel` of `transformers`."""

from __future__ import annotations

from sora_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from sora_jax.weights.table import LINEAR, Family, Row, at

BLOCK = (
    Row("attn_norm.scale", "layer.0.layer_norm.weight"),
    *at("q", "layer.0.SelfAttention.q", LINEAR),
    *at("k", "layer.0.SelfAttention.k", LINEAR),
    *at("v", "layer.0.SelfAttention.v", LINEAR),
    *at("out", "layer.0.SelfAttention.o", LINEAR),
    Row("relative_bias", "layer.0.SelfAttention.relative_attention_bias.weight"),
    Row("ffn_norm.scale", "layer.1.layer_norm.weight"),
    *at("gate", "layer.1.DenseReluDense.wi_0", LINEAR),
    *at("up", "layer.1.DenseReluDense.wi_1", LINEAR),
    *at("down", "layer.1.DenseReluDense.wo", LINEAR),
)

TABLE = (
    Row("embed", "shared.weight", also=("encoder.embed_tokens.weight",)),
    *at("blocks", "encoder.block.{n}", BLOCK),
    Row("norm.scale", "encoder.final_layer_norm.weight"),
)

TEXT_ENCODER = Family(
    name="UMT5EncoderModel",
    library="transformers",
    folder="text_encoder",
    stem="model",
    module=TextEncoder,
    table=lambda config: TABLE,
    read_config=TextEncoderConfig.from_dict,
    write_config=TextEncoderConfig.to_dict,
)
