"""The spacetime-patch diffusion transformer, in the form of Wan (arXiv:2503.20314, section 4.2).

    tokens ── patch_embed ──► x ──► n_layers x [ self-attention · text cross-attention · MLP ] ──► head ──► velocity
    levels ── sinusoid, MLP ─► 6 rows of modulation per noise-level group (adaLN, Peebles & Xie 2023, arXiv:2212.09748)
    text ──── MLP ───────────► keys and values of the cross-attention

What the family fixes: RMSNorm of queries and keys over the full width (not per head), LayerNorm without parameters
before self-attention and MLP and with parameters before cross-attention, a learned modulation table per block that is
added to one projection of the level, and biases everywhere. Norms, softmax, rotation and modulation are float32 at
any compute dtype.

Every token has its own noise level, but rows have few distinct ones: modulation is computed per group `[B, G, 6, D]`
and spread to tokens inside the block, piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from sora_jax.diffusion.flow import spread
from sora_jax.diffusion.solvers import TRAIN_STEPS
from sora_jax.errors import UserError, nearest
from sora_jax.models.attention import ATTENDED, attention
from sora_jax.models.layers import (
    PRODUCT,
    UNROLLED,
    LayerNorm,
    Linear,
    LowRank,
    RMSNorm,
    layer_norm,
    normal,
    param,
    stack_layers,
    zeros,
)
from sora_jax.models.rope import Rotation, rotate, rotation
from sora_jax.models.routing import condition_of_part, put_back, take
from sora_jax.runtime import HOST_MEMORY
from sora_jax.shapes import Condition, Stride
from sora_jax.sharding import constrain

BLOCK_INPUT = "block_input"  # what a block is given, by which policies know it
# What the forward pass keeps of each block for the backward pass, which computes the rest anew. Least memory of the
# device last: all of it; what kernels multiplied (not attention); what came in; and that and what attention gave, on
# the host.
REMAT: Mapping[str, Callable[..., Any] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT, ATTENDED],
        offload_src="device",
        offload_dst=HOST_MEMORY,
    ),
}


LORA_TARGETS = (
    "self_attn",
    "cross_attn",
    "ffn",
    *(f"{name}.{part}" for name in ("self_attn", "cross_attn") for part in ("q", "k", "v", "out")),
    *(f"{name}.{part}" for name in ("ffn", "time_embed", "text_embed") for part in ("in_proj", "out_proj")),
    # what is outside the blocks has them where it is named
    "time_embed",
    "time_proj",
    "text_embed",
    "head",
)

MODEL_TIME = float(TRAIN_STEPS)


def model_time(levels: Float[Array, "B G"], *, whole: bool = False) -> Float[Array, "B G"]:
    """What the model is told of the level sigma: 1000 sigma; `whole` cuts it down as the reference does under UniPC and
    DPM-Solver++, which moves the embedding visibly."""
    time = MODEL_TIME * levels
    return jnp.floor(time) if whole else time


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the transformer; the defaults are Wan 2.1 1.3B."""

    n_layers: int = 30
    n_heads: int = 12
    head_dim: int = 128
    ffn_dim: int = 8960
    in_channels: int = 16  # of the latents (and `extra_channels`) before patchify
    out_channels: int = 16
    patch: Stride = Stride(1, 2, 2)
    text_dim: int = 4096  # width of the text encoder's output
    frequency_dim: int = 256  # of the level's sinusoidal embedding
    max_positions: int = 1024  # per axis
    eps: float = 1e-6
    # What a block keeps for the backward pass, which computes the rest anew. "none": everything; "dots": what kernels
    # made, so that attention and what is cheap come again; "full": its input; "offload": its input and what attention
    # gave, on the host, so that kernels come again. Each takes less of the device's memory than the one before.
    remat: str = "none"
    lora_rank: int = 0  # of low-rank adapters beside the kernels that `lora_targets` names; 0: none
    lora_alpha: float = 0.0  # they are scaled by alpha / rank; 0: by 1
    # What of a block has them: these, or parts, "cross_attn.k"; and outside: "time_embed,time_proj,text_embed,head".
    lora_targets: str = "self_attn,cross_attn,ffn"
    # Of a row's tokens, the share that passes by the blocks in the middle, in training alone (`models.routing`); and
    # how many blocks before and after these take all tokens.
    route_share: float = 0.0
    route_around: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_heads", "ffn_dim", "in_channels", "out_channels", "text_dim", "frequency_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"transformer {name} must be >= 1, not {getattr(self, name)}")
        if self.lora_rank < 0 or self.lora_alpha < 0:
            raise UserError(f"lora_rank {self.lora_rank} and lora_alpha {self.lora_alpha} must be >= 0")
        if self.head_dim % 2 or self.head_dim < 6:
            raise UserError(f"head_dim {self.head_dim} cannot be made: it must be even and at least 6")
        if self.remat not in REMAT:
            raise UserError(f"unknown remat policy {self.remat!r}: {nearest(self.remat, REMAT)}")
        for target in self.lora_targets.split(","):
            if target not in LORA_TARGETS:
                raise UserError(f"unknown lora_targets {target!r}: {nearest(target, LORA_TARGETS)}")
        if not 0 <= self.route_share < 1:
            raise UserError(f"route_share must be in [0, 1), not {self.route_share}")
        if self.route_share and (min(self.route_around) < 0 or sum(self.route_around) >= self.n_layers):
            raise UserError(
                f"route_around {self.route_around} leaves no block of {self.n_layers} to pass by: the two must be >= 0 "
                f"and {self.n_layers - 1} at most together"
            )

    @property
    def dim(self) -> int:
        return self.n_heads * self.head_dim

    def low_rank(self, module: str) -> LowRank | None:
        """The adapter beside the kernel of that module, by its name in a block ("cross_attn.k") or in the whole
        ("head"); None where it has none."""
        wanted = self.lora_targets.split(",")
        if self.lora_rank and (module in wanted or module.partition(".")[0] in wanted):
            return LowRank(self.lora_rank, self.lora_scale)
        return None

    def low_ranks(self, mlp: str) -> tuple[LowRank | None, LowRank | None]:
        """Those of both kernels of an MLP."""
        return self.low_rank(f"{mlp}.in_proj"), self.low_rank(f"{mlp}.out_proj")

    @property
    def lora_scale(self) -> float:
        return (self.lora_alpha or self.lora_rank) / self.lora_rank


