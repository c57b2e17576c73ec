"""What a model made: a video with its record, to save or to show."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8

from sora_jax.errors import UserError
from sora_jax.media import check_writable, media_bytes, write_media
from sora_jax.record import Record

SHOWN_HEIGHT = 256  # pixels of a video in a notebook, at least


@dataclass(frozen=True)
class Video:
    """What a model made, and how. `frames` are untouched by watermark and codec, which come with `save`.

    `frames` are None where latents were asked for, and `latents` where frames were. `trajectory`, where it was asked
    for, holds the prediction of the clean latents after each solver step; `Pipeline.decode` makes frames of them.
    """

    frames: UInt8[np.ndarray, "T H W 3"] | Float[np.ndarray, "T H W 3"] | None  # float: in [0, 1]
    fps: float
    record: Record
    latents: Float[np.ndarray, "F h w C"] | None = None  # normalised
    trajectory: Float[np.ndarray, "S F h w C"] | None = None  # normalised

    def save(self, path: epath.PathLike, **options: Any) -> None:
        """Write the video with its record; the suffix of `path` chooses the format (see `media.write_media`)."""
        if self.frames is None:
            raise UserError('this video is latents and has no frames to save: sample with output="uint8"')
        check_writable(path)
        write_media(self.frames, path, self.record, fps=self.fps, **options)

    def _repr_html_(self) -> str | None:
        """What a notebook shows: the video in a loop, small ones enlarged to whole multiples without blur."""
        if self.frames is None:
            return None
        height, width = self.frames.shape[1:3]
        scale = max(1, -(-SHOWN_HEIGHT // height))
        still = len(self.frames) == 1
        shown = media_bytes(
            self.frames, ".png" if still else ".mp4", self.record, fps=self.fps, scale=1 if still else scale
        )
        data = base64.b64encode(shown).decode()
        size = f'width="{width * scale}" height="{height * scale}" style="image-rendering: pixelated"'
        if still:
            return f'<img src="data:image/png;base64,{data}" {size}>'
        return f'<video src="data:video/mp4;base64,{data}" {size} autoplay loop muted controls></video>'
