"""Memory and time of a step by arithmetic: what is compiled first, and what is said where nothing is compiled.

Good to about a factor of two, which is enough to put meshes in order; whether a step fits is the compiler's to say.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp

from sora_jax.bench.compute import BANDWIDTH
from sora_jax.config import Config
from sora_jax.models.sequence_parallel import heads_across
from sora_jax.models.transformer import TransformerConfig
from sora_jax.sharding import MESH_AXES
from sora_jax.training.diffusion_stage import diffusion_flops
from sora_jax.training.metrics import peak_flops

# Bytes a parameter: float32 weights, gradients, two moments and an average; what does not learn, in bfloat16.
STATE, KEPT = 5 * 4, 2
# What the backward pass finds of a layer's activations, in multiples of (D, width of the MLP) a token; of "none", all.
SAVED = {"full": (1, 0), "offload": (0, 0), "dots": (7, 1)}
# Of what a layer holds, so many at once while its gradients are made: what comes within 15 % of three compiled plans
# (1.3B on v5e-16, 14B on v5p-128, and on v5p-512 for a minute of video).
WORKING = 5
SCORES_MOVED = 6 * 4  # bytes: a ring reads or writes its float32 scores about six times a pass


class Reckoned(NamedTuple):
    """Of one device of a mesh."""

    mesh: dict[str, int]
    peak_bytes: float
    seconds: float  # of the model's products at the peak, and after them of links, empty heads and a ring's scores


def layer_activations(t: TransformerConfig, tokens: float, dtype: jnp.dtype) -> float:
    """Bytes that a layer holds at once: about ten arrays of the model's width, and two of the MLP's."""
    return tokens * (10 * t.dim + 2 * t.ffn_dim) * dtype.itemsize


def activations(t: TransformerConfig, tokens: float, dtype: jnp.dtype) -> float:
    """Bytes of a train step's activations: a layer at work, forward and backward, and what remat lets all layers
    keep."""
    working = WORKING * layer_activations(t, tokens, dtype)
    if t.remat not in SAVED:
        return working + t.n_layers * layer_activations(t, tokens, dtype)
    of_dim, of_ffn = SAVED[t.remat]
    return working + t.n_layers * tokens * (of_dim * t.dim + of_ffn * t.ffn_dim) * dtype.itemsize


def meshes(config: Config, devices: int, rows: int) -> Iterator[dict[str, int]]:
    """The meshes that so many devices can form for `rows` rows, with axes that divide what lies on them."""
    t = config.transformer
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for data, fsdp, tensor in itertools.product(divisors, repeat=3):
        whole = devices % (data * fsdp * tensor) == 0 and rows % (data * fsdp) == 0
        if whole and t.dim % fsdp == 0 and t.n_heads % tensor == 0 and t.ffn_dim % tensor == 0:
            lengths = (data, fsdp, tensor, devices // (data * fsdp * tensor))
            yield dict(zip(MESH_AXES, lengths, strict=True))


def reckon_training(config: Config, mesh: Mapping[str, int], kind: str, learns: int, kept: int) -> Reckoned:
    """A train step on TPU devices of `kind`, of so many parameters that learn and that are kept."""
    t, dtype = config.transformer, jnp.dtype(jnp.bfloat16)
    data, fsdp, tensor, sequence = (mesh[axis] for axis in MESH_AXES)
    tokens = config.train.batch_size // (data * fsdp) * -(-config.data.row_tokens // sequence)
    state = (STATE * learns + KEPT * kept) / (fsdp * tensor)
    passes = 2 if t.remat == "none" else 3  # forward, backward, and forward again
    # Gradients are scattered over fsdp, and what is left of them summed over data and sequence, in float32.
    gradients = 4 * learns / tensor * ((fsdp - 1) / fsdp + 2 / fsdp * (data * sequence > 1))
    seconds = passes * _pass_seconds(config, mesh, kind, tokens, learns) + gradients / BANDWIDTH[kind].links
    seconds += 3 * _product_seconds(config, mesh, kind, config.train.batch_size)
    return Reckoned(dict(mesh), state + activations(t, tokens, dtype), seconds)


def reckon_sampling(config: Config, mesh: Mapping[str, int], kind: str, rows: int, parameters: int) -> Reckoned:
    """A guided solver step of `rows` videos, each of which is computed with its prompt and without."""
    data, fsdp, tensor, sequence = (mesh[axis] for axis in MESH_AXES)
    tokens = 2 * rows // (data * fsdp) * -(-config.data.row_tokens // sequence)
    peak = KEPT * parameters / (fsdp * tensor)
    peak += 2 * layer_activations(config.transformer, tokens, jnp.dtype(jnp.bfloat16))
    seconds = _pass_seconds(config, mesh, kind, tokens, parameters) + _product_seconds(config, mesh, kind, 2 * rows)
    return Reckoned(dict(mesh), peak, seconds)


def _product_seconds(config: Config, mesh: Mapping[str, int], kind: str, rows: int) -> float:
    forward = diffusion_flops(config.transformer, config.text_encoder, config.data.row_tokens, config.data.row_text)
    return rows * forward / (math.prod(mesh.values()) * _peak(kind))


def _peak(kind: str) -> float:
    return peak_flops(f"TPU {kind}") or float("inf")


def _pass_seconds(config: Config, mesh: Mapping[str, int], kind: str, tokens: int, parameters: int) -> float:
    """Links, empty heads and a ring's scores, in one pass through the layers over `tokens` tokens of each device."""
    t = config.transformer
    _, fsdp, tensor, sequence = (mesh[axis] for axis in MESH_AXES)
    heads, across = heads_across(t.n_heads // tensor, sequence)  # devices that trade heads; the rest is a ring
    empty = heads * tensor / t.n_heads - 1
    array = tokens * t.dim * 2 * (1 + empty)  # bytes of an activation in bfloat16
    weights = 2 * parameters / tensor * (fsdp - 1) / fsdp
    traded = 4 * array / tensor * (across - 1) / across + 2 * array / tensor * (sequence // across - 1)
    summed = 2 * 3 * array * (tensor - 1) / tensor
    seconds = (weights + t.n_layers * (traded + summed)) / BANDWIDTH[kind].links
    seconds += t.n_layers * empty * 4 * tokens * config.data.row_tokens * t.dim / tensor / _peak(kind)
    if sequence > across:
        scores = tokens * config.data.row_tokens * t.n_heads / tensor
        seconds += t.n_layers * SCORES_MOVED * scores / BANDWIDTH[kind].memory
    return seconds
