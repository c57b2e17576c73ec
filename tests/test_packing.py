"""Packing: every token lands once, ids say where it came from, and nothing is dropped."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.shapes import Stride
from sora_jax.tokens.packing import (
    Clip,
    PackedRows,
    clip_shape,
    fill_ratio,
    fill_rows,
    unpack_rows,
)
from sora_jax.tokens.planning import ClipShape, LookAhead, ShotSize

ROW = {"row_tokens": 48, "row_text": 24, "row_groups": 8}


@st.composite
def clips(draw, channels=3, patch=Stride(1, 1, 1)):
    """Clips whose every number is unique, so that a misplaced one cannot hide."""
    out, start = [], 0
    for _ in range(draw(st.integers(1, 12))):
        frames, height, width = (draw(st.integers(1, top)) * step for top, step in zip((4, 3, 4), patch, strict=True))
        size = frames * height * width * channels
        latents = np.arange(start, start + size, dtype=np.float32).reshape(frames, height, width, channels)
        text = np.array(draw(st.lists(st.integers(1, 383), min_size=1, max_size=12)), np.int32)
        # Cut anywhere into as many shots as both have room for; a prompt may be dropped, and has one id then, too.
        cuts = draw(st.integers(0, min(frames // patch.time, len(text)) - 1))
        ends = [
            [*sorted(draw(st.permutations(range(1, most)))[:cuts]), most] for most in (frames // patch.time, len(text))
        ]
        each = [np.diff([0, *end]).tolist() for end in ends]
        shots = tuple(ShotSize(f * patch.time, t) for f, t in zip(*each, strict=True)) if cuts else ()
        out.append(Clip(latents, text, shots, headless=draw(st.booleans())))
        start += size
    return out


def pack(items, patch=Stride(1, 1, 1)):
    waiting = LookAhead()
    for index, clip in enumerate(items):
        waiting.add(clip_shape(clip, patch), index)
    plan = []
    while len(waiting):
        plan.append(waiting.take_row(ClipShape(*ROW.values())))
    return plan, fill_rows(plan, items, patch=patch, **ROW)


# ---------------------------------------------------------------------------------------------------------------- fill


@settings(deadline=None, max_examples=60)
@given(clips())
def test_unpack_inverts_fill(items):
    plan, rows = pack(items)
    for row, found in zip(plan, unpack_rows(rows), strict=True):
        assert len(row) == len(found)
        for index, clip in zip(row, found, strict=True):
            np.testing.assert_array_equal(clip.latents, items[index].latents)
            np.testing.assert_array_equal(clip.text, items[index].text)
            assert (clip.shots, clip.headless) == (items[index].shots, items[index].headless)


@settings(deadline=None, max_examples=30)
@given(clips(patch=Stride(1, 2, 2)))
def test_unpack_inverts_fill_with_patches(items):
    patch = Stride(1, 2, 2)
    plan, rows = pack(items, patch)
    assert rows["tokens"].shape[-1] == 3 * 4
    flat = [clip for row in unpack_rows(rows, patch) for clip in row]
    for index, clip in zip([i for row in plan for i in row], flat, strict=True):
        np.testing.assert_array_equal(clip.latents, items[index].latents)


@settings(deadline=None, max_examples=60)
@given(clips())
def test_every_token_lands_once_and_its_ids_say_which(items):
    plan, rows = pack(items)
    real = rows["segment_ids"] > 0
    assert sorted(rows["tokens"][real].ravel()) == sorted(np.concatenate([c.latents.ravel() for c in items]))
    assert not rows["tokens"][~real].any()
    for b, n in zip(*np.nonzero(real), strict=True):
        segment, group = rows["segment_ids"][b, n], rows["level_ids"][b, n]
        clip = items[plan[b][segment - 1]]
        time, y, x = rows["positions"][b, n]
        frame = time - clip.headless  # time 0 is the place of a first latent, whether it is there or not
        np.testing.assert_array_equal(rows["tokens"][b, n], clip.latents[frame, y, x])
        assert rows["group_segment"][b, group] == segment
        assert rows["group_frame"][b, group] == time
        assert rows["group_count"][b, group] == clip.headless + len(clip.latents)
        text = rows["text_tokens"][b, rows["text_ids"][b] == rows["prompt_ids"][b, n]]
        shot = np.searchsorted(np.cumsum([s.frames for s in clip.shots]), frame, side="right") if clip.shots else 0
        texts = np.split(clip.text, np.cumsum([s.text for s in clip.shots])[:-1].astype(int))
        np.testing.assert_array_equal(text, texts[shot], "a token reads the prompt of its shot")
    for name in ("positions", "prompt_ids", "level_ids"):
        assert not rows[name][~real].any(), f"{name} of padding is 0"
    # Each used group belongs to one frame of one clip: as many groups as frames.
    for b, row in enumerate(plan):
        assert np.count_nonzero(rows["group_segment"][b]) == sum(len(items[i].latents) for i in row)


def test_empty_rows_are_all_padding():
    clip = Clip(np.ones((1, 2, 2, 3), np.float32), np.array([5, 1], np.int32))
    rows = fill_rows([[0], []], [clip], **ROW)
    assert {name: array.dtype for name, array in rows.items() if name != "tokens"} == dict.fromkeys(
        (name for name in rows if name != "tokens"), np.dtype(np.int32)
    )
    assert not any(array[1].any() for array in rows.values())
    assert unpack_rows(rows)[1] == []
    assert fill_ratio(rows) == pytest.approx((4 / 96, 2 / 48, 1 / 16))


def test_plan_for_other_limits_is_refused():
    clip = Clip(np.ones((1, 2, 2, 3), np.float32), np.array([5, 1], np.int32))
    with pytest.raises(ValueError, match="row 0 of the plan does not fit"):
        fill_rows([[0, 0]], [clip], row_tokens=7, row_text=8, row_groups=8)


# -------------------------------------------------------------------------------------------------------------- pytree


def test_packed_rows_are_a_pytree():
    clip = Clip(np.ones((2, 2, 2, 3), np.float32), np.array([5, 1], np.int32))
    rows = PackedRows(**fill_rows([[0]], [clip], **ROW))
    assert float(jax.jit(lambda r: r.tokens.sum())(rows)) == 24
    sizes = jax.tree.map(np.shape, rows)  # leaves that are no arrays must be allowed
    assert sizes.positions == (1, 48, 3)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(rows)]
    assert paths[:2] == [".tokens", ".positions"]
    assert rows.replace(text_ids=rows.text_ids + 1).text_ids.min() == 1
