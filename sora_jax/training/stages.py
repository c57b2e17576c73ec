"""The stages of training that a config can name.

autoencoder   clips ──────────────────────► reconstruction loss
text          captions ───────────────────► what they say; the text encoder learns to read
diffusion     cached latents, packed rows ► velocity loss; text encoder and transformer together
"""

from __future__ import annotations

from collections.abc import Mapping

from sora_jax.training.autoencoder_stage import autoencoder_stage
from sora_jax.training.diffusion_stage import diffusion_stage
from sora_jax.training.stage import MakeStage
from sora_jax.training.text_stage import text_stage

STAGES: Mapping[str, MakeStage] = {"autoencoder": autoencoder_stage, "text": text_stage, "diffusion": diffusion_stage}
