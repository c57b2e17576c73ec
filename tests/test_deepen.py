"""A transformer made deeper computes what it did, and every block that was put in learns."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from one_video import one_video

from sora_jax.errors import UserError
from sora_jax.models.transformer import Transformer, TransformerConfig
from sora_jax.shapes import Extent, Stride
from sora_jax.training.deepen import OUTPUTS, deepen

SHALLOW = TransformerConfig(
    n_layers=2, n_heads=2, head_dim=8, ffn_dim=24, in_channels=3, out_channels=3, patch=Stride(1, 1, 1), text_dim=6
)
EXTENT = Extent(2, 2, 3)


def network(config: TransformerConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), graph=False)


@pytest.fixture(scope="module")
def params() -> nnx.State:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(scale=0.3, size=p.shape), jnp.float32), network(SHALLOW)[1])


def loss(layers: int, params: nnx.State) -> jax.Array:
    tokens, condition = one_video(np.random.default_rng(1), EXTENT, channels=3, text=(4, 6))
    graphdef, shapes = network(dataclasses.replace(SHALLOW, n_layers=layers))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
    return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(tokens, jnp.full((1, 1), 400.0), condition)))


@pytest.mark.parametrize("layers", [4, 6])
def test_it_computes_what_it_did_and_learns_everywhere(params, layers):
    deep = deepen(params, layers)
    assert loss(layers, deep) == pytest.approx(float(loss(2, params)), rel=1e-6)
    gradients = jax.grad(lambda p: loss(layers, p))(deep)
    for part, projection in OUTPUTS:
        kernel = gradients["blocks"][part][projection]["kernel"]
        assert (np.abs(np.asarray(kernel[...])).max(axis=(1, 2)) > 0).all()


def test_only_multiples_of_what_is_there(params):
    with pytest.raises(UserError, match="makes 2 layers 4 or 6, not 3: set transformer.n_layers to a multiple of 2"):
        deepen(params, 3)
