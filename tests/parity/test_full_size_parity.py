"""The open models at full size, by shapes alone: every tensor that the reference's modules have, and no other, under
its name and of its shape."""

from __future__ import annotations

from typing import Any

import pytest
from flax import nnx

from sora_jax.config import load_config
from sora_jax.weights.component import abstract_params, config_header, match_rows
from sora_jax.weights.table import Family
from sora_jax.weights.umt5 import TEXT_ENCODER
from sora_jax.weights.wan import AUTOENCODER, TRANSFORMER

# The sizes are the reference's own words for them (facts of the family), and not made from our configs.
TRANSFORMERS = {
    "wan_1_3b": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "wan_14b": {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
    "wan_a14b": {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
    "wan_5b": {
        "num_attention_heads": 24,
        "num_layers": 30,
        "ffn_dim": 14336,
        "in_channels": 48,
        "out_channels": 48,
    },
}
AUTOENCODER_22 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
PARAMETERS = {
    "wan_1_3b": 1_418_996_800,
    "wan_14b": 14_288_491_584,
    "wan_a14b": 14_288_491_584,
    "wan_5b": 4_999_787_712,
}


def on_disk(family: Family, config: Any) -> dict[str, tuple[int, ...]]:
    params = abstract_params(family, config)
    shapes = {path: leaf.shape for path, leaf in nnx.to_flat_state(params)}
    return {
        key: row.their_shape(shapes[path])
        for path, row in match_rows(family, config, params)
        for key in row.keys(shapes[path])
    }


def of_reference(make: Any, *repeated: str) -> dict[str, tuple[int, ...]]:
    import torch

    with torch.device("meta"):
        module = make()
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if name not in repeated}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str):
    import diffusers

    config = load_config(name).transformer
    expected = of_reference(lambda: diffusers.WanTransformer3DModel(**TRANSFORMERS[name]))
    assert on_disk(TRANSFORMER, config) == expected
    assert sum(leaf.size for _, leaf in nnx.to_flat_state(abstract_params(TRANSFORMER, config))) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["wan_1_3b", "wan_5b"])
def test_autoencoders(name: str):
    import diffusers

    sizes = AUTOENCODER_22 if name == "wan_5b" else {}
    expected = of_reference(lambda: diffusers.AutoencoderKLWan(**sizes))
    assert on_disk(AUTOENCODER, load_config(name).autoencoder) == expected


def test_umt5_xxl():
    import transformers

    config = transformers.UMT5Config(
        vocab_size=256384,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    expected = of_reference(lambda: transformers.UMT5EncoderModel(config), "encoder.embed_tokens.weight")
    ours = load_config("wan_1_3b").text_encoder
    assert on_disk(TEXT_ENCODER, ours) == expected
    assert TEXT_ENCODER.name in config_header(TEXT_ENCODER, "bfloat16")["architectures"]
