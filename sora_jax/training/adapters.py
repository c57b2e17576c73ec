"""Parameters that learn beside ones that do not: a model kept as it is, and low-rank adapters on its transformer.

`TrainState.params` holds what learns; what is kept travels beside it, and `complete` puts both together for a forward
pass. Adapters are those leaves of a transformer with `lora_rank` > 0 that one without does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx

from sora_jax.models.structure import Make
from sora_jax.models.text_encoder import TextEncoder
from sora_jax.models.transformer import Transformer, TransformerConfig

if TYPE_CHECKING:
    from sora_jax.config import Config

ADAPTERS = "adapters"  # their entry in `TrainState.params`
_NAMES = ("adapter_a", "adapter_b")


def split_adapters(transformer: nnx.State) -> tuple[nnx.State, nnx.State]:
    """The parameters of a transformer (arrays or shapes) without its adapters, and the adapters."""
    flat = nnx.to_flat_state(transformer)
    parts: tuple[list[Any], list[Any]] = ([], [])
    for path, leaf in flat:
        parts[path[-1] in _NAMES].append((path, leaf))
    return nnx.from_flat_state(parts[0]), nnx.from_flat_state(parts[1])


def networks(config: Config) -> dict[str, Make]:
    """How the networks of the diffusion stage are made, by name."""
    return {
        "transformer": lambda rngs: Transformer(config.transformer, rngs=rngs),
        "text_encoder": lambda rngs: TextEncoder(config.text_encoder, rngs=rngs),
    }


def learning(config: Config, modules: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the transformer and the text encoder (parameters or shapes): what learns by `train.learns`, as it is in
    `TrainState.params`, and what is kept."""
    if config.train.learns == "lora":
        base, adapters = split_adapters(modules["transformer"])
        return {ADAPTERS: adapters}, {"text_encoder": modules["text_encoder"], "transformer": base}
    if config.train.learns == "transformer":
        return {"transformer": modules["transformer"]}, {"text_encoder": modules["text_encoder"]}
    return dict(modules), {}


def complete(kept: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """All modules of a forward pass by name, of what is kept and what learns."""
    whole = {**kept, **params}
    if ADAPTERS in whole:
        whole["transformer"] = nnx.merge_state(whole["transformer"], whole.pop(ADAPTERS))
    return whole


def merge_adapters(config: TransformerConfig, transformer: nnx.State, adapters: nnx.State) -> nnx.State:
    """The transformer without adapters that computes the same: W + alpha / r A B for each kernel, in float32."""
    flat = dict(nnx.to_flat_state(transformer))
    added = dict(nnx.to_flat_state(adapters))
    for path, first in added.items():
        if path[-1] != _NAMES[0]:
            continue
        a, b = first.get_value(), added[*path[:-1], _NAMES[1]].get_value()
        kernel = flat[*path[:-1], "kernel"]
        product = jnp.einsum("...ir,...ro->...io", a, b, precision="highest")
        wide = kernel.get_value().astype(jnp.float32) + config.lora_scale * product
        flat[*path[:-1], "kernel"] = kernel.replace(wide.astype(kernel.get_value().dtype))
    return nnx.from_flat_state(list(flat.items()))