class MLP(nnx.Module):
    """Linear, GELU, Linear; `hidden` names the axis that tensor parallelism cuts."""

    def __init__(
        self,
        n_in: int,
        n_hidden: int,
        n_out: int,
        *,
        act: Callable[[jax.Array], jax.Array],
        rngs: nnx.Rngs,
        low_rank: tuple[LowRank | None, LowRank | None] = (None, None),
    ):
        self.in_proj = Linear(n_in, n_hidden, ("embed", "mlp"), rngs=rngs, low_rank=low_rank[0])
        self.out_proj = Linear(n_hidden, n_out, ("mlp", "embed"), rngs=rngs, low_rank=low_rank[1])
        self.act = act

    def __call__(self, x: Float[Array, "*batch n_in"]) -> Float[Array, "*batch n_out"]:
        return self.out_proj(self.act(self.in_proj(x)))


def gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


class Attention(nnx.Module):
    """Multi-head attention of `x` over `source`, with RMSNorm of queries and keys over the full width; `name` is its
    own in the block."""

    def __init__(self, config: TransformerConfig, name: str, *, rngs: nnx.Rngs):
        dim = config.dim
        self.q = Linear(dim, dim, ("embed", "qkv"), rngs=rngs, low_rank=config.low_rank(f"{name}.q"))
        self.k = Linear(dim, dim, ("embed", "qkv"), rngs=rngs, low_rank=config.low_rank(f"{name}.k"))
        self.v = Linear(dim, dim, ("embed", "qkv"), rngs=rngs, low_rank=config.low_rank(f"{name}.v"))
        self.out = Linear(dim, dim, ("qkv", "embed"), rngs=rngs, low_rank=config.low_rank(f"{name}.out"))
        self.q_norm = RMSNorm(dim, "qkv", eps=config.eps, rngs=rngs)
        self.k_norm = RMSNorm(dim, "qkv", eps=config.eps, rngs=rngs)
        self.n_heads = config.n_heads

    def __call__(
        self,
        x: Float[Array, "B N D"],
        source: Float[Array, "B M D"],
        q_ids: Int[Array, "B N"],
        kv_ids: Int[Array, "B M"],
        turn: Rotation | None = None,
    ) -> Float[Array, "B N D"]:
        def heads(y: jax.Array) -> jax.Array:
            y = rearrange(y, "B N (K d) -> B N K d", K=self.n_heads)
            return constrain(y, ("batch", "tokens", "heads", None))

        q_BNKd = heads(self.q_norm(self.q(x)))
        k_BMKd = heads(self.k_norm(self.k(source)))
        v_BMKd = heads(self.v(source))
        if turn is not None:
            q_BNKd, k_BMKd = rotate(q_BNKd, turn), rotate(k_BMKd, turn)
        seen_BNKd = attention(q_BNKd, k_BMKd, v_BMKd, q_ids=q_ids, kv_ids=kv_ids)
        return self.out(rearrange(seen_BNKd, "B N K d -> B N (K d)"))


