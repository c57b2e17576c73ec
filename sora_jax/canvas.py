"""The canvas: what a video is to be, before it is one.

A canvas is a list of spans. A span is a clip of its own for the autoencoder: 1 + 4k frames with a first latent of
their own, and a prompt. Frames at its beginning may be given; the rest is made. Everything a user can ask for is a
canvas:

    text_to_video   one span, nothing given
    animate         one span whose first frame is given
    extend          one span that begins with the frames of a video
    connect         a span that is made, then one that is given whole: the last frame, or a clip to arrive at
    storyboard      several spans, each with a prompt: shots of one video that see each other, with cuts between them

`lay_out` turns a canvas into the index arrays of a row of tokens (see `shapes.Condition`). Time counts latents across
spans. The autoencoder is causal, so what is given at the beginning of a span has the same latents whatever follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, UInt8

from sora_jax.errors import UserError
from sora_jax.shapes import Extent, Stride, latent_extent, token_extent
from sora_jax.tokens.patchify import token_positions


@dataclass(frozen=True)
class Span:
    """A clip of `frames` frames that follows `prompt`; `given` [T0, H, W, 3] are its first frames, T0 = 1 + 4j <=
    frames."""

    frames: int
    prompt: str
    given: UInt8[np.ndarray, "T0 H W 3"] | None = None


@dataclass(frozen=True)
class Canvas:
    """Spans of one height and width (pixels), one after the other."""

    spans: tuple[Span, ...]
    height: int
    width: int

    @property
    def frames(self) -> int:
        return sum(span.frames for span in self.spans)

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(span.prompt for span in self.spans)


# ------------------------------------------------------------------------------------------------ constructors


def text_to_video(prompt: str, extent: Extent) -> Canvas:
    """A video of (frames, height, width) = `extent` pixels from its prompt alone; one frame is an image."""
    return Canvas((Span(extent.frames, prompt),), extent.height, extent.width)


def animate(prompt: str, image: UInt8[np.ndarray, "H W 3"], extent: Extent) -> Canvas:
    """A video that begins with `image`, which must have the video's height and width."""
    return extend(prompt, image[None], extent)


def extend(prompt: str, video: UInt8[np.ndarray, "T0 H W 3"], extent: Extent) -> Canvas:
    """A video of `extent` whose first frames are those of `video`, T0 = 1 + 4j < extent.frames."""
    if video.shape[1:3] != extent[1:]:
        height, width = video.shape[1:3]
        raise UserError(
            f"the given frames are {width}x{height} and the video is to be {extent.width}x{extent.height}: "
            f"resize them, or ask for --height {height} --width {width}"
        )
    if video.shape[0] >= extent.frames:
        raise UserError(f"{video.shape[0]} frames are given and the video has {extent.frames}: nothing is left to make")
    return Canvas((Span(extent.frames, prompt, video),), extent.height, extent.width)


def connect(
    prompt: str,
    first: UInt8[np.ndarray, "T0 H W 3"] | None,
    last: UInt8[np.ndarray, "T1 H W 3"],
    extent: Extent,
) -> Canvas:
    """A video of `extent` that ends with the frames `last`, T1 = 1 + 4j, and begins with `first` where they are given.

    What is given at the end is a span of its own: the autoencoder is causal, so its latents must not depend on frames
    that are yet to be made. The frames before it are another, of 1 + 4k.
    """
    if last.shape[1:3] != extent[1:]:
        height, width = last.shape[1:3]
        raise UserError(
            f"the last frames are {width}x{height} and the video is to be {extent.width}x{extent.height}: "
            f"resize them, or ask for --height {height} --width {width}"
        )
    made = Extent(extent.frames - len(last), extent.height, extent.width)
    begun = text_to_video(prompt, made) if first is None else extend(prompt, first, made)
    return Canvas((*begun.spans, Span(len(last), prompt, last)), extent.height, extent.width)


def storyboard(shots: Sequence[tuple[str, int]], height: int, width: int) -> Canvas:
    """Shots of (prompt, frames), cut hard one after the other; every shot has 1 + 4k frames."""
    if not shots:
        raise UserError("a storyboard needs at least one shot")
    return Canvas(tuple(Span(frames, prompt) for prompt, frames in shots), height, width)


# ------------------------------------------------------------------------------------------------ layout


@dataclass(frozen=True)
class Layout:
    """A canvas as one row of N tokens in G noise-level groups (one per latent frame, in order)."""

    latents: tuple[Extent, ...]  # (F, h, w) of each span
    positions: Int[np.ndarray, "N 3"]
    segment_ids: Int[np.ndarray, " N"]  # 1: spans of one video see each other
    prompt_ids: Int[np.ndarray, " N"]  # span s reads text s + 1
    level_ids: Int[np.ndarray, " N"]
    given_groups: Bool[np.ndarray, " G"]

    @property
    def given(self) -> Bool[np.ndarray, " N"]:
        return self.given_groups[self.level_ids]


def lay_out(canvas: Canvas, stride: Stride, patch: Stride) -> Layout:
    """The row of tokens that a canvas is for an autoencoder of `stride` and a transformer of `patch`.

    Raises `UserError`, naming the nearest sizes that work, where a span cannot be made.
    """
    extents, positions, prompt_ids, level_ids, given_groups = [], [], [], [], []
    time = 0
    for index, span in enumerate(canvas.spans):
        extent = latent_extent(Extent(span.frames, canvas.height, canvas.width), stride, patch)
        tokens = token_extent(extent, patch)
        given_frames = 0
        if span.given is not None:
            given = latent_extent(Extent(span.given.shape[0], canvas.height, canvas.width), stride, patch)
            given_frames = token_extent(given, patch).frames
        extents.append(extent)
        positions.append(token_positions(tokens, start=time))
        prompt_ids.append(np.full(tokens.volume, index + 1, np.int32))
        frame_of_token = np.repeat(np.arange(tokens.frames, dtype=np.int32), tokens.height * tokens.width)
        level_ids.append(frame_of_token + time)
        given_groups.append(np.arange(tokens.frames) < given_frames)
        time += tokens.frames
    return Layout(
        latents=tuple(extents),
        positions=np.concatenate(positions).astype(np.int32),
        segment_ids=np.ones(sum(len(p) for p in positions), np.int32),
        prompt_ids=np.concatenate(prompt_ids),
        level_ids=np.concatenate(level_ids).astype(np.int32),
        given_groups=np.concatenate(given_groups),
    )
