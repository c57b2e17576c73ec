"""The canvas: what a video is to be, before it is one.

A canvas is a list of spans. A span is a clip of its own for the autoencoder: 1 + 4k frames with a first latent of
their own, and a prompt. Frames at its beginning may be given; the rest is made. Everything a user can ask for is a
canvas:

    text_to_video   one span, nothing given
    animate         one span whose first frame is given
    extend          one span that begins with the frames of a video
    connect         a span that is made, then one that is given whole: the last frame, or a clip to arrive at
    storyboard      several spans, each with a prompt: shots of one video that see each other, with cuts between them
    inpaint         one span, given whole but for a part of each frame

`lay_out` turns a canvas into the index arrays of a row of tokens (see `shapes.Condition`). Time counts latents across
spans. The autoencoder is causal, so what is given at the beginning of a span has the same latents whatever follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Bool, Int, UInt8

from sora_jax.errors import UserError
from sora_jax.shapes import Extent, Stride, latent_extent, token_extent
from sora_jax.tokens.patchify import token_positions


@dataclass(frozen=True)
class Span:
    """A clip of `frames` frames that follows `prompt`; `given` [T0, H, W, 3] are its first frames, T0 = 1 + 4j <=
    frames. Where `given_where` says so, only some pixels of each frame are given, and then all frames are there."""

    frames: int
    prompt: str
    given: UInt8[np.ndarray, "T0 H W 3"] | None = None
    given_where: Bool[np.ndarray, "H W"] | None = None


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


def inpaint(prompt: str, video: UInt8[np.ndarray, "T H W 3"], made: Bool[np.ndarray, "H W"]) -> Canvas:
    """`video`, T = 1 + 4k, made anew where `made` says so, whose edges lie between tokens (see `lay_out`).

    The autoencoder sees all of `video`, as it does in training, so what is given at the edge of the part that is made
    knows a little of what was there.
    """
    frames, height, width = video.shape[:3]
    return Canvas((Span(frames, prompt, video, ~made),), height, width)


# ------------------------------------------------------------------------------------------------ layout


@dataclass(frozen=True)
class Layout:
    """A canvas as one row of N tokens in G noise-level groups: one per latent frame, in order, and where parts of
    frames are given one more, which is given, for the tokens of all these parts."""

    latents: tuple[Extent, ...]  # (F, h, w) of each span
    positions: Int[np.ndarray, "N 3"]
    segment_ids: Int[np.ndarray, " N"]  # 1: spans of one video see each other
    prompt_ids: Int[np.ndarray, " N"]  # span s reads text s + 1
    level_ids: Int[np.ndarray, " N"]
    given_groups: Bool[np.ndarray, " G"]

    @property
    def given(self) -> Bool[np.ndarray, " N"]:
        return self.given_groups[self.level_ids]

    def is_like(self, other: Layout) -> bool:
        """Whether canvases of both can share a batch: the same spans, and the same parts of them given."""
        return all(np.array_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))


def lay_out(canvas: Canvas, stride: Stride, patch: Stride) -> Layout:
    """The row of tokens that a canvas is for an autoencoder of `stride` and a transformer of `patch`.

    Raises `UserError`, naming the nearest sizes that work, where a span cannot be made.
    """
    extents, positions, prompt_ids, level_ids, given_groups, in_part = [], [], [], [], [], []
    time = 0
    for index, span in enumerate(canvas.spans):
        extent = latent_extent(Extent(span.frames, canvas.height, canvas.width), stride, patch)
        tokens = token_extent(extent, patch)
        given_frames, part = 0, np.zeros(tokens[1:], np.bool_)
        if span.given_where is not None:
            part = _token_mask(span, canvas, stride, patch)
        elif span.given is not None:
            given = latent_extent(Extent(span.given.shape[0], canvas.height, canvas.width), stride, patch)
            given_frames = token_extent(given, patch).frames
        extents.append(extent)
        positions.append(token_positions(tokens, start=time))
        prompt_ids.append(np.full(tokens.volume, index + 1, np.int32))
        frame_of_token = np.repeat(np.arange(tokens.frames, dtype=np.int32), tokens.height * tokens.width)
        level_ids.append(frame_of_token + time)
        given_groups.append(np.arange(tokens.frames) < given_frames)
        in_part.append(np.tile(part.ravel(), tokens.frames))
        time += tokens.frames
    masked = np.concatenate(in_part)
    if masked.any():
        given_groups.append(np.ones(1, np.bool_))
    return Layout(
        latents=tuple(extents),
        positions=np.concatenate(positions).astype(np.int32),
        segment_ids=np.ones(sum(len(p) for p in positions), np.int32),
        prompt_ids=np.concatenate(prompt_ids),
        level_ids=np.where(masked, time, np.concatenate(level_ids)).astype(np.int32),
        given_groups=np.concatenate(given_groups),
    )


def _token_mask(span: Span, canvas: Canvas, stride: Stride, patch: Stride) -> Bool[np.ndarray, "h w"]:
    """`span.given_where` in tokens. Raises `UserError` where it is not about the whole span, cuts through a token, or
    leaves nothing to make."""
    where, size = span.given_where, (canvas.height, canvas.width)
    assert where is not None
    frames = 0 if span.given is None else len(span.given)
    if where.shape != size or frames != span.frames:
        raise UserError(
            f"a part of each frame is given by all {span.frames} frames and a mask of {size[1]}x{size[0]}, not by "
            f"{frames} frames and a mask of {where.shape[1]}x{where.shape[0]}"
        )
    height, width = stride.height * patch.height, stride.width * patch.width
    cells = where.reshape(size[0] // height, height, size[1] // width, width)
    given = np.asarray(cells.all(axis=(1, 3)))
    if (cells.any(axis=(1, 3)) != given).any():
        raise UserError(
            f"the mask cuts through tokens of {width}x{height} pixels: put its edges at multiples of {width} across "
            f"and {height} down"
        )
    if given.all():
        raise UserError("all of every frame is given: nothing is left to make")
    return given
