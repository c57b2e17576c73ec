"""What must come out the same in two ways, on the devices at hand: the claims of the test suite, on this machine.

Run as `python -m sora_jax.doctor.equality PLATFORM ""`. Random numbers everywhere: a fresh model has zeros that would
hide what they multiply. Products are taken at their highest precision, so that what is left is order of summation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sora_jax.config import Config, from_dict
from sora_jax.diffusion.levels import Levels
from sora_jax.doctor.selftest import Row, report
from sora_jax.models.attention import attention
from sora_jax.models.attention_forms import blockwise_attention, headwise_attention, reference_attention, visible
from sora_jax.models.structure import Make, shapes_of, structure_of

DIFFERENCE, DIFFERING = "largest difference", "numbers differ"
TOKENS, HEADS, WIDTH = 640, 2, 128  # more than are attended to in one piece; a width that the TPU kernel takes
Form = Callable[..., jax.Array]


def _drawn(make: Make, seed: int = 0) -> Any:
    """Random parameters of a module, of a size that keeps what goes through it near 1."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        fan_in = max(int(np.prod(leaf.shape[:-1])) // (leaf.shape[0] if len(leaf.shape) == 3 else 1), 1)
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in) + (len(leaf.shape) == 1), jnp.float32)

    return jax.tree.map(draw, shapes_of(make))


def _difference(a: Any, b: Any) -> float:
    return float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))


def _row(name: str, found: float, unit: str, bound: float, note: str = "") -> Row:
    return Row(name, "ok" if found <= bound else "failed", found, unit, bound, note)


# ----------------------------------------------------------------------------------------------------------- attention


def _forms() -> dict[str, Form]:
    """Every form of attention that these devices have."""

    def materialised(q: Any, k: Any, v: Any, ids: Any) -> jax.Array:
        return reference_attention(q, k, v, visible(ids, ids))

    def chosen(q: Any, k: Any, v: Any, ids: Any) -> jax.Array:
        return attention(q, k, v, q_ids=ids, kv_ids=ids)

    return {
        "as it is chosen here": chosen,
        "materialised": materialised,
        "in blocks": lambda q, k, v, ids: blockwise_attention(q, k, v, ids, ids),
        "by head": lambda q, k, v, ids: headwise_attention(q, k, v, ids, ids),
    }


def _packed() -> tuple[np.ndarray, ...]:
    """q, k, v and the ids of a row in which two videos lie side by side, and padding."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, TOKENS, HEADS, WIDTH)).astype(np.float32) for _ in range(3))
    return q, k, v, np.repeat([1, 2, 0], [300, 290, 50])[None]


def _by_hand(q: np.ndarray, k: np.ndarray, v: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The definition in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = np.einsum("bnkd,bmkd->bknm", q, k) / np.sqrt(WIDTH)
    seen = (ids[:, None, :, None] == ids[:, None, None, :]) & (ids[:, None, :, None] > 0)
    weights = np.where(seen, np.exp(scores - scores.max()), 0.0)
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return np.einsum("bknm,bmkd->bnkd", weights, v)


def attention_rows() -> Iterator[Row]:
    q, k, v, ids = _packed()
    expected = _by_hand(q, k, v, ids)
    noise = np.where((ids == 1)[..., None, None], 0.0, 1e4).astype(np.float32)
    for name, form in _forms().items():
        compiled = jax.jit(form)
        out = np.asarray(compiled(q, k, v, ids))
        yield _row(f"attention, {name}", _difference(out, expected), DIFFERENCE, 2e-5, "to float64, packed")
        shaken = np.asarray(compiled(q + noise, k + noise, v + noise, ids))
        leaked = int(np.sum((out != shaken)[ids == 1]))
        yield _row("  and nothing leaks", leaked, DIFFERING, 0, "of a video whose neighbour is shaken")


# ------------------------------------------------------------------------------------------------------------- a model


def _small(rows: int) -> Config:
    return from_dict(
        {
            "transformer": {
                "n_layers": 1,
                "n_heads": 8,
                "head_dim": 16,
                "ffn_dim": 256,
                "in_channels": 4,
                "out_channels": 4,
                "patch": (1, 1, 1),
                "text_dim": 32,
                "frequency_dim": 16,
            },
            "text_encoder": {"vocab_size": 384, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 8},
            "data": {"row_tokens": TOKENS, "row_text": 24, "groups": 8},
            "train": {"batch_size": rows},
        }
    )


def _loss(config: Config) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The diffusion loss and its gradients as a function of parameters and rows, and parameters."""
    from sora_jax.training.adapters import networks
    from sora_jax.training.diffusion_step import DiffusionModules, diffusion_loss

    make = networks(config)
    modules = DiffusionModules(**{name: structure_of(build) for name, build in make.items()})
    params = {name: _drawn(build, seed) for seed, (name, build) in enumerate(make.items())}

    def loss(params: Any, rows: Any, noise: Any) -> Any:
        groups = rows.group_segment
        sigma = jnp.broadcast_to(jnp.linspace(0.1, 0.9, groups.shape[1]), groups.shape)
        levels = Levels(sigma, jnp.zeros(groups.shape, bool), jnp.zeros(groups.shape, jnp.int32), rows.level_ids)
        return jax.value_and_grad(lambda p: diffusion_loss(modules, p, rows, levels, noise))(params)

    return loss, params


