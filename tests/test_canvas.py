"""Canvases laid out as rows of tokens: hand-counted arrays, and clear refusals."""

from __future__ import annotations

import numpy as np
import pytest

from sora_jax import canvas
from sora_jax.errors import UserError
from sora_jax.shapes import Extent, Stride, frames_for_seconds

STRIDE, PATCH = Stride(4, 8, 8), Stride(1, 2, 2)


def test_text_to_video_is_one_span_of_unknown_frames():
    row = canvas.lay_out(canvas.text_to_video("a", Extent(9, 32, 48)), STRIDE, PATCH)
    assert row.latents == (Extent(3, 4, 6),)
    assert row.positions.shape == (3 * 2 * 3, 3)
    assert row.positions[0].tolist() == [0, 0, 0]
    assert row.positions[-1].tolist() == [2, 1, 2]
    assert row.positions[4].tolist() == [0, 1, 1]  # frame by frame, row by row
    assert row.level_ids.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert not row.given_groups.any()
    assert set(row.segment_ids) == set(row.prompt_ids) == {1}


def test_an_image_gives_the_first_latent_and_a_clip_its_prefix():
    image = np.zeros((32, 48, 3), np.uint8)
    row = canvas.lay_out(canvas.animate("a", image, Extent(17, 32, 48)), STRIDE, PATCH)
    assert row.given_groups.tolist() == [True, False, False, False, False]
    assert row.given.tolist() == [True] * 6 + [False] * 24
    clip = np.zeros((9, 32, 48, 3), np.uint8)
    row = canvas.lay_out(canvas.extend("a", clip, Extent(17, 32, 48)), STRIDE, PATCH)
    assert row.given_groups.tolist() == [True, True, True, False, False]


def test_shots_of_a_storyboard_see_each_other_and_read_their_own_prompt():
    board = canvas.storyboard([("a", 9), ("b", 5)], 16, 16)
    row = canvas.lay_out(board, STRIDE, PATCH)
    assert board.frames == 14
    assert row.latents == (Extent(3, 2, 2), Extent(2, 2, 2))
    assert row.segment_ids.tolist() == [1] * 5
    assert row.prompt_ids.tolist() == [1, 1, 1, 2, 2]
    assert row.level_ids.tolist() == [0, 1, 2, 3, 4]
    assert row.positions[:, 0].tolist() == [0, 1, 2, 3, 4]  # time counts latents across spans


@pytest.mark.parametrize(
    ("extent", "says"),
    [
        (Extent(16, 32, 32), "16 frames .* nearest: 13 or 17"),
        (Extent(0, 32, 32), "0 frames .* nearest: 1"),
        (Extent(17, 36, 32), "height 36 .* multiple of 16; nearest: 32 or 48"),
        (Extent(17, 32, 8), "width 8 .* multiple of 16; nearest: 16$"),
        (Extent(17, -64, 32), "height -64 .* multiple of 16; nearest: 16$"),
        (Extent(-7, 32, 32), "-7 frames .* nearest: 1$"),
    ],
)
def test_sizes_that_cannot_be_made_name_the_nearest_that_can(extent, says):
    with pytest.raises(UserError, match=says):
        canvas.lay_out(canvas.text_to_video("a", extent), STRIDE, PATCH)


def test_given_frames_must_fit_the_video():
    with pytest.raises(UserError, match="given frames are 48x32 and the video is to be 32x32"):
        canvas.animate("a", np.zeros((32, 48, 3), np.uint8), Extent(17, 32, 32))
    with pytest.raises(UserError, match="nothing is left to make"):
        canvas.extend("a", np.zeros((17, 32, 32, 3), np.uint8), Extent(17, 32, 32))
    with pytest.raises(UserError, match="8 frames cannot be made"):
        canvas.lay_out(canvas.extend("a", np.zeros((8, 32, 32, 3), np.uint8), Extent(17, 32, 32)), STRIDE, PATCH)


@pytest.mark.parametrize(("seconds", "frames"), [(2.0, 17), (0.1, 1), (1.0, 9), (1.2, 9), (1.3, 13)])
def test_seconds_mean_the_nearest_frames_that_can_be_made(seconds, frames):
    assert frames_for_seconds(seconds, 8.0, 4) == frames
