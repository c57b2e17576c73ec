"""Rows of the open models' modules at their real widths, few layers deep, so that two cores finish; float32, random.

`reference.py` has the same rows of PyTorch's `diffusers` and `transformers`, under the same names.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx

from sora_jax.bench.timing import median_seconds
from sora_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sora_jax.models.structure import shapes_of, structure_of
from sora_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from sora_jax.models.transformer import Transformer, TransformerConfig
from sora_jax.shapes import Condition, Extent
from sora_jax.tokens.patchify import token_positions
from sora_jax.weights.component import abstract_params
from sora_jax.weights.layout import ModelFolder, save_folder
from sora_jax.weights.umt5 import TEXT_ENCODER
from sora_jax.weights.wan import AUTOENCODER, TRANSFORMER

LAYERS = 4
LATENTS = (3, 60, 104)  # F, h, w: 4,680 tokens of 1 x 2 x 2
TEXT = 512
SMALL: dict[str, Any] = {"base_dim": 32, "z_dim": 16}  # of the autoencoder
VIDEO = (1, 17, 128, 128, 3)
UMT5: dict[str, Any] = {
    "vocab_size": 32_000,
    "d_model": 1024,
    "d_kv": 64,
    "d_ff": 2560,
    "num_layers": LAYERS,
    "num_heads": 16,
}
LEAST = 3  # repetitions
WARM = 2  # before them: the first two still ask the system for memory


def _random(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[nnx.GraphDef, Any]:
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> jax.Array:
        fan_in = max(int(np.prod(leaf.shape[:-1])), 1)
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) / np.sqrt(fan_in))

    return structure_of(make), jax.tree.map(draw, shapes_of(make))


def _transformer() -> tuple[nnx.GraphDef, Any, Callable[[], tuple[Any, ...]]]:
    config = TransformerConfig(n_layers=LAYERS)
    graphdef, params = _random(lambda rngs: Transformer(config, rngs=rngs))
    extent = Extent(LATENTS[0], LATENTS[1] // 2, LATENTS[2] // 2)
    N, rng = extent.volume, np.random.default_rng(1)
    ones = jnp.ones((1, N), jnp.int32)
    condition = Condition(
        positions=jnp.asarray(token_positions(extent))[None],
        segment_ids=ones,
        prompt_ids=ones,
        level_ids=jnp.zeros((1, N), jnp.int32),
        given=jnp.zeros((1, N), bool),
        text=jnp.asarray(rng.standard_normal((1, TEXT, config.text_dim), np.float32)),
        text_ids=jnp.ones((1, TEXT), jnp.int32),
    )
    tokens = jnp.asarray(rng.standard_normal((1, N, 64), np.float32))
    return graphdef, params, lambda: (tokens, jnp.full((1, 1), 500.0), condition)


def wan_transformer_forward(model: str) -> float:
    del model
    graphdef, params, inputs = _transformer()
    forward = jax.jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs))
    return median_seconds(lambda: jax.block_until_ready(forward(params, *inputs())), warm=WARM, least=LEAST)


def wan_train_step(model: str) -> float:
    del model
    graphdef, params, inputs = _transformer()
    optimizer = optax.adamw(1e-4)

    def step(params: Any, state: Any, *inputs: Any) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            return jnp.mean(jnp.square(nnx.merge(graphdef, params)(*inputs) - 1.0))

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    held = [params, optimizer.init(params)]

    def work() -> None:
        held[:] = jitted(*held, *inputs())
        jax.block_until_ready(held)

    return median_seconds(work, warm=WARM, least=LEAST)


def _autoencoder(method: str, shape: tuple[int, ...]) -> float:
    graphdef, params = _random(lambda rngs: Autoencoder(AutoencoderConfig(**SMALL), rngs=rngs))
    x = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32))
    run = jax.jit(lambda params, x: getattr(nnx.merge(graphdef, params), method)(x))
    return median_seconds(lambda: jax.block_until_ready(run(params, x)), warm=WARM, least=LEAST)


def wan_encode(model: str) -> float:
    del model
    return _autoencoder("encode", VIDEO)


def wan_decode(model: str) -> float:
    del model
    return _autoencoder("decode", (1, 5, 16, 16, SMALL["z_dim"]))


def umt5(model: str) -> float:
    del model
    graphdef, params = _random(lambda rngs: TextEncoder(TextEncoderConfig(**UMT5), rngs=rngs))
    ids = jnp.asarray(np.random.default_rng(1).integers(3, 32_000, (1, TEXT)).astype(np.int32))
    run = jax.jit(lambda params, ids: nnx.merge(graphdef, params)(ids, jnp.ones_like(ids)))
    return median_seconds(lambda: jax.block_until_ready(run(params, ids)), warm=WARM, least=LEAST)


def wan_load(model: str) -> float:
    """A folder of the full 1.3B with UMT5-XXL in bfloat16 (random, 15 GB), loaded by `Pipeline.load`. A guided step of
    a picture at 480p follows, which is not timed: what was loaded works, and the row's memory is that of both."""
    from sora_jax.pipeline import Pipeline

    del model
    with tempfile.TemporaryDirectory() as folder:
        _write_random_model(epath.Path(folder) / "model")
        began = time.perf_counter()
        pipe = Pipeline.load(epath.Path(folder) / "model", dtype="bfloat16")
        jax.block_until_ready((pipe.folder.transformer, pipe.folder.text_encoder, pipe.folder.autoencoder))
        seconds = time.perf_counter() - began
        made = pipe.sample("a red ball", frames=1, height=480, width=832, steps=1, output="latents").latents
        if not np.isfinite(made).all():
            raise RuntimeError("a step of the loaded model is not finite")
        return seconds


def _write_random_model(path: epath.Path) -> None:
    """Every tensor is one random row over and over, so that writing needs less memory than loading."""
    rng = np.random.default_rng(0)

    def fill(leaf: Any) -> np.ndarray:
        row = (0.02 * rng.standard_normal(leaf.shape[-1])).astype(jnp.bfloat16)
        return np.broadcast_to(row, leaf.shape)

    configs = {TRANSFORMER: TransformerConfig(), AUTOENCODER: AutoencoderConfig(), TEXT_ENCODER: TextEncoderConfig()}
    parts: list[Any] = []  # config and parameters of each, in the order of `ModelFolder`
    for family, config in configs.items():
        parts += [config, jax.tree.map(fill, abstract_params(family, config))]
    save_folder(path, ModelFolder(*parts), dtype="bfloat16")


ROWS: dict[str, Callable[[str], float]] = {
    "wan-load": wan_load,
    "wan-transformer-forward": wan_transformer_forward,
    "wan-train-step": wan_train_step,
    "wan-encode": wan_encode,
    "wan-decode": wan_decode,
    "umt5": umt5,
}
