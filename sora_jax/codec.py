"""Videos to latents and back: an autoencoder with its parameters, streamed, so that memory does not grow with duration.

uint8 frames ── encode ──► normalised latents ── decode ──► frames

The parameters may lie on the host; they are on the devices for as long as a call takes.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from sora_jax.experts import on_devices
from sora_jax.models.autoencoder import Autoencoder, AutoencoderConfig, decode_stream, encode_stream
from sora_jax.models.structure import structure_of
from sora_jax.sharding import gather


class Codec:
    """`encode` computes in float32, `decode` in `dtype`."""

    def __init__(self, config: AutoencoderConfig, params: nnx.State, dtype: jnp.dtype | type, mesh: Mesh | None = None):
        self._structure = structure_of(lambda rngs: Autoencoder(config, rngs=rngs))
        self._params, self._dtype, self._mesh = params, dtype, mesh

    def encode(self, video: UInt8[np.ndarray, "B T H W 3"]) -> Float[np.ndarray, "B F h w C"]:
        """Normalised latents of videos (their posterior's mean), float32."""
        pixels = video.astype(np.float32) / 127.5 - 1.0
        stream = encode_stream(self._structure, on_devices(self._params, self._mesh), pixels)
        latents = np.concatenate([gather(posterior.mean) for posterior in stream], axis=1)
        return np.asarray(self._whole().normalize(jnp.asarray(latents)), np.float32)

    def decode(
        self,
        latents: Float[np.ndarray, "B F h w C"] | Float[Array, "B F h w C"],
        output: str = "uint8",
        progress: Callable[[int, int], None] | None = None,
    ) -> UInt8[np.ndarray, "B T H W 3"] | Float[np.ndarray, "B T H W 3"]:
        """Frames of normalised latents, in [0, 255], or as float32 in [0, 1] where `output` is not "uint8"; `progress`
        is told how many latents are decoded, and of how many."""
        raw = self._whole().denormalize(jnp.asarray(latents)).astype(self._dtype)
        pieces: list[np.ndarray] = []
        for piece in decode_stream(self._structure, on_devices(self._params, self._mesh), raw):
            unit = np.clip((gather(piece).astype(np.float32) + 1.0) / 2.0, 0.0, 1.0)
            pieces.append(np.round(unit * 255.0).astype(np.uint8) if output == "uint8" else unit)
            if progress is not None:
                progress(len(pieces), raw.shape[1])
        return np.concatenate(pieces, axis=1)

    def _whole(self) -> Autoencoder:
        return nnx.merge(self._structure, self._params)