class Block(nnx.Module):
    """Self-attention and MLP, each modulated by the token's noise level, with text cross-attention between them."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        dim = config.dim
        self.modulation = param(rngs, normal(dim**-0.5), (6, dim), (None, "embed"))
        self.self_attn = Attention(config, "self_attn", rngs=rngs)
        self.cross_norm = LayerNorm(dim, eps=config.eps, rngs=rngs)
        self.cross_attn = Attention(config, "cross_attn", rngs=rngs)
        self.ffn = MLP(dim, config.ffn_dim, dim, act=gelu_tanh, rngs=rngs, low_rank=config.low_ranks("ffn"))
        self.eps = config.eps

    def __call__(
        self,
        x: Float[Array, "B N D"],
        level_rows: Float[Array, "B G 6 D"],
        text: Float[Array, "B L D"],
        turn: Rotation,
        condition: Condition,
    ) -> Float[Array, "B N D"]:
        rows = level_rows + self.modulation[...]  # [B, G, 6, D], float32

        def row(i: int) -> jax.Array:  # [B, N, D]
            return spread(rows[:, :, i], condition.level_ids)

        # self-attention among the tokens of one video
        y = (layer_norm(x, self.eps) * (1 + row(1)) + row(0)).astype(x.dtype)
        y = self.self_attn(y, y, condition.segment_ids, condition.segment_ids, turn)
        x = (x + y * row(2)).astype(x.dtype)
        # each token reads the text of its own prompt
        y = self.cross_norm(x)
        x = x + self.cross_attn(y, text, condition.prompt_ids, condition.text_ids)
        # MLP
        y = (layer_norm(x, self.eps) * (1 + row(4)) + row(3)).astype(x.dtype)
        x = (x + self.ffn(y) * row(5)).astype(x.dtype)
        return constrain(x, ("batch", "tokens", None))


def level_embedding(time: Float[Array, "B G"], width: int) -> Float[Array, "B G width"]:
    """[cos(t f_i), sin(t f_i)] with f_i = 10000^(-2i / width), for model time t in [0, 1000] (cosines first)."""
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
    angles = time.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Transformer(nnx.Module):
    """Packed tokens, their noise levels and their condition -> velocity."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        dim = config.dim
        self.patch_embed = Linear(config.in_channels * _volume(config.patch), dim, (None, "embed"), rngs=rngs)
        adapted = config.low_ranks("time_embed")
        self.time_embed = MLP(config.frequency_dim, dim, dim, act=jax.nn.silu, rngs=rngs, low_rank=adapted)
        adapter = config.low_rank("time_proj")
        self.time_proj = Linear(dim, 6 * dim, ("embed", "mlp"), init=normal(0.02), rngs=rngs, low_rank=adapter)
        adapted = config.low_ranks("text_embed")
        self.text_embed = MLP(config.text_dim, dim, dim, act=gelu_tanh, rngs=rngs, low_rank=adapted)
        self.blocks = stack_layers(lambda r: Block(config, rngs=r), config.n_layers, rngs)
        self.head_modulation = param(rngs, normal(dim**-0.5), (2, dim), (None, "embed"))
        # Zero output at the start: the first prediction is the mean velocity, and depth costs no stability.
        n_out, adapter = config.out_channels * _volume(config.patch), config.low_rank("head")
        self.head = Linear(dim, n_out, ("embed", None), init=zeros, rngs=rngs, low_rank=adapter)
        self.config = config

    def __call__(
        self,
        tokens: Float[Array, "B N P"],
        time: Float[Array, "B G"],
        condition: Condition,
        *,
        through: Int[Array, "B M"] | None = None,
        dtype: jnp.dtype | type = jnp.float32,
    ) -> Float[Array, "B N Q"]:
        """Velocity of every token, float32.

        `time` is the model's time, 1000 * sigma, one per noise-level group. P is patch volume x in_channels; Q with
        out_channels. Activations of the blocks are in `dtype`. Of tokens that pass by the blocks in the middle
        (`route_around` has the others), `through` names those that do not; None: all go through all. Tokens of segment
        0 (padding) return values of no meaning.
        """
        cfg = self.config
        if condition.image_tokens is not None:
            raise UserError("this transformer has no image cross-attention: image_tokens must be None")
        if condition.extra_channels is not None:
            tokens = jnp.concatenate([tokens, condition.extra_channels], axis=-1)

        x = self.patch_embed(tokens.astype(dtype))  # [B, N, D]
        x = constrain(x, ("batch", "tokens", None))
        level = self.time_embed(level_embedding(time, cfg.frequency_dim))  # [B, G, D], float32
        level_rows = rearrange(self.time_proj(jax.nn.silu(level)), "B G (six D) -> B G six D", six=6)
        if condition.modulation_extra is not None:
            level_rows = level_rows + condition.modulation_extra[:, None]
        text = self.text_embed(condition.text.astype(dtype))  # [B, L, D]
        graphdef, layers = nnx.split(self.blocks, graph=False)

        def run(x: jax.Array, condition: Condition, layers: Any) -> jax.Array:
            """Tokens through a stack of blocks."""
            turn = rotation(condition.positions, cfg.head_dim, max_positions=cfg.max_positions)

            def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
                x = checkpoint_name(x, BLOCK_INPUT)
                return nnx.merge(graphdef, layer)(x, level_rows, text, turn, condition), None

            policy = REMAT[cfg.remat]
            if policy is not None:
                body = jax.checkpoint(body, policy=policy, prevent_cse=False)
            count = jax.tree.leaves(layers)[0].shape[0]
            return jax.lax.scan(body, x, layers, unroll=count <= UNROLLED)[0]

        if through is None:
            x = run(x, condition, layers)  # [B, N, D]
        else:
            first, last = cfg.route_around[0], cfg.n_layers - cfg.route_around[1]
            before, middle, after = (_part(layers, *ends) for ends in ((0, first), (first, last), (last, None)))
            x = run(x, condition, before)  # [B, N, D]
            part = run(take(x, through), condition_of_part(condition, through), middle)  # [B, M, D]
            x = run(put_back(x, part, through), condition, after)  # [B, N, D]

        rows = level[:, :, None] + self.head_modulation[...]  # [B, G, 2, D]
        shift, scale = (spread(rows[:, :, i], condition.level_ids) for i in (0, 1))
        x = (layer_norm(x, cfg.eps) * (1 + scale) + shift).astype(dtype)
        return self.head(x).astype(jnp.float32)


def _part(layers: Any, start: int, stop: int | None) -> Any:
    """Of stacked blocks, those from `start` up to `stop`."""
    return jax.tree.map(lambda leaf: leaf[start:stop], layers)


def _volume(patch: Stride) -> int:
    return patch.time * patch.height * patch.width
