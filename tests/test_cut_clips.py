"""Clips of several shots, and windows without their first latent, from the cache to the rows of a step."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from test_loader import ROW, contents, detokenize, loader, record, records

from sora_jax import canvas
from sora_jax.data.latents import CacheInfo, LatentSource, LatentWriter, ShotHeader
from sora_jax.data.stream import LoaderOptions, cut_and_caption
from sora_jax.errors import UserError
from sora_jax.shapes import Extent, Stride
from sora_jax.tokens.packing import fill_rows, unpack_rows


def cut_record(index):
    """Shots of 3, 1 and 2 latents, with captions that say which they are of."""
    plain = record(index, frames=6)
    shots = (("a", 3), ("b", 1), ("c", 2))
    headers = tuple(ShotHeader(n, (f"{name}{index}", f"{name}{index}!")) for name, n in shots)
    return dataclasses.replace(plain, captions=(), shots=headers)


def shots_of(clip):
    """[(latent frames, caption)] of a clip of a batch."""
    sizes = clip.shots or [(len(clip.latents), len(clip.text))]
    texts = np.split(clip.text, np.cumsum([text for _, text in sizes])[:-1])
    return [(frames, detokenize(text)) for (frames, _), text in zip(sizes, texts, strict=True)]


def test_shots_of_cut_clips_come_with_their_prompts():
    with loader([cut_record(i) for i in range(40)], epochs=1) as batches:
        clips = [clip for batch in batches for row in unpack_rows(batch) for clip in row]
    assert sorted(int(clip.latents[0, 0, 0, 0]) for clip in clips) == list(range(40))
    for clip in clips:
        index = int(clip.latents[0, 0, 0, 0])
        np.testing.assert_array_equal(clip.latents, cut_record(index).latents.astype(np.float32))
        assert [frames for frames, _ in shots_of(clip)] == [3, 1, 2]
        assert [text.rstrip("!") for _, text in shots_of(clip)] == [f"{name}{index}" for name in "abc"]
    bangs = [text.endswith("!") for clip in clips for _, text in shots_of(clip)]
    assert 0.3 < np.mean(bangs) < 0.7, "each shot chooses for itself"


def test_prompts_are_dropped_of_single_shots_and_of_all():
    options = {"caption_dropout": 0.25, "shot_dropout": 0.5}
    with loader([cut_record(i) for i in range(40)], epochs=30, **options) as batches:
        clips = [clip for batch in batches for row in unpack_rows(batch) for clip in row]
    dropped = np.array([[text == "" for _, text in shots_of(clip)] for clip in clips])
    assert len(dropped) == 1200
    expected = 0.25 + 0.75 * 0.5
    assert np.abs(dropped.mean(axis=0) - expected).max() < 4 * np.sqrt(expected * (1 - expected) / 1200)
    assert abs(dropped.all(axis=1).mean() - (0.25 + 0.75 / 8)) < 0.06
    with loader(records(), epochs=30, shot_dropout=0.5) as batches:
        assert not any(text == "" for batch in batches for _, _, text in contents(batch)), (
            "clips of one shot keep theirs"
        )


def test_cut_clips_are_cut_to_whole_shots_and_images():
    rng, clip = np.random.default_rng(0), cut_record(7).header
    options = LoaderOptions(**ROW, image_share=0.2, prefix_share=0.4, window_share=0.2)
    found = Counter()
    for _ in range(2000):
        latents, captions, shots = cut_and_caption(clip, rng, options)
        found[latents.start, latents.stop] += 1
        names = [text.rstrip("!")[:-1] for text in captions]
        expected = {
            (0, 1): (["image "], ()),
            (0, 3): (["a"], ()),
            (0, 4): (["a", "b"], (3, 1)),
            (0, 6): (["a", "b", "c"], (3, 1, 2)),
            (1, 6): (["a", "b", "c"], (2, 1, 2)),
        }
        assert (names, shots) == expected[latents.start, latents.stop]
    for place in found:
        assert abs(found[place] / 2000 - 0.2) < 0.05
    # A prompt a shot has to fit, and all of them together.
    long = dataclasses.replace(clip, shots=tuple(ShotHeader(2, ("x" * 12, "y" * 9)) for _ in range(3)))
    whole = LoaderOptions(**ROW)
    assert {cut_and_caption(long, rng, whole, 29)[1] for _ in range(20)} == {("y" * 9,) * 3}


@pytest.mark.parametrize("kind", ["records", "cache"])
def test_windows_are_clips_without_their_first_latent(kind, tmp_path):
    source = [record(i, frames=3 + i % 3) for i in range(40)]
    if kind == "cache":
        writer = LatentWriter(tmp_path, CacheInfo("w", "a" * 64, (4, 16, 16), 4, {}), clips=40)
        with writer.shard(*writer.missing()) as out:
            for clip in source:
                out.add(clip)
        source = LatentSource(tmp_path)
    with loader(source, epochs=10, window_share=0.5) as batches:
        clips = [clip for batch in batches for row in unpack_rows(batch) for clip in row]
    for clip in clips:
        whole = source[int(clip.latents[0, 0, 0, 0])].latents
        np.testing.assert_array_equal(clip.latents, whole[1:] if clip.headless else whole)
    assert abs(np.mean([clip.headless for clip in clips]) - 0.5) < 0.1
    with loader([record(i, frames=2) for i in range(40)], epochs=1, window_share=1.0) as batches:
        assert not any(clip.headless for batch in batches for row in unpack_rows(batch) for clip in row)


def test_a_window_is_its_canvas_after_the_first_latent_has_left_it():
    with loader([record(i, frames=4) for i in range(8)], epochs=1, window_share=1.0) as batches:
        clip = unpack_rows(next(batches))[0][0]
    h, w = clip.latents.shape[1:3]
    size = {"row_tokens": 3 * h * w, "row_text": len(clip.text), "row_groups": 3}
    row = fill_rows([[0]], [clip], **size)
    whole = canvas.lay_out(canvas.text_to_video("a", Extent(13, 8 * h, 8 * w)), Stride(4, 8, 8), Stride(1, 1, 1))
    left = h * w
    np.testing.assert_array_equal(row["positions"][0], whole.positions[left:])
    np.testing.assert_array_equal(row["level_ids"][0], whole.level_ids[left:] - 1)
    assert row["group_frame"][0].tolist() == [1, 2, 3]
    assert row["group_count"][0].tolist() == [4, 4, 4]


def test_a_row_of_a_cut_clip_is_the_row_of_its_storyboard():
    with loader([cut_record(i) for i in range(8)], epochs=1) as batches:
        clip = unpack_rows(next(batches))[0][0]
    h, w = clip.latents.shape[1:3]
    row = fill_rows([[0]], [clip], row_tokens=6 * h * w, row_text=len(clip.text), row_groups=6)
    board = canvas.storyboard([("a", 9), ("b", 1), ("c", 5)], 8 * h, 8 * w)
    layout = canvas.lay_out(board, Stride(4, 8, 8), Stride(1, 1, 1))
    for name in ("positions", "segment_ids", "prompt_ids", "level_ids"):
        np.testing.assert_array_equal(row[name][0], getattr(layout, name), name)


def test_prompts_of_shots_that_fit_no_row_together_are_refused_at_once(tmp_path):
    writer = LatentWriter(tmp_path, CacheInfo("w", "a" * 64, (4, 16, 16), 4, {}), clips=8)
    with writer.shard(*writer.missing()) as out:
        for index in range(8):
            out.add(cut_record(index))
    source = LatentSource(tmp_path)
    for places in (11, 12):  # "a7!", "b7!" and "c7!", and an end each
        if places == 12:
            with loader(source, row_text=places) as batches:
                assert len(next(batches)["text_tokens"][0]) == 12
        else:
            with pytest.raises(UserError, match="has 12 text tokens and a row holds 11"):
                loader(source, row_text=places)
