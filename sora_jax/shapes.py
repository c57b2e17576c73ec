"""Axis letters, shape annotations, and the arithmetic between pixels, latents and tokens.

Axis letters, used in signatures, name suffixes and comments everywhere:

    B  batch row                      C  channels
    T H W  frames, height, width in pixels      F h w  the same in latents
    N  tokens in a row                G  noise-level groups in a row
    L  text tokens in a row           D  model width
    K  attention heads                d  head width

Channels come last everywhere inside the package (video is `B T H W C`).
A video has 1 + stride.time * k frames: the causal autoencoder turns the first frame into a latent of its own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

from sora_jax.errors import UserError
from sora_jax.pytrees import pytree


class Stride(NamedTuple):
    """How many pixels (or frames) one latent (or one token) spans on each axis."""

    time: int
    height: int
    width: int


class Extent(NamedTuple):
    """A size in spacetime: (frames, height, width), in pixels, latents or tokens as the context says."""

    frames: int
    height: int
    width: int

    @property
    def volume(self) -> int:
        return self.frames * self.height * self.width


def _neighbours(size: int, step: int, offset: int = 0) -> str:
    """The nearest sizes of the form offset + step * k, k >= (0 if offset else 1), as text.

    >>> _neighbours(70, 16)
    '64 or 80'
    >>> _neighbours(-64, 16)
    '16'
    """
    least = offset or step
    if size < least:
        return str(least)
    low = (size - offset) // step * step + offset
    return f"{low} or {low + step}"


def latent_extent(pixels: Extent, stride: Stride, patch: Stride = Stride(1, 1, 1)) -> Extent:
    """The latent size (F, h, w) of a video of `pixels` = (T, H, W): F = 1 + (T - 1) / stride.time.

    `patch` is the transformer's patch, which the latent size must be a multiple of.
    Raises `UserError`, naming the nearest sizes that can be made, when (T, H, W) does not fit exactly.
    """
    frame_step = stride.time * patch.time
    if pixels.frames < 1 or (pixels.frames - 1) % frame_step:
        raise UserError(
            f"{pixels.frames} frames cannot be made: a video has 1 + {frame_step}k frames; "
            f"nearest: {_neighbours(pixels.frames, frame_step, 1)}"
        )
    for name, size, step in (
        ("height", pixels.height, stride.height * patch.height),
        ("width", pixels.width, stride.width * patch.width),
    ):
        if size < step or size % step:
            raise UserError(
                f"{name} {size} cannot be made: it must be a multiple of {step}; nearest: {_neighbours(size, step)}"
            )
    return Extent(1 + (pixels.frames - 1) // stride.time, pixels.height // stride.height, pixels.width // stride.width)


def pixel_extent(latents: Extent, stride: Stride) -> Extent:
    """The inverse of `latent_extent`: (F, h, w) -> (T, H, W)."""
    return Extent(1 + (latents.frames - 1) * stride.time, latents.height * stride.height, latents.width * stride.width)


def token_extent(latents: Extent, patch: Stride) -> Extent:
    """The grid of tokens (F, h, w) / patch that `patchify` makes of latents of that size."""
    return Extent(latents.frames // patch.time, latents.height // patch.height, latents.width // patch.width)


def frames_for_seconds(seconds: float, fps: float, step: int) -> int:
    """S seconds mean 1 + step * round(S * fps / step) frames (DESIGN: never change a request in silence; print it).

    >>> frames_for_seconds(2.0, 8.0, 4)
    17
    """
    if not seconds >= 0 or seconds == float("inf"):
        raise UserError(f"seconds must be a finite number >= 0, not {seconds}")
    return 1 + step * round(seconds * fps / step)


@pytree
@dataclass(frozen=True)
class Condition:
    """Everything about packed rows of tokens except the tokens and their noise levels.

    Two tokens see each other when their `segment_ids` are equal and not 0. A token reads the text whose
    `text_ids` equal its `prompt_ids` (0 reads nothing). `level_ids` index the columns of a levels table `[B, G]`.
    `given` tokens are conditions: they carry no loss and pass the solver bit-exactly.
    """

    positions: Int[Array, "B N 3"]  # (time, height, width) coordinate of each token, in tokens; for RoPE
    segment_ids: Int[Array, "B N"]  # which video of the row; 0 = padding
    prompt_ids: Int[Array, "B N"]  # which text of the row
    level_ids: Int[Array, "B N"]  # which noise-level group of the row, 0 <= id < G
    given: Bool[Array, "B N"]
    text: Float[Array, "B L E"]  # text encoder output
    text_ids: Int[Array, "B L"]  # 0 = padding that nothing reads
    # Used by model families that have them, else None:
    extra_channels: Float[Array, "B N X"] | None = None  # concatenated to each token's channels
    image_tokens: Float[Array, "B M I"] | None = None  # CLIP tokens with their own keys and values
    modulation_extra: Float[Array, "B 6 D"] | None = None  # added to the time modulation (fps embedding)

    def replace(self, **changes: object) -> Condition:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
