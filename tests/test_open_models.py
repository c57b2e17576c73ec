"""The open models at full size, by shapes alone: parameter counts, and a name on disk for every parameter."""

from __future__ import annotations

import jax
import pytest
from flax import nnx

from sora_jax.models.autoencoder import AutoencoderConfig
from sora_jax.models.text_encoder import TextEncoderConfig
from sora_jax.models.transformer import TransformerConfig
from sora_jax.weights.component import abstract_params, match_rows
from sora_jax.weights.known import known_defaults
from sora_jax.weights.umt5 import TEXT_ENCODER
from sora_jax.weights.wan import AUTOENCODER, TRANSFORMER

WAN_1_3B = TransformerConfig()
WAN_14B = TransformerConfig(n_layers=40, n_heads=40, ffn_dim=13824)
WAN_5B = TransformerConfig(n_layers=30, n_heads=24, ffn_dim=14336, in_channels=48, out_channels=48)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(WAN_1_3B, 1_418_996_800), (WAN_14B, 14_288_491_584), (WAN_5B, 4_999_787_712)],
    ids=["1.3B", "14B and each expert of A14B", "5B"],
)
def test_transformers_have_the_published_number_of_parameters(config: TransformerConfig, parameters: int):
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_params(TRANSFORMER, config))) == parameters


def test_umt5_xxl_has_the_parameters_that_its_sizes_say():
    d, inner, ff, layers, vocabulary = 4096, 64 * 64, 10240, 24, 256384
    of_layer = 4 * d * inner + 3 * d * ff + 2 * d + 32 * 64
    expected = vocabulary * d + layers * of_layer + d
    params = abstract_params(TEXT_ENCODER, TextEncoderConfig())
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


OPEN_21 = AutoencoderConfig()
OPEN_22 = AutoencoderConfig(base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, patch_size=2)


@pytest.mark.parametrize(
    ("family", "config", "names"),
    [
        (
            TRANSFORMER,
            WAN_1_3B,
            ["blocks.29.attn2.norm_k.weight", "condition_embedder.time_proj.bias", "proj_out.weight"],
        ),
        (TRANSFORMER, WAN_14B, ["blocks.39.ffn.net.0.proj.weight", "scale_shift_table"]),
        (TRANSFORMER, WAN_5B, ["blocks.0.norm2.bias", "patch_embedding.weight"]),
        (TEXT_ENCODER, TextEncoderConfig(), ["encoder.block.23.layer.1.DenseReluDense.wi_1.weight", "shared.weight"]),
        (
            AUTOENCODER,
            OPEN_21,
            ["encoder.down_blocks.10.conv2.weight", "decoder.up_blocks.0.upsamplers.0.time_conv.bias"],
        ),
        (
            AUTOENCODER,
            OPEN_22,
            ["encoder.down_blocks.0.downsampler.resample.1.weight", "decoder.mid_block.attentions.0.proj.bias"],
        ),
    ],
    ids=["1.3B", "14B", "5B", "UMT5-XXL", "autoencoder 2.1", "autoencoder 2.2"],
)
def test_every_parameter_has_a_name_on_disk_of_its_own(family, config, names: list[str]):
    params = abstract_params(family, config)
    shapes = dict(nnx.to_flat_state(params))
    keys = [key for path, row in match_rows(family, config, params) for key in row.keys(shapes[path].shape)]
    assert len(keys) == len(set(keys))
    layers = 0
    for path, row in match_rows(family, config, params):
        layers += shapes[path].shape[0] if row.stacked else 1
    assert layers == len(keys)
    for name in names:
        assert name in keys


def test_open_models_have_the_defaults_of_their_configs():
    of = {
        name: known_defaults(*key)
        for name, key in {
            "1.3B": (WAN_1_3B, False),
            "14B": (WAN_14B, False),
            "A14B": (WAN_14B, True),
            "5B": (WAN_5B, False),
        }.items()
    }
    sizes = {name: (d.frames, d.height, d.width, d.fps, d.steps) for name, d in of.items()}
    assert sizes["1.3B"] == (81, 480, 832, 16.0, 50)
    assert sizes["A14B"] == (81, 720, 1280, 16.0, 40)
    assert sizes["5B"] == (121, 704, 1280, 24.0, 50)
    assert (of["A14B"].guidance, of["A14B"].guidance_low) == (4.0, 3.0)
    assert (of["14B"].guidance, of["14B"].guidance_low) == (5.0, None)
