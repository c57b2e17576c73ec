"""The autoencoder's loss against numpy, and that a step of its training does what it says."""

from __future__ import annotations

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sora_jax.errors import UserError
from sora_jax.evaluation.reconstruction import ssim
from sora_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sora_jax.training.autoencoder_step import (
    MODULE,
    AutoencoderLossConfig,
    gradient_error,
    make_autoencoder_step,
    ssim_error,
)
from sora_jax.training.state import TrainState, make_init

CONFIG = AutoencoderConfig(
    base_dim=8, z_dim=8, dim_mult=(1, 1), num_res_blocks=1, temperal_downsample=(True,), is_residual=True, patch_size=2
)
WEIGHTS = AutoencoderLossConfig(l1=0.3, l2=4.0, gradient=0.3, gradient_scales=2, ssim=0.2, kl=1e-4)
OPTIMIZER = optax.adam(3e-3)


@cache
def graphdef() -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: Autoencoder(CONFIG, rngs=nnx.Rngs(0))), graph=False)[0]


@cache
def step_of(dtype: type):
    return make_autoencoder_step(graphdef(), CONFIG, OPTIMIZER, WEIGHTS, dtype=dtype)


@cache
def first_params() -> dict[str, nnx.State]:
    """Random parameters of the model's shapes, drawn by numpy: nothing needs compiling for that."""
    shapes = nnx.split(nnx.eval_shape(lambda: Autoencoder(CONFIG, rngs=nnx.Rngs(0))), graph=False)[1]
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if len(leaf.shape) == 1:
            return np.ones(leaf.shape, np.float32)
        return (rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))).astype(np.float32)

    return {MODULE: jax.tree.map(draw, shapes)}


def first_state() -> TrainState:
    """The state of step 0 in buffers of its own: a step donates each, and may be given none twice."""
    state = make_init(lambda key: first_params(), OPTIMIZER)(jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)


def clips(frames: int = 3) -> np.ndarray:
    """Two bright squares, each on a ground of its own and moving its own way; uint8 [2, frames, 16, 16, 3]."""
    video = np.empty((2, frames, 16, 16, 3), np.uint8)
    video[0], video[1] = (40, 60, 90), (200, 190, 160)
    for t in range(frames):
        video[0, t, 4:10, 2 + t : 8 + t] = (230, 40, 40)
        video[1, t, 3 + t : 9 + t, 6:12] = (30, 120, 220)
    return video


def test_gradient_error_is_the_direct_sum():
    error = np.random.default_rng(0).normal(size=(2, 3, 5, 6, 2))  # an odd height: its last row has no pair to average
    half = np.zeros((2, 3, 2, 3, 2))
    for h, w in np.ndindex(2, 3):
        half[:, :, h, w] = error[:, :, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2].mean(axis=(2, 3))
    expected = 0.0
    for e in (error, half):
        expected += np.abs(e[:, 1:] - e[:, :-1]).mean() / 2
        expected += np.abs(e[:, :, 1:] - e[:, :, :-1]).mean() / 2
        expected += np.abs(e[:, :, :, 1:] - e[:, :, :, :-1]).mean() / 2
    np.testing.assert_allclose(gradient_error(jnp.asarray(error, jnp.float32), 2), expected, rtol=1e-5)


def test_gradient_error_forgives_a_constant_and_takes_images():
    assert gradient_error(jnp.full((1, 1, 8, 8, 3), 0.7), 3) == 0.0
    step_edge = jnp.zeros((1, 1, 1, 4, 1)).at[..., 2:, :].set(3.0)
    assert gradient_error(step_edge, 1) == 1.0  # one step of 3 among 3 differences; one frame and one row add nothing


