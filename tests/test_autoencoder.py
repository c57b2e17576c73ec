"""The causal video autoencoder: its parts against direct sums, its streams against the whole clip."""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from sora_jax import sharding
from sora_jax.errors import UserError
from sora_jax.models import autoencoder_blocks, causal_conv, convolution
from sora_jax.models.autoencoder import Autoencoder, AutoencoderConfig, Posterior, decode_stream, encode_stream
from sora_jax.shapes import Stride

FORMS = {
    "2.1": AutoencoderConfig(
        base_dim=4, z_dim=3, dim_mult=(1, 2, 2), num_res_blocks=1, temperal_downsample=(True, True)
    ),
    "2.2": AutoencoderConfig(
        base_dim=4,
        decoder_base_dim=6,
        z_dim=3,
        dim_mult=(1, 2, 2),
        num_res_blocks=1,
        temperal_downsample=(True, True),
        is_residual=True,
        patch_size=2,
    ),
}
both_forms = pytest.mark.parametrize("form", FORMS)


@cache
def model(form: str) -> tuple[nnx.GraphDef, nnx.State]:
    """Random parameters everywhere: at the start of training much is zero, which would hide what it multiplies."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Autoencoder(FORMS[form], rngs=nnx.Rngs(0))), graph=False)
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        fan_in = max(np.prod(leaf.shape[:-1]), 1)
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in) + (len(leaf.shape) == 1), jnp.float32)

    return graphdef, jax.tree.map(draw, params)


@cache
def whole(form: str, method: str):
    graphdef, params = model(form)
    return jax.jit(lambda x: getattr(nnx.merge(graphdef, params), method)(x))


def video(form: str, frames: int = 13) -> np.ndarray:
    stride = FORMS[form].stride
    shape = (1, frames, stride.height, 2 * stride.width, 3)
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def latents(form: str, frames: int = 4) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(1, frames, 1, 2, FORMS[form].z_dim)).astype(np.float32)


# --- the whole model -------------------------------------------------------------------------------------------------


@both_forms
def test_shapes_follow_the_stride(form: str):
    stride = FORMS[form].stride
    assert stride == {"2.1": Stride(4, 4, 4), "2.2": Stride(4, 8, 8)}[form]
    posterior = whole(form, "encode")(video(form))
    assert posterior.mean.shape == posterior.logvar.shape == (1, 4, 1, 2, 3)
    assert whole(form, "decode")(latents(form)).shape == (1, 13, stride.height, 2 * stride.width, 3)


def test_strides_of_the_open_models():
    open_21 = AutoencoderConfig()
    open_22 = AutoencoderConfig(base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, patch_size=2)
    assert open_21.stride == Stride(4, 8, 8)
    assert open_22.stride == Stride(4, 16, 16)
    assert open_22.pixel_channels == 12


def test_a_decoder_may_have_other_widths_than_the_encoder():
    config = dataclasses.replace(FORMS["2.2"], decoder_base_dim=2, decoder_dim_mult=(1, 4, 8))
    params = nnx.split(nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0))), graph=False)[1]
    kernels = [params["decoder"][conv]["kernel"].shape for conv in ("conv_in", "conv_out")]
    assert kernels == [(3, 3, 3, 3, 16), (3, 3, 3, 2, 12)]
    assert params["encoder"]["conv_out"]["kernel"].shape == (3, 3, 3, 8, 6)
    assert AutoencoderConfig.from_dict(config.to_dict()).decoder_dim_mult == (1, 4, 8)
    assert "decoder_dim_mult" not in FORMS["2.2"].to_dict(), "readers of the open models' files do not know it"
    for wrong, words in (((1, 2), "it needs one for each of the 3 levels"), ((1, 2, 32), "32 must divide 2 x 8")):
        with pytest.raises(UserError, match=words):
            dataclasses.replace(config, decoder_dim_mult=wrong)


@both_forms
def test_latents_do_not_see_later_frames(form: str):
    before = video(form)
    after = before.copy()
    after[:, 6:] = -after[:, 6:]  # within the frames of the third latent
    a, b = (np.asarray(whole(form, "encode")(x).mean) for x in (before, after))
    np.testing.assert_array_equal(a[:, :2], b[:, :2])
    assert np.abs(a[:, 2:] - b[:, 2:]).max(axis=(0, 2, 3, 4)).min() > 1e-3


@both_forms
def test_frames_do_not_see_later_latents(form: str):
    before = latents(form)
    after = before.copy()
    after[:, 2:] = -after[:, 2:]
    a, b = (np.asarray(whole(form, "decode")(x)) for x in (before, after))
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert np.abs(a[:, 5:] - b[:, 5:]).max(axis=(0, 2, 3, 4)).min() > 1e-3


@both_forms
@pytest.mark.parametrize("chunk", [1, 2])  # of three later latents: 1 + 1 + 1, and 2 with a rest of 1
def test_streams_equal_the_whole_clip(form: str, chunk: int):
    graphdef, params = model(form)
    pieces = list(encode_stream(graphdef, params, video(form), chunk))
    assert [p.mean.shape[1] for p in pieces] == {1: [1, 1, 1, 1], 2: [1, 2, 1]}[chunk]
    expected = whole(form, "encode")(video(form))
    np.testing.assert_allclose(np.concatenate([p.mean for p in pieces], 1), expected.mean, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([p.logvar for p in pieces], 1), expected.logvar, atol=1e-5)

    frames = np.concatenate(list(decode_stream(graphdef, params, latents(form), chunk)), 1)
    np.testing.assert_allclose(frames, whole(form, "decode")(latents(form)), atol=1e-5)


@both_forms
def test_memory_does_not_grow_with_duration(form: str):
    config, (graphdef, params) = FORMS[form], model(form)
    shape = (1, 1, config.stride.height, config.stride.width, 3)

    def sizes(past: object) -> object:
        return jax.tree.map(lambda leaf: leaf.shape, past)

    def run(params: nnx.State, frame: jax.Array, latent: jax.Array):
        autoencoder = nnx.merge(graphdef, params)
        _, first_encode = autoencoder.encode_first(frame)
        _, later_encode = autoencoder.encode_chunk(jnp.tile(frame, (1, 12, 1, 1, 1)), first_encode)
        _, first_decode = autoencoder.decode_first(latent)
        _, later_decode = autoencoder.decode_chunk(jnp.tile(latent, (1, 3, 1, 1, 1)), first_decode)
        return (first_encode, first_decode), (later_encode, later_decode)

    first, later = jax.eval_shape(run, params, jnp.zeros(shape), jnp.zeros((1, 1, 1, 1, config.z_dim)))
    assert sizes(first) == sizes(later)


@both_forms
def test_every_parameter_has_a_place_on_the_mesh(form: str):
    _, params = model(form)
    variables = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    for variable in variables:
        axes = variable.get_metadata()["axes"]
        assert len(axes) == variable.get_value().ndim
        assert sharding.spec(axes) is not None  # refuses names that RULES lacks
    split = [v for v in variables if "channels_out" in v.get_metadata()["axes"]]
    assert sum(v.get_value().size for v in split) > 0.9 * sum(v.get_value().size for v in variables)


@both_forms
def test_compute_dtype_is_that_of_the_input(form: str):
    graphdef, params = model(form)

    def run(params: nnx.State, x: jax.Array):
        posterior = nnx.merge(graphdef, params).encode(x)
        return posterior.mean, posterior.logvar, nnx.merge(graphdef, params).decode(posterior.mean)

    out = jax.eval_shape(run, params, jnp.asarray(video(form, 5), jnp.bfloat16))
    assert {leaf.dtype for leaf in out} == {jnp.dtype(jnp.bfloat16)}


def test_normalize_is_per_channel_and_undone_by_denormalize():
    mean, std = (0.5, -1.0, 2.0), (2.0, 0.5, 1.0)
    config = dataclasses.replace(FORMS["2.1"], latents_mean=mean, latents_std=std)
    autoencoder = nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0)))
    x = latents("2.1")
    normal = autoencoder.normalize(jnp.asarray(x))
    np.testing.assert_allclose(normal, (x - np.array(mean)) / np.array(std), rtol=1e-6)
    np.testing.assert_allclose(autoencoder.denormalize(normal), x, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        ("encode", (1, 8, 8, 8, 3), "5 or 9"),
        ("encode", (1, 9, 12, 8, 3), "height 12 cannot be made: it must be a multiple of 8; nearest: 8 or 16"),
        ("encode_first", (1, 1, 8, 20, 3), "width 20"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(method: str, shape: tuple[int, ...], message: str):
    graphdef, params = model("2.2")
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda p: getattr(nnx.merge(graphdef, p), method)(jnp.zeros(shape)), params)


# --- config ----------------------------------------------------------------------------------------------------------


def test_config_survives_json():
    config = dataclasses.replace(FORMS["2.2"], latents_mean=(0.0, 1.0, 2.0), latents_std=(1.0, 2.0, 3.0))
    values = json.loads(json.dumps(config.to_dict() | {"_class_name": "AutoencoderKLWan"}))
    assert values["in_channels"] == values["out_channels"] == 12
    assert (values["scale_factor_temporal"], values["scale_factor_spatial"]) == (4, 8)
    assert AutoencoderConfig.from_dict(values) == config
    hash(AutoencoderConfig.from_dict(values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z_dims": 4}, 'unknown autoencoder config key "z_dims": did you mean "z_dim"'),
        ({"in_channels": 3}, "in_channels 3; patch_size 2 means 12"),
        ({"latents_mean": [0.0]}, "latents_mean has 1 entries; it needs one for each of the 3"),
        ({"temperal_downsample": [True]}, "1 entries for 3 levels; it needs 2"),
        ({"dim_mult": [1, 2, 4]}, "the last two entries must be equal"),
        ({"attn_scales": [0.5]}, "attn_scales"),
        ({"z_dim": 0}, "z_dim 0"),
    ],
)
def test_config_mistakes_are_named(changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        AutoencoderConfig.from_dict(FORMS["2.2"].to_dict() | changes)


# --- parts -----------------------------------------------------------------------------------------------------------


def direct_causal_conv(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Every window by itself, in float64; zeros before the first frame and around each."""
    kt, kh, kw = kernel.shape[:3]
    padded = np.pad(x, ((0, 0), (kt - 1, 0), (kh // 2,) * 2, (kw // 2,) * 2, (0, 0)))
    out = np.zeros((*x.shape[:4], kernel.shape[-1]))
    for t, h, w in np.ndindex(*x.shape[1:4]):
        window = padded[:, t : t + kt, h : h + kh, w : w + kw]
        out[:, t, h, w] = np.einsum("bijkc,ijkco->bo", window, kernel)
    return out


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("form", ["conv_2d_sum", "conv_3d", "by_products"])
def test_causal_convolution_is_the_direct_sum(form: str, frames: int):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, frames, 4, 5, 3)), rng.normal(size=(3, 3, 3, 3, 4))
    expected = direct_causal_conv(x, kernel)
    x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    conv = by_products if form == "by_products" else getattr(convolution, form)
    np.testing.assert_allclose(conv(x, kernel, 0), expected, atol=1e-4)
    if frames > 2:  # the first two frames as past: the rest is as before
        np.testing.assert_allclose(conv(x, kernel, 2), expected[:, 2:], atol=1e-4)


def by_products(x: jax.Array, kernel: jax.Array, lead: int) -> jax.Array:
    return convolution.conv_by_products(x, kernel, lead, 1, ((1, 1), (1, 1)))


@pytest.mark.parametrize(("frames", "lead"), [(1, 0), (2, 0), (5, 0), (3, 2), (6, 2)])
def test_all_forms_of_the_convolution_have_one_gradient(frames: int, lead: int):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, frames, 4, 3, 2)).astype(np.float32)
    weight = rng.normal(size=(2, frames - lead, 4, 3, 3)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 3, 2, 3)).astype(np.float32)

    def gradients(conv):
        arrays = jnp.asarray(x), jnp.asarray(kernel)
        return jax.grad(lambda x, k: jnp.sum(conv(x, k) * weight), argnums=(0, 1))(*arrays)

    native = gradients(lambda x, k: convolution.conv_3d(x, k, lead))
    forms = [gradients(lambda x, k, f=form: f(x, k, lead)) for form in (convolution.conv_2d_sum, by_products)]
    if not lead:
        forms.append(gradients(convolution.causal_conv))
    for ours in forms:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, native)


