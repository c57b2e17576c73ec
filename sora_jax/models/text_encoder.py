"""The UMT5 text encoder, any size (Chung et al. 2023, arXiv:2304.09151; T5: Raffel et al. 2020, arXiv:1910.10683).

    x = embed[ids];   each block:   x += attention(norm(x));   x += down(gelu(gate(h)) * up(h)), h = norm(x);   norm(x)

What differs from a usual transformer encoder: scores are not scaled by 1 / sqrt(d) (the initial scales do that work),
positions enter only as a learned bias per head on the distance j - i, in every layer (T5 has it in the first only),
norms are RMSNorm, and no layer has a bias vector.

Because only distances matter, several prompts packed side by side in one row give exactly what each gives alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sora_jax.errors import UserError
from sora_jax.models import layers
from sora_jax.models.attention_forms import reference_attention, visible
from sora_jax.sharding import constrain


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes, under the names of `transformers`' UMT5 config.json. The defaults are UMT5-XXL, the encoder of Wan."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64  # width of a head
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128  # distances from here on share the last bucket
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise UserError(f"text encoder {field.name} must be > 0, not {getattr(self, field.name)}")
        exact = self.relative_attention_num_buckets // 4
        if self.relative_attention_num_buckets % 4 or self.relative_attention_max_distance <= exact:
            raise UserError(
                f"{self.relative_attention_num_buckets} relative_attention_num_buckets up to distance "
                f"{self.relative_attention_max_distance} cannot be made: it takes a multiple of 4, and a distance "
                "over a quarter of it"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TextEncoderConfig:
        """From a config.json of `transformers`; keys of the decoder and of training are not read.

        Raises `UserError` for a missing size, and for a feed-forward that is not UMT5's gated GELU.
        """
        if (kind := values.get("feed_forward_proj", "gated-gelu")) != "gated-gelu":
            raise UserError(f'text encoder feed_forward_proj "{kind}" is not supported; UMT5 has "gated-gelu"')
        names = [field.name for field in dataclasses.fields(cls)]
        for name in names[:6]:  # the sizes; the other three have the same value in every UMT5
            if name not in values:
                raise UserError(f'text encoder config lacks "{name}"')
        return cls(**{name: values[name] for name in names if name in values})

    def to_dict(self) -> dict[str, Any]:
        """As `transformers` reads it."""
        return {
            "architectures": ["UMT5EncoderModel"],
            "model_type": "umt5",
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": False,
            "tie_word_embeddings": True,
            "dropout_rate": 0.0,
            "pad_token_id": 0,
            "eos_token_id": 1,
            **dataclasses.asdict(self),
        }


def distance_buckets(distances: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """The bucket, 0 <= b < num_buckets, of each distance j - i (key minus query), int [...] -> int32 [...].

    Half of the buckets are for j > i. In each half, the first half has a bucket per distance, the second grows
    logarithmically up to `max_distance` (Raffel et al. 2020, section 2.1).
    """
    half = num_buckets // 2
    exact = half // 2
    far = np.abs(distances)
    # float32 as in the reference: rounding decides the bucket of distances that lie on an edge.
    ratio = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact)) / np.float32(np.log(max_distance / exact))
    grown = exact + (ratio * np.float32(half - exact)).astype(np.int32)
    return (np.where(far < exact, far, np.minimum(grown, half - 1)) + half * (distances > 0)).astype(np.int32)


def relative_bias(table: Float[Array, "buckets K"], length: int, max_distance: int) -> Float[Array, "K L L"]:
    """bias[k, i, j] = table[bucket(j - i), k].

    The 2L distances are looked up once and laid out by broadcasting: rows of 2L - 1 cut from a repeating run of 2L
    shift by one each row. So the gradient is a sum and not a scatter of L * L rows.
    """
    shift = np.arange(2 * length)
    distances = np.where(shift < length, shift, shift - 2 * length)  # run[(j - i) mod 2L] belongs to distance j - i
    run = table[distance_buckets(distances, table.shape[0], max_distance)].T  # [K, 2L]
    rows = jnp.broadcast_to(run[:, None], (run.shape[0], length, 2 * length)).reshape(run.shape[0], -1)
    return rows[:, : length * (2 * length - 1)].reshape(run.shape[0], length, 2 * length - 1)[:, :, :length]


class TextBlock(nnx.Module):
    """Self-attention with relative bias, then a gated GELU; both pre-norm and residual.

    Initial scales are those of T5: they make scores of order 1 although nothing divides them by sqrt(d).
    """

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, inner, ff = config.d_model, config.num_heads * config.d_kv, config.d_ff

        def linear(n_in: int, n_out: int, axes: tuple[str, str], stddev: float) -> layers.Linear:
            return layers.Linear(n_in, n_out, axes, rngs=rngs, bias=False, init=layers.normal(stddev))

        self.attn_norm = layers.RMSNorm(width, "embed", eps=config.layer_norm_epsilon, rngs=rngs)
        self.q = linear(width, inner, ("embed", "qkv"), (width * config.d_kv) ** -0.5)
        self.k = linear(width, inner, ("embed", "qkv"), width**-0.5)
        self.v = linear(width, inner, ("embed", "qkv"), width**-0.5)
        self.out = linear(inner, width, ("qkv", "embed"), inner**-0.5)
        buckets = (config.relative_attention_num_buckets, config.num_heads)
        self.relative_bias = layers.param(rngs, layers.normal(width**-0.5), buckets, (None, "qkv"))
        self.ffn_norm = layers.RMSNorm(width, "embed", eps=config.layer_norm_epsilon, rngs=rngs)
        self.gate = linear(width, ff, ("embed", "mlp"), width**-0.5)
        self.up = linear(width, ff, ("embed", "mlp"), width**-0.5)
        self.down = linear(ff, width, ("mlp", "embed"), ff**-0.5)

    def __call__(self, x: Float[Array, "B L D"], text_ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        heads = (*x.shape[:2], self.config.num_heads, self.config.d_kv)
        h = self.attn_norm(x)
        q, k, v = (layer(h).reshape(heads) for layer in (self.q, self.k, self.v))  # [B, L, K, d]
        bias = relative_bias(self.relative_bias[...], x.shape[1], self.config.relative_attention_max_distance)
        mixed = reference_attention(q, k, v, visible(text_ids, text_ids), bias=bias, scale=1.0)
        x = x + self.out(mixed.reshape(*x.shape[:2], -1))
        h = self.ffn_norm(x)
        return x + self.down(jax.nn.gelu(self.gate(h), approximate=True) * self.up(h))


class TextEncoder(nnx.Module):
    """Token ids to one vector each. Blocks are stacked and scanned: compile time does not grow with depth."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = layers.param(rngs, layers.normal(1.0), (config.vocab_size, config.d_model), ("vocab", "embed"))
        self.blocks = layers.stack_layers(lambda r: TextBlock(config, rngs=r), config.num_layers, rngs)
        self.norm = layers.RMSNorm(config.d_model, "embed", eps=config.layer_norm_epsilon, rngs=rngs)

    def __call__(
        self,
        token_ids: Int[Array, "B L"],
        text_ids: Int[Array, "B L"],
        *,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
    ) -> Float[Array, "B L D"]:
        """`token_ids` 0 <= id < vocab_size; `text_ids` says which prompt of the row a token belongs to, 0 = padding.

        A token attends to the tokens of its own prompt, whose tokens lie side by side; padding gives 0.
        `dtype` is that of the computation and of the result; `remat` recomputes each block in the backward pass.
        """
        x = constrain(self.embed[...].astype(dtype)[token_ids], ("batch", None, None))  # [B, L, D]
        graphdef, blocks = nnx.split(self.blocks, graph=False)

        def block(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
            # Left to itself, XLA cuts the width as the weights are cut, and sums activations over all devices where it
            # could fetch the smaller weights: 192 GiB a step in place of 9 for UMT5-XXL and two rows of 1,024 a device.
            return constrain(nnx.merge(graphdef, params)(x, text_ids), ("batch", None, None)), None

        # Inside a scan nothing can be hoisted out of the recomputation, so its barriers are not needed.
        body = jax.checkpoint(block, prevent_cse=False) if remat else block
        x, _ = jax.lax.scan(body, x, blocks, unroll=self.config.num_layers <= layers.UNROLLED)
        return jnp.where((text_ids != 0)[..., None], self.norm(x), 0)