def test_ssim_error_is_what_the_judge_says_is_missing():
    rng = np.random.default_rng(3)
    video = rng.integers(0, 256, (2, 3, 16, 13, 3)).astype(np.uint8)
    video[1] = 40  # flat, where small errors weigh most
    made = np.clip(video + rng.normal(0, 6, video.shape), 0, 255).astype(np.uint8)
    expected = 1 - np.mean([ssim(*pair) for pair in zip(video, made, strict=True)])
    found = ssim_error(*(jnp.asarray(x / 127.5 - 1.0, jnp.float32) for x in (video, made)))
    assert 0.1 < expected < 0.8
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(ssim_error(*(jnp.full((1, 1, 11, 11, 1), x) for x in (0.5, 0.5))), 0.0, atol=1e-6)
    with pytest.raises(UserError, match=r"reconstruction\.ssim needs frames of at least 11 x 11 pixels, not 16 x 10"):
        ssim_error(jnp.zeros((1, 1, 16, 10, 3)), jnp.zeros((1, 1, 16, 10, 3)))


def test_loss_terms_are_those_of_the_reconstruction_of_a_sample():
    video, state = (clips() / 127.5 - 1.0).astype(np.float32), first_state()

    @jax.jit
    def run(params: nnx.State, video: jax.Array, key: jax.Array):
        model = nnx.merge(graphdef(), params)
        posterior = model.encode(video)
        return posterior.mean, posterior.logvar, model.decode(posterior.sample(key), clip=False)

    mean, logvar, decoded = (np.asarray(x) for x in run(state.params[MODULE], jnp.asarray(video), state.step_key()))
    error = decoded - video
    expected = {
        "l1": np.abs(error).mean(),
        "l2": (error**2).mean(),
        "gradient": float(gradient_error(jnp.asarray(error), 2)),
        "ssim": float(ssim_error(jnp.asarray(video), jnp.asarray(decoded))),
        "kl": ((mean**2 + np.exp(logvar) - 1 - logvar) / 2).mean(),
        "psnr": 10 * np.log10(4 / (error**2).mean()),
    }
    weights = {"l1": 0.3, "l2": 4.0, "gradient": 0.3, "ssim": 0.2, "kl": 1e-4}
    expected["loss"] = sum(weight * expected[name] for name, weight in weights.items())
    _, metrics = step_of(jnp.float32)(state, clips())  # bytes
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


def test_training_overfits_two_clips():
    state, losses = first_state(), []
    for _ in range(60):
        state, metrics = step_of(jnp.float32)(state, clips())
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.25 * losses[0]
    assert int(state.step) == 60
    assert int(state.skipped) == 0


def test_a_step_is_the_same_each_time():
    one, _ = step_of(jnp.float32)(first_state(), clips())
    two, _ = step_of(jnp.float32)(first_state(), clips())
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)


def test_the_posterior_is_sampled_anew_at_each_step():
    state = first_state()
    _, first = step_of(jnp.float32)(first_state(), clips())
    _, second = step_of(jnp.float32)(state.replace(step=state.step + 1), clips())
    assert float(first["kl"]) == float(second["kl"])  # the posterior itself is the same
    assert float(first["l2"]) != float(second["l2"])


def test_images_given_as_floats_train_in_bfloat16_with_float32_parameters():
    image = (clips(1) / 127.5 - 1.0).astype(np.float32)
    after, metrics = step_of(jnp.bfloat16)(first_state(), image)
    assert all(np.isfinite(value) for value in metrics.values())
    assert int(after.skipped) == 0
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype(jnp.float32)}
    moved = jax.tree.map(lambda a, b: np.any(np.asarray(a) != b), after.params, first_params())
    assert sum(map(bool, jax.tree.leaves(moved))) > 0.9 * len(jax.tree.leaves(moved))


def test_mistakes_are_named():
    with pytest.raises(UserError, match="dropout 0.1 is not supported"):
        make_autoencoder_step(graphdef(), dataclasses.replace(CONFIG, dropout=0.1), OPTIMIZER, WEIGHTS)
    with pytest.raises(UserError, match="gradient_scales must be at least 1, not 0"):
        AutoencoderLossConfig(gradient_scales=0)
    with pytest.raises(UserError, match=r"reconstruction\.ssim must be >= 0, not -1"):
        AutoencoderLossConfig(ssim=-1.0)
