"""Tokens that pass by the middle blocks in training: which, what becomes of them, and what a step then is."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from one_video import one_video

from sora_jax.bench.compute import training_flops
from sora_jax.bench.programs import training_program
from sora_jax.config import load_config
from sora_jax.errors import UserError
from sora_jax.models.routing import draw_through, put_back, take
from sora_jax.models.transformer import Transformer, TransformerConfig
from sora_jax.shapes import Condition, Extent, Stride
from sora_jax.sharding import make_mesh
from sora_jax.training.diffusion_stage import diffusion_flops

EXTENT = Extent(2, 2, 3)
CONFIG = TransformerConfig(
    n_layers=3, n_heads=2, head_dim=8, ffn_dim=24, in_channels=3, out_channels=3, patch=Stride(1, 1, 1), text_dim=6
)


@pytest.fixture(scope="module")
def parameters() -> nnx.State:
    rng = np.random.default_rng(0)
    shapes = nnx.split(nnx.eval_shape(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0))), graph=False)[1]
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(scale=0.3, size=p.shape), jnp.float32), shapes)


@partial(jax.jit, static_argnums=0)
def velocity(
    config: TransformerConfig,
    params: nnx.State,
    tokens: jax.Array,
    condition: Condition,
    through: jax.Array | None = None,
) -> jax.Array:
    graphdef = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), graph=False)[0]
    return nnx.merge(graphdef, params)(tokens, jnp.full((1, 1), 400.0), condition, through=through)


def test_as_many_as_asked_go_through_and_padding_first_passes_by():
    ids = jnp.asarray([[1, 1, 1, 0, 0, 2, 2, 2], [1] * 8])
    for seed in range(20):
        through = np.asarray(draw_through(jax.random.key(seed), ids, 0.3))  # round(2.4) = 2 pass by
        assert through.shape == (2, 6)
        assert (np.diff(through, axis=1) > 0).all(), "each once, in order"
        assert set(through[0]) == {0, 1, 2, 5, 6, 7}
    drawn = [np.asarray(draw_through(jax.random.key(seed), ids, 0.5))[1] for seed in range(400)]
    often = np.bincount(np.concatenate(drawn), minlength=8) / len(drawn)
    np.testing.assert_allclose(often, 0.5, atol=0.12)  # five standard deviations of 400 draws


def test_what_is_taken_comes_back_to_its_place():
    rng = np.random.default_rng(0)
    x, part = rng.normal(size=(2, 5, 3)).astype(np.float32), rng.normal(size=(2, 2, 3)).astype(np.float32)
    through = np.array([[0, 3], [1, 4]])
    np.testing.assert_array_equal(take(jnp.asarray(x), jnp.asarray(through)), [x[0, [0, 3]], x[1, [1, 4]]])
    expected = x.copy()
    expected[0, [0, 3]], expected[1, [1, 4]] = part
    np.testing.assert_array_equal(put_back(*map(jnp.asarray, (x, part, through))), expected)


def test_where_all_go_through_nothing_changes(parameters):
    tokens, condition = one_video(np.random.default_rng(1), EXTENT, channels=3, text=(4, 6))
    everyone = jnp.arange(EXTENT.volume)[None]
    found = velocity(CONFIG, parameters, tokens, condition, everyone)
    np.testing.assert_allclose(found, velocity(CONFIG, parameters, tokens, condition), atol=1e-5)


def test_the_middle_knows_those_alone_that_go_through(parameters):
    """A token that passes by has no part in the middle: without blocks around it, the others' outputs are those of a
    video that holds nothing else, and its own are those of no block at all."""
    config = dataclasses.replace(CONFIG, route_share=0.5, route_around=(0, 0))
    tokens, condition = one_video(np.random.default_rng(2), EXTENT, channels=3, text=(4, 6))
    through = jnp.asarray([[0, 2, 5, 6, 9, 11]])
    found = velocity(config, parameters, tokens, condition, through)

    chosen = np.asarray(through[0])
    names = ("positions", "segment_ids", "prompt_ids", "level_ids", "given")
    alone = condition.replace(**{name: getattr(condition, name)[:, chosen] for name in names})
    np.testing.assert_allclose(
        found[:, chosen], velocity(CONFIG, parameters, tokens[:, chosen], alone), rtol=1e-5, atol=1e-5
    )
    others = np.setdiff1d(np.arange(EXTENT.volume), chosen)
    empty = jax.tree.map(jnp.zeros_like, parameters["blocks"])  # a block whose outputs are 0 adds nothing
    passed = velocity(CONFIG, parameters | {"blocks": empty}, tokens, condition)
    np.testing.assert_allclose(found[:, others], passed[:, others], rtol=1e-5, atol=1e-5)


def test_every_token_has_a_gradient(parameters):
    tokens, condition = one_video(np.random.default_rng(3), EXTENT, channels=3, text=(4, 6))
    config = dataclasses.replace(CONFIG, route_share=0.5)
    through = draw_through(jax.random.key(0), condition.segment_ids, 0.5)
    slope = jax.grad(lambda x: jnp.sum(jnp.sin(velocity(config, parameters, x, condition, through))))(tokens)
    assert (np.abs(np.asarray(slope)).max(axis=-1) > 0).all()


@pytest.mark.slow
def test_a_step_is_cheaper_by_what_passes_by():
    """Counted from the program of the study's step, beside the operations of its products by hand."""
    flags = ["transformer.route_share=0.5", "transformer.route_around=(1,1)"]
    counted, config = {}, {}
    for name, told in (("all", []), ("routed", flags)):
        config[name] = load_config("study", told)
        program = training_program(config[name], make_mesh({"data": 1}, jax.devices()[:1]), jnp.dtype("float32"))
        counted[name] = np.array(training_flops(config[name], program, "cpu"))
    t, data, rows = config["all"].transformer, config["all"].data, config["all"].train.batch_size
    N, L, D = data.row_tokens, data.row_text, t.dim
    of_tokens = 2 * (6 * D**2 + 2 * D * t.ffn_dim) + 4 * L * D
    saved = 2 * ((N - N // 2) * of_tokens + 4 * (N**2 - (N // 2) ** 2) * D)  # in two of four blocks
    np.testing.assert_allclose(counted["all"] - counted["routed"], 3 * rows * saved, rtol=0.03)
    one = [diffusion_flops(config[name].transformer, config[name].text_encoder, N, L) for name in ("all", "routed")]
    assert one[0] - one[1] == pytest.approx(saved)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["transformer.route_share=1.0"], "route_share must be in"),
        (["transformer.route_share=0.5", "transformer.route_around=(6,6)"], "leaves no block of 12 to pass by"),
        (["transformer.route_share=0.5", "transformer.route_around=(-1,1)"], "leaves no block of 12 to pass by"),
    ],
)
def test_mistakes(flags: list[str], says: str):
    with pytest.raises(UserError, match=says):
        load_config("world", flags)