def sharded_rows() -> Iterator[Row]:
    """Loss and gradients over all devices along each axis, against one device."""
    from sora_jax.bench.programs import full_rows
    from sora_jax.sharding import batch_sharding, make_mesh, param_shardings

    devices = jax.devices()
    if len(devices) == 1:
        yield Row("sharded = unsharded", "not run", None, "", note="there is one device")
        return
    config = _small(len(devices))
    rows = full_rows(config)
    noise = np.random.default_rng(1).standard_normal(rows.tokens.shape, np.float32)
    loss, params = _loss(config)

    def on(mesh: jax.sharding.Mesh) -> Any:
        # as numpy: each mesh places the same numbers its own way
        placed = {
            name: jax.device_put(jax.tree.map(np.asarray, state), param_shardings(state, mesh))
            for name, state in params.items()
        }
        batch = jax.device_put((rows, noise), batch_sharding(mesh))
        with jax.set_mesh(mesh):
            return jax.tree.map(np.asarray, jax.jit(loss)(placed, *batch))

    alone = on(make_mesh({"data": 1}, devices[:1]))
    for axis in ("data", "fsdp", "tensor", "sequence"):
        value, gradients = on(make_mesh({"data": 1, axis: len(devices)}, devices))
        worst = abs(float(value - alone[0])) / abs(float(alone[0]))
        for here, there in zip(jax.tree.leaves(gradients), jax.tree.leaves(alone[1]), strict=True):
            worst = max(worst, float(np.linalg.norm(here - there)) / max(float(np.linalg.norm(there)), 1e-12))
        yield _row(f"{axis} = {len(devices)} devices, or one", worst, "relative difference", 1e-5, "loss and gradients")


def solver_rows() -> Iterator[Row]:
    """A step from a level to itself moves nothing, whatever the model says."""
    from sora_jax.diffusion.solvers import SOLVERS

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 24, 8)), jnp.float32)
    level_ids = jnp.asarray(np.tile(np.repeat(np.arange(4), 6), (2, 1)))
    levels = jnp.asarray([[0.0, 0.3, 0.7, 1.0]] * 2, jnp.float32)
    for name, solver in SOLVERS.items():

        @jax.jit
        def step(x: jax.Array, solver: Any = solver) -> jax.Array:
            def model(x: Float[Array, "B N P"], levels: Float[Array, "B G"]) -> jax.Array:
                return jnp.sin(3.0 * x) + jnp.mean(levels)

            return solver.step(model, x, levels, levels, level_ids, solver.history(x, levels))[0]

        yield _row(f"identity of {name}", int(np.sum(np.asarray(step(x)) != np.asarray(x))), DIFFERING, 0)


