"""Schedules in closed form, AdamW and Muon against numpy, who is trained by what, and the guard of bad gradients."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sora_jax.errors import UserError
from sora_jax.models import layers
from sora_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from sora_jax.models.transformer import Transformer, TransformerConfig
from sora_jax.training.muon import orthogonalized
from sora_jax.training.optimizer import OptimizerConfig, decay_mask, make_optimizer, make_schedule, stacked_axes
from sora_jax.training.spikes import NormStatistics, is_spike, no_statistics, observe
from sora_jax.training.state import TrainState, apply_gradients, ema_decay_at, ema_update

# ------------------------------------------------------------------------------------------------------------ schedule


@pytest.mark.parametrize("step", [0, 3, 9, 10, 35, 60, 109, 110, 500])
@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_schedule_in_closed_form(shape: str, step: int):
    config = OptimizerConfig(schedule=shape, warmup_steps=10, final_fraction=0.1)
    p = min(max((step - 10) / 100, 0.0), 1.0)
    expected = {
        "constant": 2.0,
        "linear": 2.0 * (1 - 0.9 * p),
        "cosine": 2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2),
    }[shape]
    if step < 10:
        expected = 2.0 * (step + 1) / 10
    schedule = make_schedule(config, 110, 2.0)
    np.testing.assert_allclose(schedule(step), expected, rtol=1e-6)
    np.testing.assert_allclose(schedule(jnp.int32(step)), expected, rtol=1e-6)


def test_schedule_without_warmup_starts_at_its_peak():
    assert float(make_schedule(OptimizerConfig(warmup_steps=0), 100, 0.5)(0)) == 0.5


# ----------------------------------------------------------------------------------------------------------- parameters


class Small(nnx.Module):
    """One of each kind: border matrices, a stacked layer with kernel, bias, norm, table, and a convolution."""

    def __init__(self, rngs: nnx.Rngs):
        self.patch_embed = layers.Linear(3, 4, (None, "embed"), rngs=rngs)
        self.blocks = layers.stack_layers(Layer, 3, rngs)
        self.conv = Conv(rngs)
        self.table = layers.param(rngs, layers.normal(1.0), (2, 4), (None, "embed"))
        self.head = layers.Linear(4, 3, ("embed", None), rngs=rngs)


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = layers.Linear(4, 6, ("embed", "mlp"), rngs=rngs)
        self.norm = layers.RMSNorm(4, "embed", rngs=rngs)
        self.modulation = layers.param(rngs, layers.normal(1.0), (6, 4), (None, "embed"))


class Conv(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        axes = (None, None, None, "channels_in", "channels_out")
        self.kernel = layers.param(rngs, layers.normal(1.0), (3, 1, 2, 4, 5), axes)


@pytest.fixture(scope="module")
def params() -> nnx.State:
    return nnx.split(Small(nnx.Rngs(0)), graph=False)[1]


def names_where(tree) -> set[str]:
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)[0]
    named = [path for path, leaf in flat if leaf is not None and leaf is not False]
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path in named}


def test_which_parameters_decay_and_which_muon_trains(params: nnx.State):
    kernels = {"patch_embed.kernel", "blocks.linear.kernel", "conv.kernel", "head.kernel"}
    assert names_where(decay_mask(params)) == kernels
    assert names_where(stacked_axes(params)) == {"blocks.linear.kernel", "conv.kernel"}


def test_muon_trains_the_hidden_matrices_of_the_real_models():
    transformer = TransformerConfig(n_layers=2, n_heads=1, head_dim=8, ffn_dim=8, text_dim=8, frequency_dim=8)
    text_encoder = TextEncoderConfig(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    for make in (
        lambda: Transformer(transformer, rngs=nnx.Rngs(0)),
        lambda: TextEncoder(text_encoder, rngs=nnx.Rngs(0)),
    ):
        state = nnx.split(nnx.eval_shape(make), graph=False)[1]
        by_muon = names_where(stacked_axes(state))
        adam = {".".join(path) for path, _ in nnx.to_flat_state(state)} - by_muon
        assert by_muon
        assert all(name.endswith("kernel") for name in by_muon)
        words = ("bias", "scale", "modulation", "embed", "head", "patch_embed.kernel", "relative_bias")
        assert all(any(word in name for word in words) for name in adam), adam
        assert not any(name.startswith(("patch_embed", "head")) for name in by_muon)


# ------------------------------------------------------------------------------------------------ updates against numpy


def newton_schulz(gradient: np.ndarray, iterations: int = 5) -> np.ndarray:
    """The quintic iteration of the Muon post, in float64, on the Frobenius-normalised matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = gradient.astype(np.float64)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T


def first_update(config: OptimizerConfig, params: nnx.State, grads: nnx.State) -> nnx.State:
    optimizer = make_optimizer(config, 100)
    return optimizer.update(grads, optimizer.init(params), params)[0]


@pytest.fixture(scope="module")
def grads(params: nnx.State) -> nnx.State:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), params)


