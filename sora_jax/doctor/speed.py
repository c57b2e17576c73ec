"""How fast this machine is: products, attention and copies, and rows of `sora-jax bench`.

Run as `python -m sora_jax.doctor.speed PLATFORM PART`, where PART is "rates" or a row of `sora_jax.bench.rows`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from sora_jax.bench.timing import median_seconds
from sora_jax.doctor.selftest import Row, report

MODEL = "world"


def rates(platform: str) -> None:
    """The rates of the first device, at sizes that fill it."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sora_jax.models.attention import attention
    from sora_jax.training.metrics import peak_flops

    small = platform == "cpu"
    peak = peak_flops(jax.devices()[0].device_kind)
    key = jax.random.key(0)

    def seconds(function: Callable[..., jax.Array], *arrays: jax.Array) -> float:
        compiled = jax.jit(function)
        return median_seconds(lambda: compiled(*arrays).block_until_ready(), warm=2)

    n = 2048 if small else 8192
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jax.random.normal(key, (n, n), dtype)
        rate = 2 * n**3 / seconds(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32), x) / 1e12
        note = f"{n} x {n}"
        if peak and dtype == jnp.bfloat16:
            note += f"; {rate * 1e12 / peak:.0%} of the vendor's peak"
        report(Row(f"products, {jnp.dtype(dtype).name}", "ok", rate, "TFLOP/s", note=note))

    tokens, heads, width = (2048, 4, 128) if small else (16384, 12, 128)
    dtype = jnp.float32 if small else jnp.bfloat16
    q, k, v = (jax.random.normal(part, (1, tokens, heads, width), dtype) for part in jax.random.split(key, 3))
    ids = jnp.ones((1, tokens), jnp.int32)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, q_ids=ids, kv_ids=ids)

    forward = 4 * tokens**2 * heads * width
    rate = forward / seconds(attend, q, k, v) / 1e12
    report(Row("attention, forward", "ok", rate, "TFLOP/s", note=f"{tokens} tokens, {heads} heads of {width}"))

    def gradient(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return jax.grad(lambda *qkv: jnp.sum(attend(*qkv).astype(jnp.float32) ** 2), argnums=(0, 1, 2))(q, k, v)[0]

    rate = 3 * forward / seconds(gradient, q, k, v) / 1e12  # as models are counted: the backward pass is twice
    report(Row("attention, with gradients", "ok", rate, "TFLOP/s", note=f"{tokens} tokens, {heads} heads of {width}"))

    x = jax.random.normal(key, ((32 if small else 512) * 2**20,), jnp.float32)
    rate = 2 * x.nbytes / seconds(lambda x: x + 1.0, x) / 1e9
    report(Row("device memory", "ok", rate, "GB/s", note="read and written"))
    host = np.ones(32 * 2**20, np.float32)
    rate = host.nbytes / median_seconds(lambda: jax.device_put(host).block_until_ready()) / 1e9
    report(Row("host to device", "ok", rate, "GB/s"))


def bench_row(name: str) -> None:
    """A row of `sora-jax bench`."""
    from sora_jax.bench.rows import ROWS

    report(Row(name, "ok", ROWS[name](MODEL), "s"))


if __name__ == "__main__":
    from sora_jax.runtime import enable_compile_cache, keep_memory

    keep_memory()
    enable_compile_cache()
    chosen, part = sys.argv[1:]
    if part == "rates":
        rates(chosen)
    else:
        bench_row(part)