def autoencoder_rows() -> Iterator[Row]:
    """A clip in pieces is the clip as a whole."""
    from flax import nnx

    from sora_jax.models.autoencoder import Autoencoder, AutoencoderConfig, decode_stream, encode_stream

    config = AutoencoderConfig(
        base_dim=16, z_dim=8, dim_mult=(1, 2, 2), num_res_blocks=1, temperal_downsample=(True, True)
    )

    def make(rngs: nnx.Rngs) -> Autoencoder:
        return Autoencoder(config, rngs=rngs)

    graphdef, params, rng = structure_of(make), _drawn(make), np.random.default_rng(0)
    video = rng.uniform(-1, 1, (1, 13, 32, 32, 3)).astype(np.float32)
    latents = rng.normal(size=(1, 4, 8, 8, 8)).astype(np.float32)
    encoded = jax.jit(lambda params, x: nnx.merge(graphdef, params).encode(x).mean)(params, video)
    decoded = jax.jit(lambda params, x: nnx.merge(graphdef, params).decode(x))(params, latents)
    for chunk in (1, 2):
        pieces = [piece.mean for piece in encode_stream(graphdef, params, video, chunk)]
        worst = _difference(jnp.concatenate(pieces, axis=1), encoded)
        frames = jnp.concatenate(list(decode_stream(graphdef, params, latents, chunk)), axis=1)
        worst = max(worst, _difference(frames, decoded))
        yield _row(f"autoencoder by {chunk}, or whole", worst, DIFFERENCE, 1e-4, "encoded and decoded")


def precision_rows() -> Iterator[Row]:
    """How far a transformer of one block drifts in bfloat16, whose numbers have 8 significant bits."""
    from flax import nnx

    from sora_jax.models.transformer import Transformer
    from sora_jax.shapes import Condition

    config = _small(1).transformer

    def make(rngs: nnx.Rngs) -> Transformer:
        return Transformer(config, rngs=rngs)

    graphdef, params, rng = structure_of(make), _drawn(make), np.random.default_rng(0)
    ones = jnp.ones((1, TOKENS), jnp.int32)
    position = np.arange(TOKENS)
    condition = Condition(
        positions=jnp.asarray(np.stack([position // 80, position // 10 % 8, position % 10], axis=-1)[None], jnp.int32),
        segment_ids=ones,
        prompt_ids=ones,
        level_ids=jnp.zeros_like(ones),
        given=jnp.zeros(ones.shape, bool),
        text=jnp.asarray(rng.normal(size=(1, 24, config.text_dim)), jnp.float32),
        text_ids=jnp.ones((1, 24), jnp.int32),
    )
    tokens = jnp.asarray(rng.normal(size=(1, TOKENS, config.in_channels)), jnp.float32)

    def forward(dtype: Any, precision: str) -> np.ndarray:
        with jax.default_matmul_precision(precision):
            run = jax.jit(
                lambda params, tokens: nnx.merge(graphdef, params)(
                    tokens, jnp.full((1, 1), 500.0), condition, dtype=dtype
                )
            )
            return np.asarray(run(params, tokens), np.float64)

    exact = forward(jnp.float32, "highest")
    drift = np.linalg.norm(forward(jnp.bfloat16, "default") - exact) / np.linalg.norm(exact)
    yield _row("bfloat16, or float32", float(drift), "relative difference", 0.03, "a block of the transformer")


ROWS: tuple[Callable[[], Iterator[Row]], ...] = (
    attention_rows,
    solver_rows,
    autoencoder_rows,
    precision_rows,
    sharded_rows,
)


if __name__ == "__main__":
    from sora_jax.runtime import enable_compile_cache

    if sys.argv[1] == "cpu":
        jax.config.update("jax_num_cpu_devices", 4)  # of one CPU, so that there is something to shard over
    enable_compile_cache()
    jax.config.update("jax_default_matmul_precision", "highest")
    for rows in ROWS:
        try:
            for row in rows():
                report(row)
        except Exception as error:  # noqa: BLE001  a row that cannot be computed is a finding, and others follow
            report(Row(rows.__name__, "failed", None, "", note=f"{type(error).__name__}: {error}"[:300]))
