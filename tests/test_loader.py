"""The loader: every clip once an epoch, the same batches whoever reads them, and a state that goes on to the bit."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
from collections import Counter

import numpy as np
import pytest

from sora_jax.data.latents import BadRecordError, CacheInfo, LatentRecord, LatentSource, LatentWriter
from sora_jax.data.loader import make_loader
from sora_jax.data.stream import LoaderOptions, cut_and_caption
from sora_jax.errors import UserError
from sora_jax.tokens.packing import PackedRows, unpack_rows

ROW = {"rows": 4, "row_tokens": 48, "row_text": 40, "row_groups": 24}


def tokenize(text):
    return [*(byte + 3 for byte in text.encode()), 1]


def detokenize(ids):
    return bytes(int(i) - 3 for i in ids[:-1]).decode()


def record(index, frames, size=(2, 2)):
    """Latents that say which record, frame and place they are of."""
    latents = np.zeros((frames, *size, 4), np.float16)
    latents[..., 0] = index
    latents[..., 1:] = np.moveaxis(np.indices((frames, *size)), 0, -1)
    captions = (f"video {index}", f"film {index}")
    return LatentRecord(latents, captions, (f"image {index}",), 8.0, f"clip {index}", (1 + 4 * (frames - 1), 32, 32))


def records(count=40):
    return [record(index, frames=1 + index % 5, size=((2, 2), (2, 3))[index % 2]) for index in range(count)]


def loader(source=None, **options):
    return make_loader(source if source is not None else records(), tokenize=tokenize, **ROW | options)


def cut(clip, rng, image_share, prefix_share, *most_bytes):
    """What is used of a clip of one shot: how many latents, and its caption."""
    shares = {"image_share": image_share, "prefix_share": prefix_share}
    latents, (caption,), shots = cut_and_caption(clip, rng, LoaderOptions(**ROW | shares), *most_bytes)
    assert (latents.start, shots) == (0, ())
    return latents.stop, caption


def contents(batch):
    """The clips of a batch: (record, latent frames, caption)."""
    return [
        (int(clip.latents[0, 0, 0, 0]), len(clip.latents), detokenize(clip.text))
        for row in unpack_rows(batch)
        for clip in row
    ]


def assert_same(one, two):
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@pytest.fixture
def cache(tmp_path):
    source = records()
    writer = LatentWriter(tmp_path, CacheInfo("w", "a" * 64, (4, 16, 16), 4, {"world": {"seed": 0}}), clips=len(source))
    for shard in writer.missing():
        with writer.shard(shard) as out:
            for clip in source:
                out.add(clip)
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------- what


def test_batches_are_packed_rows_of_static_shape():
    with loader() as batches:
        first, second = next(batches), next(batches)
    PackedRows(**first)  # its annotations are checked in tests
    assert {name: array.shape for name, array in first.items()} == {name: a.shape for name, a in second.items()}
    assert first["tokens"].shape == (4, 48, 4)
    assert first["tokens"].dtype == np.float32


def test_an_epoch_has_every_clip_once_and_whole():
    with loader(epochs=1) as batches:
        found = [clip for batch in batches for row in unpack_rows(batch) for clip in row]
        with pytest.raises(StopIteration):
            next(batches)
    source = {r.source: r for r in records()}
    assert len(found) == len(source)
    for clip in found:
        expected = source.pop(f"clip {int(clip.latents[0, 0, 0, 0])}")
        np.testing.assert_array_equal(clip.latents, expected.latents.astype(np.float32))
        assert detokenize(clip.text) in expected.captions


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(**options):
        with loader(**options) as batches:
            return [index for batch in batches for index, _, _ in contents(batch)]

    two, one = order(epochs=2, seed=3), order(epochs=1, seed=3)
    assert sorted(two) == sorted([*range(40), *range(40)])
    assert order(epochs=1, seed=4) != one
    assert two[40:] != order(epochs=1, seed=4), "the second epoch is not the first of the next seed"
    # Packing moves a clip by a few places only: without shuffling, order is kept to within a step or two.
    with loader(epochs=1, shuffle=False) as batches:
        plain = [index for batch in batches for index in sorted(index for index, _, _ in contents(batch))]
    assert max(abs(place - index) for place, index in enumerate(plain)) < 16 < 39


@pytest.mark.parametrize("kind", ["records", "cache"])
def test_parts_make_the_rows_of_one_loader(kind, cache):
    """Whoever fills which rows: together they are the same, and so is the state, from which any number goes on."""
    source = LatentSource(cache) if kind == "cache" else records()
    options = {"seed": 4, "image_share": 0.2, "caption_dropout": 0.2, "plan_steps": 2}
    with loader(source, **options) as one:
        whole = [next(one) for _ in range(6)]
        state = one.state()
        whole += [next(one) for _ in range(3)]
    found = []
    for part in range(2):
        with loader(source, part=part, parts=2, **options) as half:
            found.append([next(half) for _ in range(6)])
            assert half.state() == state
    for part in range(4):
        with loader(source, part=part, parts=4, **options) as quarter:
            quarter.restore(state)
            found.append([next(quarter) for _ in range(3)])
    for step, batch in enumerate(whole):
        parts = [half[step] for half in found[:2]] if step < 6 else [quarter[step - 6] for quarter in found[2:]]
        assert_same({name: np.concatenate([part[name] for part in parts]) for name in batch}, batch)


def test_a_part_reads_the_latents_of_its_own_rows_only(cache):
    class Counting(LatentSource):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    read: list[int] = []
    with loader(Counting(cache), part=1, parts=4, epochs=1) as quarter:
        own = [index for batch in quarter for index, _, _ in contents(batch)]
    assert set(own) <= set(read)
    assert len(read) <= len(own) + 3, "the type checker looks at a random record now and then"
    assert 0 < len(own) < 20 < 40


def test_a_record_that_only_its_own_part_finds_bad_leaves_a_hole(cache):
    """The others have planned with it, and go on as they would."""

    class Torn(LatentSource):
        def __getitem__(self, index):
            if index == 7:
                raise BadRecordError("record 7: chunk hash mismatch")
            return super().__getitem__(index)

    def run(source, part):
        with loader(source, part=part, parts=2, epochs=1, shuffle=False) as half:
            batches = list(half)
            return batches, half.stats.bad_records

    found = [run(Torn(cache), part) for part in range(2)]
    clean = [run(LatentSource(cache), part)[0] for part in range(2)]
    assert sorted(bad for _, bad in found) == [0, 1]
    clips = sorted(index for batches, _ in found for batch in batches for index, _, _ in contents(batch))
    assert clips == [index for index in range(40) if index != 7]
    untouched = next(part for part, (_, bad) in enumerate(found) if not bad)
    for one, other in zip(found[untouched][0], clean[untouched], strict=True):
        assert_same(one, other)


def test_rows_are_full_and_nothing_waits_for_long():
    rng = np.random.default_rng(0)
    source = [record(i, frames=int(rng.integers(1, 8)), size=(2, int(rng.integers(1, 4)))) for i in range(300)]
    fills, order = [], []
    with loader(source, shuffle=False, epochs=1, row_text=90) as batches:
        for batch in batches:
            fills.append(batches.stats.fill.tokens)
            assert fills[-1] == np.mean(batch["segment_ids"] > 0)
            order.append([index for index, _, _ in contents(batch)])
    assert np.mean(fills[:-1]) > 0.97
    for step, (now, following) in enumerate(itertools.pairwise(order)):
        waited = [i for i in range(max(now)) if i not in itertools.chain(*order[: step + 1])]
        assert not waited or min(waited) in following, "the clip that waited longest comes next"


def test_clips_that_wait_keep_their_order():
    source = [record(i, frames) for i, frames in enumerate([11, 10, 10, 2, 10, 1, 2, 2])]  # of 12 that fit a row
    with loader(source, shuffle=False, epochs=1, rows=1, row_text=90) as batches:
        assert [[index for index, _, _ in contents(batch)] for batch in batches] == [[0, 5], [1, 3], [2, 6], [4, 7]]


def test_rows_of_like_cost_come_in_one_step():
    def spread(plan_steps):
        """Standard deviation of the costs of rows within a step, averaged over steps."""
        source = [record(i, frames=(1, 12)[i % 12 == 0]) for i in range(240)]
        with loader(source, epochs=1, plan_steps=plan_steps, quadratic=1 / 192, row_text=200) as batches:
            steps = [[[len(clip.latents) * 4 for clip in row] for row in unpack_rows(batch)] for batch in batches]
        found = [
            np.std([sum(n + n * n / (6 * 32) for n in row) for row in step]) for step in steps if all(map(sum, step))
        ]
        return np.mean(found), sum(len(row) for step in steps for row in step)

    (mixed, count), (sorted_, same_count) = spread(1), spread(5)
    assert count == same_count == 240
    assert sorted_ < 0.7 * mixed


# ------------------------------------------------------------------------------------------------- cutting, captioning


def test_cut_clips_get_captions_that_are_true_of_them():
    rng, clip = np.random.default_rng(0), record(7, frames=5)
    lengths = Counter()
    for _ in range(4000):
        keep, caption = cut(clip.header, rng, image_share=0.3, prefix_share=0.3)
        lengths[keep] += 1
        assert caption in (clip.captions if keep >= 3 else clip.captions_image)
    # 1 latent: 0.3; 2, 3 and 4 latents: 0.1 each; whole: 0.4. Five standard deviations are below 0.04.
    for length, share in {1: 0.3, 2: 0.1, 3: 0.1, 4: 0.1, 5: 0.4}.items():
        assert abs(lengths[length] / 4000 - share) < 0.04


def test_without_image_captions_no_clip_becomes_an_image():
    rng = np.random.default_rng(0)
    clip = LatentRecord(record(7, 5).latents, ("video 7",), (), 8.0, "x", (17, 32, 32))
    cuts = [cut(clip.header, rng, 0.5, 0.5) for _ in range(200)]
    assert {keep for keep, _ in cuts} == {3, 4, 5}
    assert {caption for _, caption in cuts} == {"video 7"}
    short = LatentRecord(record(7, 2).latents, ("video 7",), ("image 7",), 8.0, "x", (5, 32, 32))
    assert cut(short.header, rng, 0, 1)[1] == "video 7", "an uncut clip keeps its own captions"
    silent = LatentRecord(short.latents, (), (), 8.0, "x", (5, 32, 32))
    assert cut(silent.header, rng, 0, 0)[1] == ""


def test_captions_too_long_for_a_row_can_be_left_out():
    latents = np.zeros((2, 1, 1, 4), np.float16)
    record = LatentRecord(latents, ("short", "a long caption", "é" * 4), (), 8.0, "x", (5, 16, 16)).header
    rng = np.random.default_rng(0)
    assert {cut(record, rng, 0, 0, 7)[1] for _ in range(50)} == {"short"}, "bytes count, not letters"
    assert {cut(record, rng, 0, 0, 8)[1] for _ in range(50)} == {"short", "é" * 4}
    assert len({cut(record, rng, 0, 0)[1] for _ in range(50)}) == 3
    # none fits: the packer says so, rather than training without a caption
    assert cut(record, rng, 0, 0, 3)[1]


def test_caption_dropout_and_choice_change_from_visit_to_visit():
    with loader(epochs=50, caption_dropout=0.25) as batches:
        found = [caption for batch in batches for _, _, caption in contents(batch)]
    assert len(found) == 2000
    assert abs(found.count("") / 2000 - 0.25) < 0.05
    words = Counter(caption.split()[0] for caption in found if caption)
    assert abs(words["video"] / (words["video"] + words["film"]) - 0.5) < 0.07
    assert set(words) == {"video", "film"}


# --------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("options", [{}, {"plan_steps": 3, "prefetch": 0}, {"part": 1, "parts": 2}])
def test_restored_loader_goes_on_to_the_bit(options):
    # Clips of 40 and 4 of 48 tokens: much is left over from step to step.
    source = [record(i, frames=(1, 10)[i % 3 == 0]) for i in range(40)]
    options = {"seed": 5, "image_share": 0.1, "prefix_share": 0.2, "caption_dropout": 0.2, **options}
    with loader(source, **options) as batches:
        states, straight = [batches.state()], []
        for _ in range(9):
            straight.append(next(batches))
            states.append(json.loads(json.dumps(batches.state())))
    assert any(state["carry"] for state in states), "the case that matters is here"
    for step in (0, 1, 4, 5, 6):
        with loader(source, **options) as again:
            again.restore(states[step])
            assert again.state() == states[step]
            for expected in straight[step:]:
                assert_same(next(again), expected)
    with loader(source, **options) as back:  # a loader in use may be moved, too
        next(back)
        back.restore(states[2])
        assert_same(next(back), straight[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"caption_dropout": 0.5}, r"caption_dropout was 0\.0 and is 0\.5"),
        ({"source": records(39)}, "records was 40 and is 39"),
    ],
)
def test_state_of_another_loader_is_refused(change, message):
    with loader() as one, loader(**change) as other:
        next(one)
        with pytest.raises(UserError, match=message):
            other.restore(one.state())


def test_a_state_from_before_an_option_goes_on_where_it_is_not_used():
    with loader() as one:
        straight = [next(one) for _ in range(4)]
    with loader() as one:
        next(one), next(one)
        state = one.state()
    new = ("window_share", "shot_dropout")
    before = {**state, "identity": {name: value for name, value in state["identity"].items() if name not in new}}
    with loader() as other:
        other.restore(before)
        assert_same(next(other), straight[2])
    with loader(window_share=0.25) as other, pytest.raises(UserError, match=r"window_share was 0\.0 and is 0\.25"):
        other.restore(before)


def test_number_of_workers_and_prefetch_are_free():
    with loader() as one, loader(prefetch=0) as other:
        next(one)
        other.restore(one.state() | {})
        assert_same(next(one), next(other))


# ---------------------------------------------------------------------------------------------------------- bad records


class Rotten(list):
    """Records of which some cannot be read."""

    def __init__(self, items, bad):
        super().__init__(items)
        self.bad = bad

    def __getitem__(self, index):
        if index in self.bad:
            raise BadRecordError(f"record {index}: chunk hash mismatch")
        return super().__getitem__(index)


def test_bad_records_are_skipped_and_counted():
    with loader(Rotten(records(), bad={3, 11}), epochs=3) as batches:
        found = Counter(index for batch in batches for index, _, _ in contents(batch))
        assert batches.stats.bad_records == 2, "each is counted once, however often it is met"
        assert batches.stats.epoch == 3
    assert found == {index: 3 for index in range(40) if index not in (3, 11)}


def test_too_many_bad_records_are_refused():
    with (
        loader(Rotten(records(), bad={3, 11, 20}), epochs=1) as batches,
        pytest.raises(UserError, match=r"3 of \d+ records could not be read, more than 5% allow.*chunk hash mismatch"),
    ):
        list(batches)


def test_errors_of_the_reading_thread_arrive():
    def fails(text):
        raise UserError("the prompt is too long")

    with make_loader(records(), tokenize=fails, **ROW) as batches:
        for _ in range(2):
            with pytest.raises(UserError, match="the prompt is too long"):
                next(batches)
    with pytest.raises(ValueError, match="closed"):
        next(batches)


# ----------------------------------------------------------------------------------------------------------- bad input


def test_what_fits_no_row_is_refused_at_once(cache):
    source = LatentSource(cache)
    with make_loader(source, tokenize=tokenize, rows=2, row_tokens=48, row_text=40) as batches:
        assert next(batches)["group_frame"].shape == (2, 12), "as many groups as frames of 4 tokens fit"
    with pytest.raises(
        UserError, match=r"a clip of 5x2x3 latents in .* has 30 tokens and a row holds 29: raise row_to"
    ):
        make_loader(source, tokenize=tokenize, rows=2, row_tokens=29, row_text=40)
    with pytest.raises(UserError, match=r'the caption "video 10..." in .* has 9 text tokens and a row holds 8'):
        make_loader(source, tokenize=tokenize, rows=2, row_tokens=48, row_text=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_share": 1.5}, r"image_share must be in \[0, 1\], not 1.5"),
        ({"image_share": 0.6, "prefix_share": 0.6}, "more than 1 together"),
        ({"seed": -1}, r"seed must be in \[0, 2\^32\), not -1"),
        ({"part": 2, "parts": 2}, "part 2 of 2 of 4 rows cannot be"),
        ({"parts": 3}, "part 0 of 3 of 4 rows cannot be"),
        ({"rows": 0}, "rows must be >= 1, not 0"),
        ({"source": []}, "the source of latents is empty"),
        ({"row_groups": None}, "row_groups must be given"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        loader(**options)
    with pytest.raises(TypeError, match="no option 'image_chair'"):
        loader(image_chair=0.1)


# -------------------------------------------------------------------------------------------------------------- workers


def test_workers_give_the_same_batches(cache, monkeypatch):
    def nosy(text):
        """One more token that says how the process is set up; by value, as users' functions come."""
        quiet = signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        return [*(byte + 3 for byte in text.encode()), 300 + quiet + 2 * (os.environ.get("JAX_PLATFORMS") == "cpu")]

    options = {"rows": 2, "row_tokens": 30, "row_text": 40, "seed": 2, "image_share": 0.3, "caption_dropout": 0.2}
    with make_loader(LatentSource(cache), tokenize=tokenize, **options) as alone:
        expected = [next(alone) for _ in range(12)]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu,tpu")  # workers must not inherit what the parent runs on
    with make_loader(LatentSource(cache), tokenize=nosy, workers=2, **options) as together:
        for batch in expected:
            found = next(together)
            assert set(found["text_tokens"][found["text_tokens"] >= 300]) == {303}
            found["text_tokens"] = np.where(found["text_tokens"] >= 300, 1, found["text_tokens"])
            assert_same(found, batch)
        assert os.environ["JAX_PLATFORMS"] == "cpu,tpu", "and the parent keeps its own"
        state = together.state()
    assert not multiprocessing.active_children()
    with make_loader(LatentSource(cache), tokenize=tokenize, **options) as alone:
        next(alone)
        alone.restore(state)  # from two workers to none
        assert alone.stats.elements == state["next"]