@pytest.mark.parametrize(("stride", "padding"), [(1, ((1, 1), (1, 1))), (2, ((0, 1), (0, 1)))])
def test_a_convolution_of_frames_has_the_gradient_of_finite_differences(stride: int, padding):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, 2, 4, 6, 2)), rng.normal(size=(3, 3, 2, 2))
    with jax.enable_x64(True):
        arrays = jnp.asarray(x), jnp.asarray(kernel)
        check_grads(jax.jit(lambda x, k: convolution.conv_frames(x, k, stride, padding)), arrays, 1, ["rev"])

        def products(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return convolution.conv_by_products(x, kernel[None], 0, stride, padding)

        np.testing.assert_allclose(products(*arrays), convolution.conv_frames(*arrays, stride, padding), atol=1e-9)
        check_grads(jax.jit(products), arrays, 1, ["rev"])


@pytest.mark.parametrize(("platform", "axes"), [("cpu", 4), ("tpu", 5), ("cuda", 5)])
def test_the_platform_compiled_for_chooses_the_convolution(platform: str, axes: int):
    x, kernel = jnp.zeros((1, 4, 4, 4, 2)), jnp.zeros((3, 3, 3, 2, 2))
    text = jax.jit(convolution.causal_conv).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert len(convolutions) == (3 if platform == "cpu" else 1)
    assert all(line.split("-> tensor<")[1].count("x") == axes for line in convolutions)


@pytest.mark.parametrize(
    "conv", [convolution.causal_conv, lambda x, k: convolution.conv_frames(x, k[0], 2, ((0, 1),) * 2)]
)
def test_bfloat16_on_a_cpu_is_computed_by_products_with_float32_sums(conv):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, 3, 6, 6, 40)), rng.normal(size=(3, 3, 3, 40, 4)) / 33
    x, kernel = (jnp.asarray(y, jnp.bfloat16) for y in (x, kernel))
    assert "stablehlo.convolution" not in jax.jit(conv).lower(x, kernel).as_text()
    exact = conv(x.astype(jnp.float32), kernel.astype(jnp.float32))
    # of the order of 1; sums are exact, and their result is rounded to 8 bits
    np.testing.assert_allclose(conv(x, kernel).astype(jnp.float32), exact, atol=0.02, rtol=0.004)


