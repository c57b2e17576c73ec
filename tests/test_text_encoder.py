"""The text encoder against its definition written in numpy, and the laws it must keep."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.errors import UserError
from sora_jax.models.text_encoder import TextEncoder, TextEncoderConfig, distance_buckets, relative_bias

CONFIG = TextEncoderConfig(vocab_size=384, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3)


def bucket(distance: int, num_buckets: int = 32, max_distance: int = 128) -> int:
    """The bucket of one distance in whole numbers: far >= e (m/e)^(k/s)  <=>  far^s e^k >= e^s m^k."""
    half, exact = num_buckets // 2, num_buckets // 4
    far, steps = abs(distance), half - exact
    if far >= exact:
        grown = max(k for k in range(steps + 1) if far**steps * exact**k >= exact**steps * max_distance**k)
        far = min(exact + grown, half - 1)
    return far + (half if distance > 0 else 0)


def reference(params: dict, config: TextEncoderConfig, ids: list[int]) -> np.ndarray:
    """One prompt alone, in float64, a loop over layers and heads."""

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale

    def gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = p["embed"][ids]
    for n in range(config.num_layers):
        layer = jax.tree.map(lambda a: a[n], p["blocks"])  # noqa: B023
        h = norm(x, layer["attn_norm"]["scale"])
        q, k, v = (np.split(h @ layer[name]["kernel"], config.num_heads, axis=-1) for name in "qkv")
        heads = []
        for head in range(config.num_heads):
            scores = q[head] @ k[head].T
            for i in range(len(ids)):
                for j in range(len(ids)):
                    scores[i, j] += layer["relative_bias"][bucket(j - i), head]
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[head])
        x = x + np.concatenate(heads, -1) @ layer["out"]["kernel"]
        h = norm(x, layer["ffn_norm"]["scale"])
        x = x + (gelu(h @ layer["gate"]["kernel"]) * (h @ layer["up"]["kernel"])) @ layer["down"]["kernel"]
    return norm(x, p["norm"]["scale"])


@pytest.fixture(scope="module")
def encoder() -> tuple[nnx.GraphDef, nnx.State]:
    graphdef, params = nnx.split(TextEncoder(CONFIG, rngs=nnx.Rngs(0)), graph=False)
    rng = np.random.default_rng(0)  # norms off 1 and a bias that is felt
    return graphdef, jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(3, 259, length).tolist() for length in (150, 1, 23)]


@pytest.fixture(scope="module")
def encode(encoder):
    graphdef, params = encoder
    forward = jax.jit(nnx.merge(graphdef, params).__call__)
    return lambda ids, text_ids: np.asarray(forward(jnp.asarray(ids, jnp.int32), jnp.asarray(text_ids, jnp.int32)))


def pack(prompts: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    ids, text_ids = np.zeros((2, 1, length), np.int32)
    start = 2  # padding in front as well
    for n, prompt in enumerate(prompts, start=1):
        ids[0, start : start + len(prompt)], text_ids[0, start : start + len(prompt)] = prompt, n
        start += len(prompt)
    return ids, text_ids


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 40)])
def test_buckets_are_those_of_the_paper(num_buckets, max_distance):
    distances = np.arange(-300, 301)
    found = distance_buckets(distances, num_buckets, max_distance)
    assert found.tolist() == [bucket(int(d), num_buckets, max_distance) for d in distances]


@pytest.mark.parametrize("length", [1, 2, 33])
def test_relative_bias_is_a_lookup_by_distance(length):
    table = np.random.default_rng(0).standard_normal((32, 3), np.float32)
    expected = [[[table[bucket(j - i), k] for j in range(length)] for i in range(length)] for k in range(3)]
    np.testing.assert_array_equal(relative_bias(jnp.asarray(table), length, 128), expected)


def test_packed_prompts_equal_the_definition_of_each(encoder, encode, prompts):
    ids, text_ids = pack(prompts, 180)
    packed = encode(ids, text_ids)
    params = nnx.to_pure_dict(encoder[1])
    for n, prompt in enumerate(prompts, start=1):
        np.testing.assert_allclose(packed[text_ids == n], reference(params, CONFIG, prompt), atol=1e-5)


def test_packed_prompts_equal_each_alone(encode, prompts):
    ids, text_ids = pack(prompts, 180)
    packed = encode(ids, text_ids)
    for n, prompt in enumerate(prompts, start=1):
        alone = encode([prompt], [[1] * len(prompt)])
        error = np.linalg.norm(packed[text_ids == n] - alone[0]) / np.linalg.norm(alone)
        assert error <= 1e-6  # float32 adds the keys up in another order


def test_nothing_leaks_between_prompts_or_out_of_padding(encode, prompts):
    ids, text_ids = pack(prompts, 180)
    packed = encode(ids, text_ids)
    changed = encode(np.where(text_ids == 3, ids, 258 - ids), text_ids)
    np.testing.assert_array_equal(packed[text_ids == 3], changed[text_ids == 3])
    assert (packed[text_ids == 1] != changed[text_ids == 1]).any()
    assert (packed[text_ids == 0] == 0).all()


def test_order_matters(encode):
    """Without the relative bias a bag of tokens would give the same mean."""
    ids = np.array([[70, 80, 90, 100]])
    there, back = encode(ids, np.ones_like(ids)), encode(ids[:, ::-1], np.ones_like(ids))
    assert np.abs(there - back[:, ::-1]).max() > 1e-3


def test_gradients_are_the_same_with_remat(encoder, prompts):
    graphdef, params = encoder
    ids, text_ids = (jnp.asarray(x) for x in pack(prompts[1:], 28))

    def loss(params, remat):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(ids, text_ids, remat=remat)))

    plain = jax.jit(jax.grad(lambda p: loss(p, False)))(params)
    remat = jax.jit(jax.grad(lambda p: loss(p, True)))(params)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-5 * float(np.abs(a).max()))


def test_bfloat16_is_near_float32(encoder, encode, prompts):
    graphdef, params = encoder
    ids, text_ids = pack(prompts[1:], 28)
    exact = encode(ids, text_ids)
    narrow = nnx.merge(graphdef, params)(jnp.asarray(ids), jnp.asarray(text_ids), dtype=jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    assert np.abs(np.asarray(narrow, np.float32) - exact).mean() < 0.02 * np.abs(exact[text_ids != 0]).mean()


def test_initial_scales_keep_scores_of_order_one():
    """Unscaled scores of fresh weights have variance 1: the query's initial scale stands in for 1 / sqrt(d)."""
    config = dataclasses.replace(CONFIG, d_model=256, d_kv=64, d_ff=128, num_layers=1)
    params = nnx.to_pure_dict(nnx.split(TextEncoder(config, rngs=nnx.Rngs(0)), graph=False)[1])
    h = np.random.default_rng(0).standard_normal((200, 256))  # what an RMSNorm gives
    q = (h @ params["blocks"]["q"]["kernel"][0])[:, :64]
    k = (h @ params["blocks"]["k"]["kernel"][0])[:, :64]
    assert 0.8 < np.std(q @ k.T) < 1.25
    assert 0.9 < np.std(params["embed"]) < 1.1


def test_config_reads_and_writes_the_keys_of_transformers():
    written = CONFIG.to_dict()
    assert TextEncoderConfig.from_dict(written | {"num_decoder_layers": 8, "dropout_rate": 0.1}) == CONFIG
    assert written["model_type"] == "umt5"
    xxl = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    assert TextEncoderConfig.from_dict(xxl) == TextEncoderConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": None}, 'lacks "d_model"'),
        ({"feed_forward_proj": "relu"}, '"relu" is not supported'),
        ({"num_heads": 0}, "num_heads must be > 0, not 0"),
        ({"relative_attention_num_buckets": 30}, "a multiple of 4"),
    ],
)
def test_config_errors_name_the_key(changes, message):
    values = {key: value for key, value in (CONFIG.to_dict() | changes).items() if value is not None}
    with pytest.raises(UserError, match=message):
        TextEncoderConfig.from_dict(values)