def test_muon_orthogonalises_each_stacked_matrix(params: nnx.State, grads: nnx.State):
    rate, decay = 0.1, 0.5
    config = OptimizerConfig(
        name="muon", learning_rate=rate, weight_decay=decay, warmup_steps=0, schedule="constant", muon_momentum=0.9
    )
    update = first_update(config, params, grads)
    # Of a first step with Nesterov and bias corrections, the momentum is a multiple of the gradient.
    for layer in range(3):
        gradient = np.asarray(grads["blocks"]["linear"]["kernel"][...][layer])
        weight = np.asarray(params["blocks"]["linear"]["kernel"][...][layer])
        expected = -rate * (0.2 * math.sqrt(6) * newton_schulz(gradient) + decay * weight)
        np.testing.assert_allclose(update["blocks"]["linear"]["kernel"][...][layer], expected, rtol=1e-4, atol=1e-5)
    # A convolution is one matrix of all taps and inputs.
    gradient, weight = (np.asarray(tree["conv"]["kernel"][...]) for tree in (grads, params))
    expected = newton_schulz(gradient.reshape(24, 5)).reshape(gradient.shape)
    expected = -rate * (0.2 * math.sqrt(24) * expected + decay * weight)
    np.testing.assert_allclose(update["conv"]["kernel"][...], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(300, 16), (16, 300), (40, 40)])
@pytest.mark.parametrize("spread", [1e-2, 1e-7])
def test_directions_stay_and_singular_values_come_near_one(shape: tuple[int, int], spread: float):
    """Also of a matrix that float32's Gram matrix takes for one of low rank: what is lost there stays small."""
    rng = np.random.default_rng(1)
    short = min(shape)
    left = np.linalg.qr(rng.standard_normal((shape[0], short)))[0]
    right = np.linalg.qr(rng.standard_normal((shape[1], short)))[0]
    values = np.geomspace(1.0, spread, short)
    result = np.asarray(orthogonalized(jnp.asarray(left * values @ right.T, jnp.float32)), np.float64)
    turned = left.T @ result @ right  # diagonal where every singular vector is kept
    found = np.diag(turned)
    large = values >= 1e-2
    assert found[large].min() > 0.6
    assert np.linalg.norm(result, ord=2) < 1.25
    np.testing.assert_allclose(turned[large][:, large], np.diag(found[large]), atol=2e-3)
    assert not np.asarray(orthogonalized(jnp.zeros(shape))).any()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_adam_trains_the_rest(params: nnx.State, grads: nnx.State, name: str):
    config = OptimizerConfig(
        name=name, learning_rate=0.1, adam_learning_rate=0.03, warmup_steps=0, schedule="constant", weight_decay=0.0
    )
    update = first_update(config, params, grads)
    rate = 0.03 if name == "muon" else 0.1
    for path in (("head", "kernel"), ("blocks", "linear", "bias"), ("blocks", "modulation"), ("table",)):
        got, gradient = update, grads
        for part in path:
            got, gradient = got[part], gradient[part]
        gradient = np.asarray(gradient[...], np.float64)
        expected = -rate * gradient / (np.abs(gradient) + config.eps)  # Adam's first step is the sign
        np.testing.assert_allclose(got[...], expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weights_decay_in_kernels_only(params: nnx.State, name: str):
    config = OptimizerConfig(name=name, learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.3)
    update = first_update(config, params, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(update["head"]["kernel"][...], -0.03 * params["head"]["kernel"][...], rtol=1e-5)
    np.testing.assert_array_equal(update["blocks"]["modulation"][...], 0.0)
    np.testing.assert_array_equal(update["blocks"]["norm"]["scale"][...], 0.0)


def test_options_are_checked():
    with pytest.raises(UserError, match=r"optimizer.b1 must be in \[0, 1\)"):
        OptimizerConfig(b1=1.0)
    with pytest.raises(UserError, match="muon_iterations"):
        OptimizerConfig(muon_iterations=0)


# ------------------------------------------------------------------------------------------------------ apply_gradients


def state_of(params, optimizer: optax.GradientTransformation) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, params, optimizer.init(params), jax.random.key(0), zero, zero, no_statistics())


def test_clipping_scales_to_the_norm():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}  # norm 5
    for clip, scale in ((1.0, 0.2), (10.0, 1.0), (0.0, 1.0)):
        optimizer = optax.sgd(1.0)
        state, metrics = apply_gradients(
            state_of(params, optimizer), grads, jnp.float32(1), optimizer, clip_norm=clip, ema_decay=0.0
        )
        assert float(metrics["grad_norm"]) == 5.0
        np.testing.assert_allclose(state.params["a"], [-3.0 * scale, 0.0], rtol=1e-6)
        np.testing.assert_allclose(state.params["b"], [-4.0 * scale], rtol=1e-6)


