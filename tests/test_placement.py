"""What each device of a pod holds of the large models: by the table of axes, against sums by hand; nothing is made."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from sora_jax.config import load_config
from sora_jax.models.autoencoder import Autoencoder
from sora_jax.models.structure import shapes_of
from sora_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from sora_jax.models.transformer import Transformer
from sora_jax.sharding import MESH_AXES, param_shardings
from sora_jax.training.state import abstract_state, make_init

FSDP = 16
MESH = AbstractMesh((1, FSDP, 1, 4), MESH_AXES)  # 64 devices
MB = 1e6


def wan_14b() -> nnx.State:
    config = load_config("wan_14b").transformer
    return shapes_of(lambda rngs: Transformer(config, rngs=rngs))


def umt5_xxl() -> nnx.State:
    return shapes_of(lambda rngs: TextEncoder(TextEncoderConfig(), rngs=rngs))


def wan_counts() -> tuple[int, int]:
    """Parameters that fsdp cuts, and those that lie whole: biases and norms whose axis belongs to `tensor`, or none."""
    D, ff, layers, patch, text, frequency = 5120, 13824, 40, 16 * 4, 4096, 256
    block = 8 * D * D + 2 * D * ff + 6 * D + 3 * D  # kernels, modulation, biases of what goes out
    borders = (patch * D + D) + (frequency * D + D * D + D) + 6 * D * D + (text * D + D * D + D) + 2 * D + D * patch
    whole = layers * (6 * D + 4 * D + 2 * D + ff) + D + 6 * D + D + patch
    return layers * block + borders, whole


def umt5_counts() -> tuple[int, int]:
    V, D, inner, ff, layers, buckets, heads = 256384, 4096, 4096, 10240, 24, 32, 64
    cut = V * D + layers * (4 * D * inner + 3 * D * ff + 2 * D) + D
    return cut, layers * buckets * heads


def on_one_device(tree: Any) -> int:
    """Elements."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))


def placed(params: nnx.State) -> nnx.State:
    places = jax.tree.broadcast(param_shardings(params, MESH), params)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params, places)


MODELS = {"14B": (wan_14b, wan_counts, 14_288_491_584), "UMT5-XXL": (umt5_xxl, umt5_counts, 5_680_910_336)}


@pytest.mark.parametrize("name", MODELS)
def test_a_device_holds_a_sixteenth_of_a_large_model(name: str):
    make, count, published = MODELS[name]
    cut, whole = count()
    assert cut + whole == published
    params = placed(make())
    assert on_one_device(params) == cut // FSDP + whole
    assert whole < 1e-3 * published
    for path, variable in nnx.to_flat_state(params):
        leaf = variable.get_value()
        a_layers = leaf.size // (leaf.shape[0] if path[0] == "blocks" else 1)  # a stack is used a layer at a time
        assert 4 * a_layers <= 1 * MB or not leaf.sharding.is_fully_replicated, ".".join(map(str, path))


def test_the_state_of_training_lies_as_its_parameters_do():
    """Weights, their average and Adam's two moments, in float32."""
    init = make_init(lambda key: {"transformer": wan_14b_zeros()}, optax.adam(1e-3))
    state = abstract_state(init, jax.random.key(0), MESH)
    cut, whole = wan_counts()
    one = cut // FSDP + whole
    assert on_one_device(state.params) == on_one_device(state.ema) == one
    assert on_one_device(state.opt_state) == 2 * one + 1  # and a counter
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}


def wan_14b_zeros() -> nnx.State:
    return jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), wan_14b())


def test_the_autoencoder_too():
    """Its kernels' outgoing channels; what stays whole is small: the few that go in or out are not many enough."""
    config = load_config("wan_14b").autoencoder
    params = placed(shapes_of(lambda rngs: Autoencoder(config, rngs=rngs)))
    for path, variable in nnx.to_flat_state(params):
        leaf = variable.get_value()
        assert 4 * leaf.size <= 1 * MB or not leaf.sharding.is_fully_replicated, ".".join(map(str, path))
