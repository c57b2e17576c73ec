"""Clips of several shots, and windows without their first latent, from the cache to the rows of a step."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
from test_loader import ROW, contents, detokenize, loader, record, records

from sora_jax.data.latents import ShotHeader
from sora_jax.data.stream import LoaderOptions, cut_and_caption
from sora_jax.tokens.packing import unpack_rows


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


def test_windows_are_clips_without_their_first_latent():
    source = [record(i, frames=3 + i % 3) for i in range(40)]
    with loader(source, epochs=10, window_share=0.5) as batches:
        clips = [clip for batch in batches for row in unpack_rows(batch) for clip in row]
    for clip in clips:
        whole = source[int(clip.latents[0, 0, 0, 0])].latents
        np.testing.assert_array_equal(clip.latents, whole[1:] if clip.headless else whole)
    assert abs(np.mean([clip.headless for clip in clips]) - 0.5) < 0.1
    with loader([record(i, frames=2) for i in range(40)], epochs=1, window_share=1.0) as batches:
        assert not any(clip.headless for batch in batches for row in unpack_rows(batch) for clip in row)
