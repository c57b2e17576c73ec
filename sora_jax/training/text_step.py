"""Teaching the text encoder to read before it is trained with a transformer: the loss and one step.

    caption ── text encoder ── mean over its tokens ── one linear layer ── answers ── cross-entropy

The velocity loss alone tells a byte-level encoder very little about what letters mean, and for tens of thousands of
clips colours and objects are mixed up. The answers come with every caption of the procedural world
(`data.world.questions`), cost no frames, and what was learned is handed to the diffusion stage by `train.init`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from sora_jax.data.world.questions import captions_with_answers
from sora_jax.data.world.scene import Mix
from sora_jax.errors import UserError
from sora_jax.models.layers import Linear
from sora_jax.models.tokenizer import ByteTokenizer
from sora_jax.tokens.packing import AnyArray
from sora_jax.training.accumulation import accumulated
from sora_jax.training.state import TrainState, apply_gradients

# The root mean square of what is handed to a transformer, held by the scale of the encoder's last norm. One that is
# shouted at learns to close its ears before it learns to read: questions alone take it to 1.6, where captions are worth
# .05 of the loss at level .95 after 2,880 steps; at .25 and .44 they are worth .11 to .30 (docs/world.md, "Quietly").
EMBEDDING_RMS = 0.25


@dataclass(frozen=True)
class ReadingConfig:
    """The text stage."""

    # Weight of how far embeddings go from those of the text encoder in train.init, as a share of their mean square: a
    # transformer that listens to that one understands what has learned new words, too. 0: they go where questions take
    # them, at a size that is held (`EMBEDDING_RMS`).
    anchor: float = 0.0

    def __post_init__(self) -> None:
        if self.anchor < 0:
            raise UserError(f"reading.anchor must be >= 0, not {self.anchor}")


class Anchor(NamedTuple):
    """The text encoder that embeddings stay near, and how much that weighs (`ReadingConfig.anchor`)."""

    text_encoder: nnx.State
    weight: float | Float[Array, ""]


class Captions(NamedTuple):
    """B captions, one a row."""

    text_tokens: Int[AnyArray, "B L"]
    text_ids: Int[AnyArray, "B L"]  # 1, and 0 for padding
    answers: Int[AnyArray, "B Q"]


def world_captions(
    seed: int, first: int, rows: int, row_text: int, mix: Mix, *, split: str = "train", dense: bool = True
) -> Captions:
    """Captions of the world from scene `first` on: a short and a dense one of each scene, or short ones alone.

    What does not fit into `row_text` tokens is cut off at the end.
    """
    tokens, ids = (np.zeros((rows, row_text), np.int32) for _ in range(2))
    tokenizer = ByteTokenizer(max_length=row_text)
    scenes = range(first, first + -(-rows // (1 + dense)))
    made = captions_with_answers(seed, scenes, split=split, dense=dense, mix=mix)[:rows]
    for row, (text, _) in enumerate(made):
        encoded = tokenizer.encode(text[: row_text - 1])
        tokens[row, : len(encoded)], ids[row, : len(encoded)] = encoded, 1
    return Captions(tokens, ids, np.stack([answers for _, answers in made]))


class Reader(nnx.Module):
    """The mean of encoded tokens -> scores of every answer to every question, side by side.

    `counts` says how many answers each question has (`data.world.questions.answer_counts`).
    """

    def __init__(self, width: int, counts: tuple[int, ...], *, rngs: nnx.Rngs):
        self.head = Linear(width, sum(counts), ("embed", None), rngs=rngs)
        self.counts = counts

    def __call__(self, encoded: Float[Array, "B L D"], text_ids: Int[Array, "B L"]) -> list[Float[Array, "B answers"]]:
        used = (text_ids > 0).astype(jnp.float32)[..., None]
        mean = jnp.sum(encoded.astype(jnp.float32) * used, axis=1) / jnp.maximum(jnp.sum(used, axis=1), 1.0)
        scores, ends = self.head(mean / EMBEDDING_RMS), np.cumsum((0, *self.counts)).tolist()
        return [scores[:, start:end] for start, end in pairwise(ends)]


class TextModules(NamedTuple):
    """The structure of the two networks; their parameters travel in `TrainState.params` under the same names."""

    text_encoder: nnx.GraphDef
    reader: nnx.GraphDef


def reading_loss(
    modules: TextModules,
    params: Mapping[str, Any],
    captions: Captions,
    *,
    anchor: Anchor | None = None,
    dtype: jnp.dtype | type = jnp.float32,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """What is learned: mean cross-entropy over captions and questions, in nats, and how far embeddings have moved from
    their anchor, times its weight.

    And {"accuracy", "all"}, the share of right answers, and of captions with every answer right; with an anchor
    "moved", too: the squared distance of a caption's embeddings as a share of their square there, mean over captions.
    """
    params = _held(params) if anchor is None else params
    encoded = nnx.merge(modules.text_encoder, params["text_encoder"])(*captions[:2], dtype=dtype)
    scores = nnx.merge(modules.reader, params["reader"])(encoded, captions.text_ids)
    answers = [captions.answers[:, i] for i in range(len(scores))]
    losses = [optax.softmax_cross_entropy_with_integer_labels(s, a) for s, a in zip(scores, answers, strict=True)]
    right = jnp.stack([jnp.argmax(s, axis=-1) == a for s, a in zip(scores, answers, strict=True)])
    loss = jnp.mean(jnp.stack(losses))
    shares = {"accuracy": jnp.mean(right), "all": jnp.mean(jnp.all(right, axis=0))}
    if anchor is not None:
        before = nnx.merge(modules.text_encoder, anchor.text_encoder)(*captions[:2], dtype=dtype)
        used = (captions.text_ids > 0)[..., None]
        moved = jnp.sum(used * (encoded - before) ** 2, axis=(1, 2))
        shares["moved"] = jnp.mean(moved / jnp.sum(used * before**2, axis=(1, 2)))
        loss += anchor.weight * shares["moved"]
    return loss, shares


def make_text_step(
    modules: TextModules,
    optimizer: optax.GradientTransformation,
    *,
    clip_norm: float = 1.0,
    spike_sigmas: float = 0.0,
    ema_decay: float = 0.999,
    dtype: jnp.dtype | type = jnp.float32,
    accumulate: int = 1,
) -> Callable[..., tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """`step(state, captions, anchor) -> (state, metrics)`, jitted, with `state` donated; in `accumulate` passes."""

    def step(
        state: TrainState, captions: Captions, anchor: Anchor | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        def share(params: Any, captions: Captions) -> tuple[jax.Array, dict[str, jax.Array]]:
            # Means over captions, of which each pass has as many: their mean is that of the batch.
            means = reading_loss(modules, params, captions, anchor=anchor, dtype=dtype)
            return jax.tree.map(lambda mean: mean / accumulate, means)

        (loss, shares), grads = accumulated(share, state.params, captions, accumulate)
        state, metrics = apply_gradients(
            state, grads, loss, optimizer, clip_norm=clip_norm, spike_sigmas=spike_sigmas, ema_decay=ema_decay
        )
        if anchor is None:
            state = state.replace(params=_held(state.params), ema=_held(state.ema))
        return state, {"loss": loss, **shares, **metrics}

    return jax.jit(step, donate_argnums=0)


def _held(params: Any) -> Any:
    """`params` with the embeddings' size as it shall be, whatever encoder they began as."""
    params = jax.tree.map(lambda leaf: leaf, params)  # a tree of its own
    scale = params["text_encoder"]["norm"]["scale"]
    scale.set_value(jnp.full_like(scale.get_value(), EMBEDDING_RMS))
    return params
