"""The transformer: packing changes nothing, nothing leaks, and its pieces are what the papers say."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.errors import UserError
from sora_jax.models import rope
from sora_jax.models.transformer import REMAT, Transformer, TransformerConfig, level_embedding
from sora_jax.shapes import Condition, Extent, Stride
from sora_jax.tokens.patchify import token_positions

CONFIG = TransformerConfig(
    n_layers=2, n_heads=2, head_dim=12, ffn_dim=48, in_channels=5, out_channels=5, patch=Stride(1, 1, 1), text_dim=10
)
VIDEOS = [(Extent(3, 2, 2), 4), (Extent(1, 2, 3), 2), (Extent(2, 3, 1), 5)]  # (tokens, text length)


@pytest.fixture(scope="module")
def model():
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0))), graph=False)
    # All random: the head starts at zero, which would make every comparison trivial.
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(scale=0.3, size=p.shape), jnp.float32), shapes)
    return jax.jit(nnx.merge(graphdef, params))


def single(i: int):
    """Video i alone in a row of its own: (tokens, time, condition)."""
    extent, length = VIDEOS[i]
    rng = np.random.default_rng(i)
    n = extent.volume
    frames = np.repeat(np.arange(extent.frames), extent.height * extent.width)
    condition = Condition(
        positions=jnp.asarray(token_positions(extent))[None],
        segment_ids=jnp.ones((1, n), jnp.int32),
        prompt_ids=jnp.ones((1, n), jnp.int32),
        level_ids=jnp.asarray(frames, jnp.int32)[None],
        given=jnp.zeros((1, n), bool),
        text=jnp.asarray(rng.normal(size=(1, length, CONFIG.text_dim)), jnp.float32),
        text_ids=jnp.ones((1, length), jnp.int32),
    )
    tokens = jnp.asarray(rng.normal(size=(1, n, 5)), jnp.float32)
    return tokens, jnp.asarray(rng.uniform(0, 1000, (1, extent.frames)), jnp.float32), condition


def packed(padding: int = 3):
    """All videos in one row, with padding tokens and padding text at the end."""
    tokens, times, conditions = zip(*(single(i) for i in range(len(VIDEOS))), strict=True)

    def join(arrays, pad=padding):
        row = jnp.concatenate(arrays, axis=1)
        return jnp.pad(row, ((0, 0), (0, pad), *((0, 0),) * (row.ndim - 2)))

    groups = np.cumsum([0] + [t.shape[1] for t in times])
    condition = Condition(
        positions=join([c.positions for c in conditions]),
        segment_ids=join([c.segment_ids * (i + 1) for i, c in enumerate(conditions)]),
        prompt_ids=join([c.prompt_ids * (i + 1) for i, c in enumerate(conditions)]),
        level_ids=join([c.level_ids + int(groups[i]) for i, c in enumerate(conditions)]),
        given=join([c.given for c in conditions]),
        text=join([c.text for c in conditions]),
        text_ids=join([c.text_ids * (i + 1) for i, c in enumerate(conditions)]),
    )
    return join(tokens), jnp.concatenate(times, axis=1), condition


def test_packed_rows_equal_separate_forwards(model):
    with jax.default_matmul_precision("highest"):
        row = model(*packed())
        start = 0
        for i, (extent, _) in enumerate(VIDEOS):
            alone = model(*single(i))
            here = row[:, start : start + extent.volume]
            np.testing.assert_allclose(here, alone, rtol=0, atol=1e-5)
            assert np.abs(alone).max() > 0.1
            start += extent.volume


def test_nothing_leaks_between_packed_videos(model):
    """Perturbing one video and its text leaves every bit of the others as it was."""
    tokens, time, condition = packed()
    plain = np.asarray(model(tokens, time, condition))
    other = np.asarray(condition.segment_ids) != 2
    shaken = np.asarray(
        model(
            jnp.where(other[..., None], tokens, 1e3),
            time,
            condition.replace(text=jnp.where((condition.text_ids == 2)[..., None], 1e3, condition.text)),
        )
    )
    real = other & (np.asarray(condition.segment_ids) > 0)
    np.testing.assert_array_equal(plain[real], shaken[real])
    assert (plain[~other] != shaken[~other]).any()


def test_a_token_reads_its_own_level_and_its_own_prompt(model):
    tokens, time, condition = single(0)
    plain = np.asarray(model(tokens, time, condition))
    for change in (
        (tokens, time.at[0, 1].add(100.0), condition),
        (tokens, time, condition.replace(text=condition.text.at[0, 2].add(1.0))),
        (tokens, time, condition.replace(positions=condition.positions.at[..., 0].multiply(2))),
    ):
        assert np.abs(plain - np.asarray(model(*change))).max() > 1e-3
    blind = condition.replace(prompt_ids=jnp.zeros_like(condition.prompt_ids))
    a = model(tokens, time, blind)
    b = model(tokens, time, blind.replace(text=condition.text + 1.0))
    np.testing.assert_array_equal(a, b)


def test_untrained_output_is_zero_and_remat_changes_no_gradient():
    tokens, time, condition = single(0)
    gradients = []
    for remat in REMAT:
        graphdef, params = nnx.split(
            Transformer(dataclasses.replace(CONFIG, remat=remat), rngs=nnx.Rngs(0)), graph=False
        )

        def loss(params, graphdef=graphdef):
            out = nnx.merge(graphdef, params)(tokens, time, condition)
            return jnp.mean((out - 1.0) ** 2), out

        gradient, out = jax.jit(jax.grad(loss, has_aux=True))(params)
        np.testing.assert_array_equal(out, 0.0)
        gradients.append(gradient)
    for other in gradients[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradients[0], other)


def test_level_embedding_has_cosines_first():
    time = np.array([[0.0, 1.0, 999.5]])
    frequencies = 10000.0 ** (-np.arange(4) / 4)
    angles = time[..., None] * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    np.testing.assert_allclose(level_embedding(jnp.asarray(time, jnp.float32), 8), expected, atol=1e-4)


def test_rotation_depends_on_distance_alone_and_splits_44_42_42():
    assert rope.axis_widths(128) == (44, 42, 42)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 12)), jnp.float32) for _ in range(2))

    def score(at_q, at_k):
        turned = [rope.rotate(x, rope.rotation(jnp.asarray([[at]], jnp.int32), 12)) for x, at in ((q, at_q), (k, at_k))]
        return float(jnp.sum(turned[0] * turned[1]))

    near = score((3, 5, 7), (1, 9, 2))
    assert score((503, 605, 707), (501, 609, 702)) == pytest.approx(near, abs=1e-4)
    for moved in ((4, 5, 7), (3, 6, 7), (3, 5, 8)):
        assert abs(score(moved, (1, 9, 2)) - near) > 1e-3
    # By complex numbers: pair i turns by position * theta^(-2 i / width).
    turned = np.asarray(rope.rotate(q, rope.rotation(jnp.asarray([[[9, 0, 0]]], jnp.int32), 12)))[0, 0, 0]
    width = rope.axis_widths(12)[0]
    pairs = np.asarray(q)[0, 0, 0, :width].reshape(-1, 2) @ [1, 1j]
    pairs *= np.exp(1j * 9 * 10000.0 ** (-np.arange(0, width, 2) / width))
    np.testing.assert_allclose(turned[:width], np.stack([pairs.real, pairs.imag], -1).ravel(), atol=1e-5)


def test_bad_configs_are_refused():
    with pytest.raises(UserError, match="remat"):
        TransformerConfig(remat="ful")
    with pytest.raises(UserError, match="head_dim"):
        TransformerConfig(head_dim=7)
    with pytest.raises(UserError, match="n_layers must be >= 1, not 0"):
        TransformerConfig(n_layers=0)