def test_the_update_is_measured_against_the_parameters():
    """Plain gradient descent: an update is the rate times the clipped gradient."""
    params = {"a": jnp.array([6.0, 0.0]), "b": jnp.array([8.0])}  # norm 10
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}  # norm 5
    optimizer = optax.sgd(0.5)
    _, metrics = apply_gradients(
        state_of(params, optimizer), grads, jnp.float32(1), optimizer, clip_norm=1.0, ema_decay=0.0
    )
    assert float(metrics["update_norm"]) == pytest.approx(0.5, rel=1e-6)
    assert float(metrics["update_ratio"]) == pytest.approx(0.05, rel=1e-6)


@pytest.mark.parametrize("bad", ["nan gradient", "inf gradient", "nan loss"])
def test_a_bad_step_changes_nothing_but_the_counters(bad: str):
    optimizer = optax.adam(0.1)
    good = {"a": jnp.array([1.0, 2.0])}
    state, _ = apply_gradients(
        state_of({"a": jnp.ones(2)}, optimizer), good, jnp.float32(1), optimizer, clip_norm=1.0, ema_decay=0.9
    )
    worst = {"nan gradient": jnp.nan, "inf gradient": jnp.inf, "nan loss": 1.0}[bad]
    loss = jnp.float32(jnp.nan if bad == "nan loss" else 1.0)
    after, metrics = apply_gradients(
        state, {"a": jnp.array([1.0, worst])}, loss, optimizer, clip_norm=1.0, ema_decay=0.9
    )
    for name in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (2, 1, 1)
    assert float(metrics["skipped_in_a_row"]) == 1.0
    assert np.isnan(metrics["update_norm"])
    assert np.isnan(metrics["update_ratio"])
    # and a good one ends the row, but not the count
    after, _ = apply_gradients(after, good, jnp.float32(1), optimizer, clip_norm=1.0, ema_decay=0.9)
    assert (int(after.skipped), int(after.skipped_in_a_row)) == (1, 0)
    assert not np.array_equal(after.params["a"], state.params["a"])


def test_ema_decay_is_a_running_mean_at_first():
    assert float(ema_decay_at(jnp.int32(0), 0.999)) == pytest.approx(0.1)
    assert float(ema_decay_at(jnp.int32(90), 0.999)) == pytest.approx(0.91)
    assert float(ema_decay_at(jnp.int32(10**6), 0.999)) == pytest.approx(0.999)
    np.testing.assert_allclose(ema_update({"a": jnp.array(1.0)}, {"a": jnp.array(3.0)}, 0.75)["a"], 1.5)


# -------------------------------------------------------------------------------------------------------------- spikes


def seen(norms: np.ndarray) -> NormStatistics:
    return jax.lax.scan(lambda stats, norm: (observe(stats, norm), None), no_statistics(), jnp.asarray(norms))[0]


@pytest.mark.parametrize("count", [1, 7, 100, 350])
def test_statistics_of_norms_are_weighted_mean_and_variance(count: int):
    """All norms count alike up to a hundred; from then on each new one is a hundredth of the whole."""
    norms = np.random.default_rng(0).lognormal(1.0, 0.7, count).astype(np.float32)
    weights = np.zeros(count)
    for n in range(count):
        share = 1 / min(n + 1, 100)
        weights *= 1 - share
        weights[n] = share
    logs = np.log(norms.astype(np.float64))
    mean = weights @ logs
    found = seen(norms)
    assert int(found.count) == count
    assert float(found.mean) == pytest.approx(mean, rel=1e-4)
    assert float(found.variance) == pytest.approx(weights @ (logs - mean) ** 2, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("spread", "factor", "sigmas", "count", "spike"),
    [
        (0.7, np.exp(0.7 * 5), 6.0, 100, False),  # 33 times the usual, but these norms vary
        (0.7, np.exp(0.7 * 8), 6.0, 100, True),
        (0.7, np.exp(0.7 * 8), 6.0, 99, False),  # too early to tell
        (0.7, np.exp(0.7 * 8), 0.0, 100, False),  # off
        (0.01, 9.0, 6.0, 100, False),  # 220 deviations, but not ten times the usual
        (0.01, 11.0, 6.0, 100, True),
        (0.7, 1e-6, 6.0, 100, False),  # small is no harm
    ],
)
def test_a_spike_is_far_in_deviations_and_in_size(spread: float, factor: float, sigmas: float, count: int, spike: bool):
    norms = 3.0 * np.exp(spread * np.where(np.arange(count) % 2, 1.0, -1.0)).astype(np.float32)
    assert bool(is_spike(seen(norms), jnp.float32(3.0 * factor), sigmas)) is spike


def test_a_spike_changes_nothing_but_the_counters():
    optimizer = optax.adam(0.1)
    state = state_of({"a": jnp.ones(2)}, optimizer).replace(norms=seen(np.full(100, 2.0, np.float32)))
    grads = {"a": jnp.array([1e3, 0.0])}
    after, metrics = apply_gradients(
        state, grads, jnp.float32(1), optimizer, clip_norm=1.0, spike_sigmas=6.0, ema_decay=0.9
    )
    for name in ("params", "ema", "opt_state", "norms"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
    assert (int(after.skipped), int(after.skipped_in_a_row)) == (1, 1)
    assert float(metrics["grad_norm"]) == 1e3
