"""What the text stage learns: answers, and with an anchor to stay near the text encoder that it began from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sora_jax.config import load_config
from sora_jax.errors import UserError
from sora_jax.models.structure import parameters_of, structure_of
from sora_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from sora_jax.training.loop import train
from sora_jax.training.state import TrainState, make_init
from sora_jax.training.text_step import Anchor, Captions, Reader, TextModules, make_text_step, reading_loss

TEXT = TextEncoderConfig(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
MAKE = {
    "text_encoder": lambda rngs: TextEncoder(TEXT, rngs=rngs),
    "reader": lambda rngs: Reader(TEXT.d_model, (3, 5), rngs=rngs),
}
MODULES = TextModules(**{name: structure_of(make) for name, make in MAKE.items()})
ROWS, LENGTH = 6, 10


def params(seed: int) -> dict[str, nnx.State]:
    return {name: parameters_of(make(nnx.Rngs(params=seed))) for name, make in MAKE.items()}


@pytest.fixture(scope="module")
def captions() -> Captions:
    rng = np.random.default_rng(0)
    ids = (np.arange(LENGTH) < rng.integers(3, LENGTH, (ROWS, 1))).astype(np.int32)
    answers = np.stack([rng.integers(0, 3, ROWS), rng.integers(0, 5, ROWS)], axis=1)
    return Captions(*map(jnp.asarray, (rng.integers(3, 259, ids.shape).astype(np.int32) * ids, ids, answers)))


def begun(start: dict[str, nnx.State], optimizer: optax.GradientTransformation) -> TrainState:
    """Every array its own, as steps are given theirs to keep."""
    return jax.tree.map(jnp.array, make_init(lambda key: start, optimizer)(jax.random.key(0)))


def encoded(encoder: nnx.State, captions: Captions) -> list[np.ndarray]:
    """The embeddings of each caption's own tokens."""
    found = nnx.merge(MODULES.text_encoder, encoder)(captions.text_tokens, captions.text_ids)
    return [row[ids > 0] for row, ids in zip(np.asarray(found), np.asarray(captions.text_ids), strict=True)]


def how_far(encoder: nnx.State, there: nnx.State, captions: Captions) -> float:
    """By how much of their square the embeddings of a caption differ, mean over captions."""
    pairs = zip(encoded(encoder, captions), encoded(there, captions), strict=True)
    return float(np.mean([np.square(now - before).sum() / np.square(before).sum() for now, before in pairs]))


def test_an_anchor_adds_how_far_embeddings_have_moved(captions: Captions):
    ours, there = params(0), params(1)["text_encoder"]
    moved = how_far(ours["text_encoder"], there, captions)
    free, _ = reading_loss(MODULES, ours, captions, anchor=Anchor(there, 0.0))
    loss, shares = reading_loss(MODULES, ours, captions, anchor=Anchor(there, 0.3))
    assert float(shares["moved"]) == pytest.approx(moved, rel=1e-5)
    assert float(loss - free) == pytest.approx(0.3 * moved, rel=1e-4)
    assert moved > 0.1


@pytest.mark.parametrize(("anchor", "low", "high"), [(1e-3, 0.05, np.inf), (30.0, 0.0, 0.01)])
def test_what_is_anchored_learns_near_where_it_began(captions: Captions, anchor: float, low: float, high: float):
    """One answers as well as it can, wherever that takes it; the other as near as it is told to stay."""
    start = params(0)
    there = jax.tree.map(jnp.array, start["text_encoder"])
    state = begun(start, optax.adam(3e-3))
    step = make_text_step(MODULES, optax.adam(3e-3))
    losses = []
    for _ in range(60):
        state, metrics = step(state, captions, Anchor(there, anchor))
        losses.append(float(metrics["loss"]))
    assert low < how_far(state.params["text_encoder"], there, captions) < high
    assert losses[-1] < 0.8 * losses[0]


def test_the_size_of_what_is_not_anchored_is_held(captions: Captions):
    state = begun(params(0), optax.adam(1e-2))
    step = make_text_step(MODULES, optax.adam(1e-2))
    for _ in range(3):
        state, metrics = step(state, captions)
    assert "moved" not in metrics
    for row in encoded(state.params["text_encoder"], captions):
        np.testing.assert_allclose(np.sqrt(np.square(row).mean(axis=-1)), 0.25, rtol=1e-3)


def test_an_anchor_is_a_weight():
    with pytest.raises(UserError, match=r"reading\.anchor must be >= 0, not -1"):
        load_config("world_2_text", ["reading.anchor=-1"])


def test_an_anchor_wants_what_to_stay_near(tmp_path):
    with pytest.raises(UserError, match=r"near those of another text encoder: name it in train\.init"):
        train(load_config("world_2_text"), tmp_path / "run", say=lambda line: None)
    assert not (tmp_path / "run").exists()