def test_untrained_convolutions_treat_every_frame_as_an_image():
    x = np.random.default_rng(0).normal(size=(1, 3, 4, 4, 2)).astype(np.float32)
    conv = causal_conv.CausalConv(2, 3, rngs=nnx.Rngs(0))
    of_clip, _ = conv(jnp.asarray(x))
    of_images = [conv(jnp.asarray(x[:, t : t + 1]))[0] for t in range(3)]
    assert np.abs(of_clip).max() > 0.1
    np.testing.assert_allclose(of_clip, np.concatenate(of_images, axis=1), atol=1e-6)

    halved = causal_conv.TimeConv(2, 2, stride=2, rngs=nnx.Rngs(0))(jnp.asarray(x))
    np.testing.assert_allclose(halved, x[:, 2:], atol=1e-6)
    doubled = causal_conv.TimeConv(2, 4, rngs=nnx.Rngs(0))(jnp.asarray(x))
    np.testing.assert_allclose(doubled, np.concatenate([x[:, 2:], x[:, 2:]], axis=-1), atol=1e-6)


def test_average_down_and_duplicate_up_are_direct_means_and_copies():
    x = np.random.default_rng(0).normal(size=(1, 3, 4, 2, 2)).astype(np.float32)
    padded = np.concatenate([np.zeros_like(x[:, :1]), x], axis=1)
    down = np.zeros((1, 2, 2, 1, 4))
    for t, h, w, o in np.ndindex(2, 2, 1, 4):  # channel o averages 4 of the 16 pairs (channel, offset), in that order
        window = padded[0, 2 * t : 2 * t + 2, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2]
        down[0, t, h, w, o] = window.transpose(3, 0, 1, 2).reshape(-1)[4 * o : 4 * o + 4].mean()
    np.testing.assert_allclose(causal_conv.average_down(jnp.asarray(x), 4, 2, 2, first=True), down, atol=1e-6)

    up = np.zeros((1, 6, 8, 4, 1))
    for t, h, w in np.ndindex(6, 8, 4):  # 8 pixels of one channel from 2 channels, each 4 times
        offset = 4 * (t % 2) + 2 * (h % 2) + w % 2
        up[0, t, h, w, 0] = x[0, t // 2, h // 2, w // 2, offset // 4]
    np.testing.assert_array_equal(causal_conv.duplicate_up(jnp.asarray(x), 1, 2, 2, first=False), up)
    np.testing.assert_array_equal(causal_conv.duplicate_up(jnp.asarray(x), 1, 2, 2, first=True), up[:, 1:])


def test_attention_in_blocks_is_attention():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 10, 4)).astype(np.float32) for _ in range(3))
    weights = np.exp(np.einsum("mqc,mnc->mqn", q, k) / 2.0)
    expected = np.einsum("mqn,mnc->mqc", weights / weights.sum(-1, keepdims=True), v)
    for block in (4, 10):  # 4 does not divide 10
        ours = autoencoder_blocks.attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), block)
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_channel_norm_has_unit_mean_square_and_a_finite_gradient_at_zero():
    norm = causal_conv.ChannelNorm(8, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (5, 8)) * 7.0
    np.testing.assert_allclose(jnp.mean(norm(x) ** 2, axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(norm(jnp.zeros((1, 8))), 0.0)
    assert np.isfinite(jax.grad(lambda x: norm(x).sum())(jnp.zeros((1, 8)))).all()


def test_posterior_samples_have_its_mean_and_variance():
    mean, logvar = jnp.array([1.0, -2.0]), jnp.array([0.0, np.log(0.25)])
    shape = (1, 1, 100, 100, 2)
    posterior = Posterior(jnp.broadcast_to(mean, shape), jnp.broadcast_to(logvar, shape))
    sample = np.asarray(posterior.sample(jax.random.key(0))).reshape(-1, 2)
    np.testing.assert_allclose(sample.mean(0), [1.0, -2.0], atol=0.04)  # 4 standard errors of 1 / sqrt(10,000)
    np.testing.assert_allclose(sample.std(0), [1.0, 0.5], rtol=0.03)
    # KL of N(m, s^2) from N(0, 1) is (m^2 + s^2 - 1) / 2 - log s: 0.5 and 1.625 + log 2.
    np.testing.assert_allclose(posterior.kl(), (0.5 + 1.625 + np.log(2.0)) / 2, rtol=1e-6)


# --- over a mesh -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "rows"), [("2.1", 8), ("2.2", 6)]
)  # of latents: four devices share 8 evenly, and not 6
def test_rows_of_pixels_lie_over_the_sequence_axis(form: str, rows: int):
    """Encode and decode, whole and in chunks, are what one device makes; none has the whole picture to convolve."""
    graphdef, params = model(form)
    stride = FORMS[form].stride
    rng = np.random.default_rng(3)
    z = jnp.asarray(rng.normal(size=(1, 3, rows, 2, FORMS[form].z_dim)), jnp.float32)
    x = jnp.asarray(rng.uniform(-1, 1, (1, 9, rows * stride.height, 2 * stride.width, 3)), jnp.float32)
    decoded, encoded = whole(form, "decode")(z), whole(form, "encode")(x).mean
    with jax.set_mesh(sharding.make_mesh({"data": 2, "sequence": 4})):
        decode = jax.jit(lambda params, z: nnx.merge(graphdef, params).decode(z))
        encode = jax.jit(lambda params, x: nnx.merge(graphdef, params).encode(x).mean)
        np.testing.assert_allclose(decode(params, z), decoded, atol=1e-5 * float(np.std(decoded)))
        np.testing.assert_allclose(encode(params, x), encoded, atol=1e-5 * float(np.std(encoded)))
        streamed = np.concatenate(list(decode_stream(graphdef, params, z, 1)), 1)
        np.testing.assert_allclose(streamed, decoded, atol=1e-5 * float(np.std(decoded)))
        if rows % 4 == 0:
            assert decode(params, z).sharding.spec[2] == "sequence"
            text = decode.lower(params, z).compile().as_text()
            assert text.count("collective-permute") > text.count("all-gather"), "borders go round, and not pictures"


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes", [{"data": 2, "sequence": 4}, {"fsdp": 4, "sequence": 2}, {"data": 2, "fsdp": 2, "sequence": 2}], ids=str
)
def test_one_small_picture_is_encoded_as_on_one_device(axes: dict[str, int]):
    """Two rows of latents: fewer than devices, or as many with kernels that are cut as well."""
    graphdef, params = model("2.2")
    stride = FORMS["2.2"].stride
    x = jnp.asarray(
        np.random.default_rng(4).uniform(-1, 1, (1, 1, 2 * stride.height, 2 * stride.width, 3)), jnp.float32
    )
    expected = nnx.merge(graphdef, params).encode(x).mean
    mesh = sharding.make_mesh(axes)
    with jax.set_mesh(mesh):
        places = jax.tree.broadcast(sharding.param_shardings(params, mesh), params)
        placed = jax.tree.map(jax.device_put, params, places)
        found = jax.jit(lambda params, x: nnx.merge(graphdef, params).encode(x).mean)(placed, x)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.std(expected)))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_a_tensor_axis_beside_the_rows_changes_nothing(method: str):
    graphdef, params = model("2.2")
    stride = FORMS["2.2"].stride
    shape = (2, 2, 4, 2, FORMS["2.2"].z_dim) if method == "decode" else (2, 5, 4 * stride.height, 2 * stride.width, 3)
    x = jnp.asarray(np.random.default_rng(5).normal(size=shape), jnp.float32)

    def run(params: nnx.State, x: jax.Array) -> jax.Array:
        made = getattr(nnx.merge(graphdef, params), method)(x)
        return made if method == "decode" else made.mean

    expected = run(params, x)
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2, "sequence": 2})
    with jax.set_mesh(mesh):
        places = jax.tree.broadcast(sharding.param_shardings(params, mesh), params)
        found = jax.jit(run)(jax.tree.map(jax.device_put, params, places), x)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.std(expected)))
