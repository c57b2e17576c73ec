"""What a pipeline is made of, public piece by piece: text to embeddings, tokens to velocity, videos to latents and back
(and seeds to noise)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from sora_jax import runtime
from sora_jax.canvas import Layout
from sora_jax.codec import Codec
from sora_jax.diffusion.guidance import Velocity, classifier_free_guidance
from sora_jax.errors import UserError, nearest
from sora_jax.experts import Experts, on_devices
from sora_jax.load import LiveAdapters
from sora_jax.models.structure import structure_of
from sora_jax.models.text_encoder import TextEncoder
from sora_jax.models.transformer import Transformer, model_time
from sora_jax.record import check_seed
from sora_jax.settings import real
from sora_jax.shapes import Condition
from sora_jax.weights.layout import ModelFolder, Progress
from sora_jax.weights.lora import check_weight


class Pieces:
    """A model's networks and parameters."""

    def __init__(
        self,
        folder: ModelFolder,
        name: str,
        dtype: str = "auto",
        mesh: Mesh | None = None,
        lora: Mapping[str, float] | None = None,
        live: LiveAdapters | None = None,
    ):
        """`folder` has the adapters `lora` in it already, merged or `live`; a video's record names them."""
        self.lora = dict(lora or {})
        self._live = live
        self.folder = folder
        self.name = name
        self.mesh = mesh
        self._place_transformers()
        devices = None if mesh is None else mesh.devices.ravel().tolist()
        self.dtype = runtime.compute_dtype(dtype, devices)
        self._platform = (devices or jax.devices())[0].platform
        self.stride = folder.autoencoder_config.stride
        self.patch = folder.transformer_config.patch
        self._transformer = structure_of(lambda rngs: Transformer(folder.transformer_config, rngs=rngs))
        self._text_encoder = structure_of(lambda rngs: TextEncoder(folder.text_encoder_config, rngs=rngs))
        self._codec = Codec(folder.autoencoder_config, folder.autoencoder, self.dtype, mesh)
        # One function object each for the life of the pipeline: compiled programs are kept by them.
        self.velocity: Velocity = _make_velocity(self._transformer, self.dtype, whole_times=False)
        whole = _make_velocity(self._transformer, self.dtype, whole_times=True)
        self._velocities = {
            (whole_times, guided): classifier_free_guidance(velocity) if guided else velocity
            for whole_times, velocity in ((False, self.velocity), (True, whole))
            for guided in (False, True)
        }

    def _place_transformers(self) -> None:
        self.params = self.folder.transformer
        self._experts = Experts(self.folder, self.mesh)

    def set_lora(self, weights: Mapping[str, float]) -> None:
        """From now on adapters loaded with `lora_live=True` count as much as `weights` says, by the names under which
        they were loaded; 0 is without, and files that are not named stay as they are. Nothing compiles anew. Raises
        `UserError` for a file that was not loaded, and for adapters that were merged."""
        if self._live is None:
            why = "its adapters were merged into the kernels" if self.lora else "it was loaded without adapters"
            raise UserError(f"{self.name} has no weights to set: {why}; load it with lora={{FILE: W}}, lora_live=True")
        for name, weight in weights.items():
            if name not in self.lora:
                raise UserError(f"LoRA file {name} was not loaded with {self.name}: {nearest(name, self.lora)}")
            check_weight(name, real(f"the weight of {name}", weight))
        lora = self.lora | {name: float(weight) for name, weight in weights.items()}
        self.folder = self._live.beside(self.folder, lora)
        self.lora = lora  # another dict than the records of videos have
        self._place_transformers()

    def condition(self, layout: Layout, prompts: Sequence[Sequence[str]]) -> Condition:
        """What the model is told about B rows of one layout, with a prompt per span in each."""
        rows = len(prompts)
        text, text_ids = self.encode_text(prompts)

        def tile(array: np.ndarray) -> jax.Array:
            return jnp.asarray(np.broadcast_to(array, (rows, *array.shape)))

        return Condition(
            positions=tile(layout.positions),
            segment_ids=tile(layout.segment_ids),
            prompt_ids=tile(layout.prompt_ids),
            level_ids=tile(layout.level_ids),
            given=tile(layout.given),
            text=text,
            text_ids=text_ids,
        )

    def encode_text(self, prompts: Sequence[Sequence[str]]) -> tuple[Float[Array, "B L E"], Int[Array, "B L"]]:
        """Text embeddings of B rows of prompts and the `text_ids` by which the transformer reads them. Every prompt has
        the tokenizer's `max_length` places in its row, whatever its length: one program for all prompts, and the same
        numbers in any batch. Places that a prompt leaves empty are 0, and are read only by models trained to."""
        tokenizer = self.folder.tokenizer
        places = tokenizer.max_length
        tokens = np.full((len(prompts), places * len(prompts[0])), tokenizer.pad_id, np.int32)
        text_ids = np.zeros_like(tokens)
        for b, row in enumerate(prompts):
            for s, prompt in enumerate(row):
                ids = tokenizer.encode(prompt)
                where = slice(s * places, s * places + len(ids))
                tokens[b, where], text_ids[b, where] = ids, s + 1
        params = on_devices(self.folder.text_encoder, self.mesh)
        encode = _encode_text_on_cpu if self._platform == "cpu" else _encode_text
        text = encode(self._text_encoder, params, tokens, text_ids, self.dtype)
        if tokenizer.attends_padding:
            text_ids = np.broadcast_to(
                np.repeat(np.arange(1, len(prompts[0]) + 1, dtype=np.int32), places), tokens.shape
            )
        return text, jnp.asarray(text_ids)

    def encode(self, video: UInt8[np.ndarray, "B T H W 3"]) -> Float[np.ndarray, "B F h w C"]:
        """Normalised latents of videos (their posterior's mean), float32; streamed, so memory is flat in T."""
        return self._codec.encode(video)

    def decode(
        self,
        latents: Float[np.ndarray, "B F h w C"] | Float[Array, "B F h w C"],
        output: str = "uint8",
        progress: Progress | None = None,
    ) -> UInt8[np.ndarray, "B T H W 3"] | Float[np.ndarray, "B T H W 3"]:
        """Frames of normalised latents; streamed latent by latent, so memory on the device is flat in duration."""
        return self._codec.decode(latents, output, progress and functools.partial(progress, "decode"))

    def noise(self, seed: int, shape: tuple[int, ...]) -> Float[np.ndarray, "F h w C"]:
        """The noise that `seed` draws for latents of `shape`: the same on any device and in any batch."""
        check_seed(seed)
        return np.asarray(_draw_noise(np.uint32(seed), shape))


# ------------------------------------------------------------------------------------------------ compiled


def _make_velocity(graphdef: nnx.GraphDef, dtype: jnp.dtype, *, whole_times: bool) -> Velocity:
    def velocity(params: Any, tokens: jax.Array, levels: jax.Array, condition: Condition) -> jax.Array:
        return nnx.merge(graphdef, params)(tokens, model_time(levels, whole=whole_times), condition, dtype=dtype)

    return velocity


def _encode(graphdef: nnx.GraphDef, params: Any, tokens: jax.Array, text_ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return nnx.merge(graphdef, params)(tokens, text_ids, dtype=dtype)


_encode_text = jax.jit(_encode, static_argnames=("graphdef", "dtype"))
# A CPU computes bfloat16 in float32, and XLA would convert the whole stack of layers ahead of the loop over them: UMT5-
# XXL took 28 GB in place of 11.
_encode_text_on_cpu = jax.jit(
    _encode,
    static_argnames=("graphdef", "dtype"),
    compiler_options={"xla_disable_hlo_passes": "while-loop-invariant-code-motion"},
)


@functools.partial(jax.jit, static_argnames=("shape",))
def _draw_noise(seed: Any, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)
