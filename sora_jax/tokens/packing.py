"""Packing: clips of any length and size share rows of equal length, and index arrays keep them apart.

A plan is made from shapes alone (`planning`), then filled (`fill_rows`), so that the program that reads the rows
compiles once whatever mixture of images and videos it is fed ("Patch n' Pack", Dehghani et al. 2023,
arXiv:2307.06304). Nothing is padded inside a clip and nothing is dropped: `unpack_rows` gives every clip back.

    clip      latents [F, h, w, C] and the token ids of its prompt; a cut clip has several shots, each with a prompt
    segment   a clip within its row, numbered from 1; 0 is padding
    group     one token frame of one clip: the unit that has a noise level of its own
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from sora_jax.pytrees import pytree
from sora_jax.shapes import Extent, Stride, token_extent
from sora_jax.tokens.patchify import patchify, token_positions, unpatchify
from sora_jax.tokens.planning import ClipShape, ShotSize

if TYPE_CHECKING:
    AnyArray = Any  # the loader fills rows with numpy, a step reads them as JAX arrays
else:
    AnyArray = jax.Array | np.ndarray


@pytree
@dataclass(frozen=True)
class PackedRows:
    """B rows of N tokens, each holding several clips and their prompts side by side; a pytree of ten arrays.

    Two tokens belong to one clip when their `segment_ids` agree; a token reads the text whose `text_ids` equal its
    `prompt_ids`, which are consecutive for the shots of a clip; its noise level is that of its group. Every id counts
    from 1 within its row, and 0 is padding, except `level_ids`, which index the G groups of the row (padding tokens
    point at group 0). Time counts through all shots of a clip from 0, and from 1 in a window without its first latent.
    """

    tokens: Float[AnyArray, "B N P"]  # clean normalised latents, one patch a token
    positions: Int[AnyArray, "B N 3"]  # (time, height, width) of the token in its clip, in tokens
    segment_ids: Int[AnyArray, "B N"]
    prompt_ids: Int[AnyArray, "B N"]
    level_ids: Int[AnyArray, "B N"]
    group_segment: Int[AnyArray, "B G"]  # the clip a group belongs to; 0 = unused group
    group_frame: Int[AnyArray, "B G"]  # which frame of its clip: the time of its tokens
    group_count: Int[AnyArray, "B G"]  # how many frames its clip has, a first one that was cut off included
    text_tokens: Int[AnyArray, "B L"]
    text_ids: Int[AnyArray, "B L"]

    def replace(self, **changes: object) -> PackedRows:
        return dataclasses.replace(self, **changes)


class Clip(NamedTuple):
    """What a row is filled with: float32 latents `[F, h, w, C]` and int32 token ids `[L]` of the prompt; of a cut clip
    the latents and prompts of all shots, one after the other."""

    latents: np.ndarray
    text: np.ndarray
    shots: tuple[ShotSize, ...] = ()  # of a cut clip; () for one shot
    headless: bool = False  # a window that begins inside a span, after its first latent


class FillRatio(NamedTuple):
    """The shares of a row's places that hold something, each in [0, 1]."""

    tokens: float
    text: float
    groups: float


def clip_shape(clip: Clip, patch: Stride = Stride(1, 1, 1)) -> ClipShape:
    extent = token_extent(Extent(*clip.latents.shape[:3]), patch)
    return ClipShape(extent.volume, len(clip.text), extent.frames)


# ---------------------------------------------------------------------------------------------------------------- fill


