"""Sampling defaults of the open models, whose folders do not hold them: told apart by their sizes.

Source: the configs and model cards of Wan 2.1 and 2.2 (github.com/Wan-Video). The shift is in the folder's scheduler.
"""

from __future__ import annotations

import dataclasses

from sora_jax.models.transformer import TransformerConfig
from sora_jax.weights.defaults import SamplingDefaults

# (layers, width, latent channels, two experts?)
WAN = {
    (30, 1536, 16, False): SamplingDefaults("Wan2.1-T2V-1.3B", 81, 480, 832, 16.0, 50, 6.0),
    (40, 5120, 16, False): SamplingDefaults("Wan2.1-T2V-14B", 81, 720, 1280, 16.0, 50, 5.0),
    (40, 5120, 16, True): SamplingDefaults("Wan2.2-T2V-A14B", 81, 720, 1280, 16.0, 40, 4.0, guidance_low=3.0),
    (30, 3072, 48, False): SamplingDefaults("Wan2.2-TI2V-5B", 121, 704, 1280, 24.0, 50, 5.0),
}


def known_defaults(
    transformer: TransformerConfig, two_experts: bool, *, takes_frames: bool = False
) -> SamplingDefaults:
    """Those of the open model of these sizes; of Wan 2.1's text to video for any other."""
    key = (transformer.n_layers, transformer.dim, transformer.out_channels, two_experts)
    return dataclasses.replace(WAN.get(key, SamplingDefaults()), takes_frames=takes_frames)