def fill_rows(
    plan: Sequence[Sequence[int]],
    clips: Sequence[Clip],
    *,
    row_tokens: int,
    row_text: int,
    row_groups: int,
    patch: Stride = Stride(1, 1, 1),
    channels: int | None = None,
) -> dict[str, np.ndarray]:
    """The arrays of `PackedRows`, by field name: row r holds the clips `plan[r]`, side by side from its start.
    `channels` of the latents have to be said where there may be no clip.

    Tokens of a clip run frame by frame, row by row (the order of `patchify`). float32 tokens, everything else int32.
    Raises `ValueError` for a plan that does not fit its rows: those of `planning` with the same limits always do.
    """
    if channels is None:
        if not clips:
            raise ValueError("no clips: a batch of nothing has no channels")
        channels = clips[0].latents.shape[-1]
    B, N, L, G = len(plan), row_tokens, row_text, row_groups
    P = channels * patch.time * patch.height * patch.width
    ints = {
        "positions": (B, N, 3), "segment_ids": (B, N), "prompt_ids": (B, N), "level_ids": (B, N),
        "group_segment": (B, G), "group_frame": (B, G), "group_count": (B, G),
        "text_tokens": (B, L), "text_ids": (B, L),
    }  # fmt: skip
    out = {"tokens": np.zeros((B, N, P), np.float32)} | {name: np.zeros(s, np.int32) for name, s in ints.items()}

    for b, row in enumerate(plan):
        n = g = t = p = 0  # tokens, groups, text tokens and prompts placed so far
        for segment, index in enumerate(row, start=1):
            clip = clips[index]
            extent = token_extent(Extent(*clip.latents.shape[:3]), patch)
            here, frames, text = (
                slice(n, n + extent.volume), slice(g, g + extent.frames), slice(t, t + len(clip.text))
            )  # fmt: skip
            if here.stop > N or frames.stop > G or text.stop > L:
                raise ValueError(
                    f"row {b} of the plan does not fit: its clips take more than {N} tokens, {L} text, {G} groups"
                )
            positions, first = _positions(extent), int(clip.headless)
            out["tokens"][b, here] = patchify(clip.latents, patch)
            out["positions"][b, here] = positions
            out["positions"][b, here, 0] += first
            out["segment_ids"][b, here] = segment
            out["level_ids"][b, here] = positions[:, 0] + g
            out["group_segment"][b, frames] = segment
            out["group_frame"][b, frames] = first + np.arange(extent.frames)
            out["group_count"][b, frames] = first + extent.frames
            out["text_tokens"][b, text] = clip.text
            shots = clip.shots or (ShotSize(len(clip.latents), len(clip.text)),)
            prompts = np.arange(p + 1, p + 1 + len(shots))
            tokens_of = [shot.frames // patch.time * extent.height * extent.width for shot in shots]
            out["prompt_ids"][b, here] = np.repeat(prompts, tokens_of)
            out["text_ids"][b, text] = np.repeat(prompts, [shot.text for shot in shots])
            n, g, t, p = here.stop, frames.stop, text.stop, p + len(shots)
    return out


@lru_cache(maxsize=256)
def _positions(extent: Extent) -> np.ndarray:
    positions = token_positions(extent)
    positions.setflags(write=False)
    return positions


def unpack_rows(rows: Mapping[str, np.ndarray], patch: Stride = Stride(1, 1, 1)) -> list[list[Clip]]:
    """The inverse of `fill_rows`: for each row its clips in order, found from the index arrays alone."""
    unpacked: list[list[Clip]] = []
    for b in range(len(rows["tokens"])):
        segments, prompts, clips = rows["segment_ids"][b], rows["prompt_ids"][b], []
        for segment in range(1, int(segments.max(initial=0)) + 1):
            here = segments == segment
            places = rows["positions"][b, here]
            extent = Extent(*(int(size) for size in places.max(axis=0) - places.min(axis=0) + 1))
            latents = Extent(*(size * step for size, step in zip(extent, patch, strict=True)))
            ids, tokens = np.unique(prompts[here], return_counts=True)
            texts = [rows["text_tokens"][b, rows["text_ids"][b] == prompt] for prompt in ids]
            lengths = tokens // (extent.height * extent.width) * patch.time
            shots = tuple(ShotSize(int(n), len(text)) for n, text in zip(lengths, texts, strict=True))
            video = unpatchify(rows["tokens"][b, here], latents, patch)
            clips.append(Clip(video, np.concatenate(texts), shots if len(shots) > 1 else (), bool(places[0, 0])))
        unpacked.append(clips)
    return unpacked


def fill_ratio(rows: Mapping[str, np.ndarray]) -> FillRatio:
    """How full packed rows are: the shares of token, text and group places in use."""
    return FillRatio(*(float(np.mean(rows[name] > 0)) for name in ("segment_ids", "text_ids", "group_segment")))
