"""Plans of rows and steps: full, of like cost, the same for everybody, and nothing is left out in silence."""

from __future__ import annotations

import collections
import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loader import ROW, Rotten, assert_same, contents, loader, record, records, tokenize

from sora_jax.data.latents import LatentHeader
from sora_jax.data.loader import make_loader
from sora_jax.data.plans import Unreadable, first_state, planned_steps
from sora_jax.data.stream import Elements, LoaderOptions
from sora_jax.errors import UserError
from sora_jax.shapes import Stride
from sora_jax.tokens.packing import unpack_rows
from sora_jax.tokens.planning import (
    LIKE,
    ClipShape,
    LookAhead,
    balanced_order,
    imbalance,
    like_steps,
    misfit,
    quadratic_share,
    row_cost,
)

LIMITS = ClipShape(48, 24, 8)
shapes = st.lists(
    st.builds(ClipShape, tokens=st.integers(1, 48), text=st.integers(0, 24), frames=st.integers(1, 8)), max_size=40
)

# ---------------------------------------------------------------------------------------------------------------- bars

WIDTH, FEED_FORWARD = 1536, 8960  # of the open 1.3B model


class Headers:
    """Clips of 1 to 81 frames of about 480p, a third each 16:9, 9:16 and 1:1, without latents: plans need none."""

    def __init__(self, count):
        rng = np.random.default_rng(0)
        self.headers = []
        for index in range(count):
            height, width = ((60, 104), (104, 60), (78, 78))[rng.integers(3)]
            frames = int(rng.integers(1, 22))
            pixels = (4 * frames - 3, 8 * height, 8 * width)
            self.headers.append(LatentHeader((frames, height, width, 16), ("a",), (), 16.0, str(index), pixels))

    def __len__(self):
        return len(self.headers)

    def __getitem__(self, index):
        raise AssertionError("latents were read")

    def header(self, index):
        return self.headers[index]


def test_rows_of_mixed_clips_are_full_and_steps_are_balanced():
    """The defaults of `config.DataConfig`, one row a device: in no step is the dearest row 5 % above the mean."""
    options = LoaderOptions(16, 32_760, 512, 21, Stride(1, 2, 2), look_ahead=256, plan_steps=32)
    options = LoaderOptions(**{**vars(options), "quadratic": quadratic_share(WIDTH, FEED_FORWARD)})
    source = Headers(3000)
    fills, costs = [], []
    for step in itertools.islice(planned_steps(Elements(source, lambda text: [1], options), first_state(),
                                            Unreadable(source, [])), 64):  # fmt: skip
        clips = [[np.prod(element.size[:3]) / 4 for element in row] for row in step.rows]  # tokens
        fills.append(sum(map(sum, clips)) / 16 / 32_760)
        # Floating-point operations of a layer, forward: matrices of 6 D^2 + 2 D F, scores and values of 4 D a pair.
        matrices = 2 * (6 * WIDTH**2 + 2 * WIDTH * FEED_FORWARD)
        costs.append([sum(matrices * n + 4 * WIDTH * n**2 for n in row) for row in clips])
        assert step.imbalance == pytest.approx(max(costs[-1]) / np.mean(costs[-1]) - 1)
    means = np.mean(costs, axis=1)
    assert np.mean(fills) >= 0.97
    assert max(np.max(costs, axis=1) / means - 1) <= 0.05
    assert means.max() > 1.5 * means.min(), "it is no merit where all rows cost the same"
    for plan in (means[:32], means[32:]):
        assert np.abs(np.corrcoef(plan, np.arange(32))[0, 1]) < 0.6, "training does not see them sorted"


def test_cost_of_a_pair_of_tokens():
    """2 (6 D^2 + 2 D F) = 83,361,792 a token and 4 D = 6,144 a pair, for the 1.3B model: 13,568 to 1."""
    assert quadratic_share(WIDTH, FEED_FORWARD) == pytest.approx(6_144 / 83_361_792, rel=1e-12)
    assert row_cost([48, 3], 1 / 48) == pytest.approx(48 + 48**2 / 48 + 3 + 9 / 48)


# ---------------------------------------------------------------------------------------------------------------- rows


@settings(deadline=None)
@given(shapes)
def test_a_row_is_the_oldest_clip_and_the_longest_that_fit(shapes):
    """Against the definition, replayed naively."""
    waiting = LookAhead()
    for index, shape in enumerate(shapes):
        waiting.add(shape, index)
    left = list(range(len(shapes)))
    while left:
        assert list(waiting) == left
        row, used = [left.pop(0)], np.array(shapes[waiting_first(waiting)])
        while fitting := [i for i in left if np.all(used + shapes[i] <= LIMITS)]:
            longest = max(fitting, key=lambda i: shapes[i].tokens)  # max() gives the first of equals
            left.remove(longest)
            row.append(longest)
            used += shapes[longest]
        assert waiting.take_row(LIMITS) == row
    assert len(waiting) == 0


def waiting_first(waiting):
    return next(iter(waiting))


def test_no_clip_waits_for_more_rows_than_there_are_clips_before_it():
    """An awkward one, which never fills a row up, against ever new ones that do."""
    waiting = LookAhead()
    for _ in range(10):
        waiting.add(ClipShape(24, 1, 1), "half")
    waiting.add(ClipShape(25, 1, 1), "awkward")
    taken = []
    while "awkward" not in taken:
        taken += waiting.take_row(LIMITS)
        while len(waiting) < 11:
            waiting.add(ClipShape(24, 1, 1), "half")
    assert len(taken) <= 11


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (ClipShape(48, 24, 8), ""),
        (ClipShape(49, 1, 1), "49 tokens and a row holds 48: raise row_tokens to 49"),
        (ClipShape(1, 25, 1), "25 text tokens and a row holds 24: raise row_text to 25"),
        (ClipShape(1, 1, 9), "9 latent frames and a row holds 8: raise row_groups to 9"),
    ],
)
def test_what_of_a_clip_fits_no_row_is_named(shape, says):
    assert misfit(shape, LIMITS) == says


# --------------------------------------------------------------------------------------------------------------- steps


def test_steps_hold_rows_of_like_cost():
    rows = [48, 3, 40, 5, 44, 4]  # the tokens of the one clip of each
    steps = like_steps(rows, lambda n: row_cost([n], 1 / 48), size=4, rng=np.random.default_rng(0))
    assert sorted([sorted(filter(None, step)) for step in steps]) == [[3, 4], [5, 40, 44, 48]]
    assert [len(step) for step in steps] == [4, 4]


@settings(deadline=None)
@given(st.lists(st.integers(1, 1000), max_size=60), st.integers(1, 12), st.integers(0, 5))
def test_steps_hold_every_row_once_and_go_by_cost(costs, size, seed):
    rows = list(enumerate(costs))
    steps = like_steps(rows, lambda row: row[1], size=size, rng=np.random.default_rng(seed))
    assert all(len(step) == size for step in steps)
    assert sorted(row for step in steps for row in step if row) == rows
    assert len(steps) == -(-len(rows) // size)
    # Steps overlap in cost only where rows are alike.
    spans = sorted((min(c), max(c)) for step in steps if (c := [row[1] for row in step if row]))
    for (low, high), (next_low, next_high) in itertools.pairwise(spans):
        assert next_low >= high or next_high <= (1 + LIKE) * low


def test_rows_that_cost_the_same_are_not_sorted():
    rows = [(index, 100 + index % 5) for index in range(64)]
    steps = like_steps(rows, lambda row: row[1], size=8, rng=np.random.default_rng(0))
    assert all(len({cost for _, cost in step}) > 2 for step in steps)
    again = like_steps(rows, lambda row: row[1], size=8, rng=np.random.default_rng(0))
    assert again == steps
    assert like_steps(rows, lambda row: row[1], size=8, rng=np.random.default_rng(1)) != steps


@pytest.mark.parametrize(("rows", "shards"), [(8, (1, 2, 4, 8)), (12, (1, 3, 6)), (64, (2, 8, 32)), (7, (1, 7))])
def test_any_equal_slices_of_a_step_are_balanced(rows, shards):
    costs = np.random.default_rng(rows).uniform(1, 3, rows)
    order = balanced_order(list(costs))
    assert sorted(order) == list(range(rows))
    slices = costs[order]
    for count in shards:
        sums = slices.reshape(count, -1).sum(axis=1)
        assert imbalance(slices.tolist(), count) == pytest.approx(sums.max() / sums.mean() - 1)
        sorted_sums = np.sort(costs).reshape(count, -1).sum(axis=1)
        assert sums.max() <= sorted_sums.max()
        if rows // count >= 2 and count > 1:
            assert imbalance(slices.tolist(), count) < 0.5 * (sorted_sums.max() / sorted_sums.mean() - 1)
    assert balanced_order([4.0, 1.0, 3.0, 2.0]) == [0, 1, 2, 3]  # 4 + 1 beside 3 + 2
    assert imbalance([0.0, 0.0]) == 0


# -------------------------------------------------------------------------------------------- many clips and processes

WIDE = {"look_ahead": 12, "plan_steps": 3, "quadratic": 0.02}
BUCKETS = {"packing": "buckets"}


@pytest.mark.parametrize("options", [WIDE, BUCKETS, WIDE | {"part": 1, "parts": 2}, BUCKETS | {"part": 1, "parts": 2}])
def test_plans_go_on_to_the_bit(options):
    shares = {"image_share": 0.1, "prefix_share": 0.2, "caption_dropout": 0.2}
    options = {"seed": 5, "skip_misfits": True, **shares, **options}
    # Of 12 clips buckets are not full within an epoch; as some are left out, several are late at once.
    source = [record(i, frames=(1, 2, 10, 20)[i % 4]) for i in range(12 if "packing" in options else 40)]
    with loader(source, **options) as batches:
        states, straight, stats = [batches.state()], [], [batches.stats]
        for _ in range(12):
            straight.append(next(batches))
            states.append(json.loads(json.dumps(batches.state())))
            stats.append(batches.stats)
    for step in (0, 1, 2, 3, 5, 8, 11):
        with loader(source, **options) as again:
            again.restore(states[step])
            assert again.state() == states[step]
            assert again.stats.clips == stats[step].clips
            for expected in straight[step:]:
                assert_same(next(again), expected)
            assert again.stats == stats[-1]
    assert stats[-1].clips == sum(len(contents(batch)) for batch in straight) or options.get("parts")


@pytest.mark.parametrize("options", [WIDE, BUCKETS])
def test_processes_plan_the_same(options):
    with loader(**options) as one:
        whole = [next(one) for _ in range(7)]
        state, stats = one.state(), one.stats
    found = []
    for part in range(4):
        with loader(part=part, parts=4, **options) as quarter:
            found.append([next(quarter) for _ in range(7)])
            assert quarter.state() == state
            assert quarter.stats.imbalance == stats.imbalance
    for step, batch in enumerate(whole):
        assert_same({name: np.concatenate([part[step][name] for part in found]) for name in batch}, batch)


# ------------------------------------------------------------------------------------------------------------- buckets


def test_a_bucket_is_one_shape_a_step():
    """Clips of 1 to 5 frames of 2x2 or 2x3, in rows of 48 tokens and 24 groups; the last steps are what was left."""
    with loader(records(800), epochs=2, row_text=200, **BUCKETS) as batches:
        taken = list(batches)
    found = [[[clip.latents.shape[:3] for clip in row] for row in unpack_rows(batch)] for batch in taken]
    sizes = [set(itertools.chain(*step)) for step in found]
    assert all(len(size) == 1 for size in sizes)
    for batch, step, (size,) in zip(taken, found, sizes, strict=True):
        tokens = int(np.prod(size))
        most = min(48 // tokens, 24 // size[0])
        assert batch["tokens"].shape == (4, most * tokens, 4)
        assert batch["group_frame"].shape == (4, most * size[0])
        assert batch["text_tokens"].shape == (4, 200)
        assert all(len(row) <= most for row in step)
    full = [sum(map(len, step)) == 4 * min(48 // int(np.prod(size)), 24 // size[0])
            for step, (size,) in zip(found, sizes, strict=True)]  # fmt: skip
    assert full.count(False) <= 10, "every bucket but what was left in it"
    assert Counter(clip[0] for batch in taken for clip in contents(batch)) == dict.fromkeys(range(800), 2)


def test_a_rare_clip_does_not_wait_for_ever():
    source = [record(i, frames=1 + 3 * (i == 11)) for i in range(40)]
    with loader(source, row_text=200, seed=3, **BUCKETS) as batches:
        clips = [clip[0] for _ in range(8) for clip in contents(next(batches))]
    assert 11 in clips  # a full bucket would take 12 epochs


def test_captions_too_many_for_a_row_leave_places_free():
    with loader([record(i, frames=1) for i in range(80)], row_text=40, epochs=1, **BUCKETS) as batches:
        found = [contents(batch) for batch in batches]
    assert sorted(clip[0] for step in found for clip in step) == list(range(80))
    assert max(map(len, found)) <= 4 * 5 < 4 * 12, "each has 8 or 9 bytes, and 12 clips would have room"


# ------------------------------------------------------------------------------------------------------------ left out


class LongCaptions(list):
    """Records with a header each, of which every fifth has a caption of too many bytes, and every tenth no other."""

    def header(self, index):
        long = ("x" * 50,)
        captions = {0: long, 5: (*long, "short")}.get(index % 10, ("video",))
        return LatentHeader(self[index].latents.shape, captions, (), 8.0, f"clip {index}", (1, 32, 32))


def test_what_is_left_out_is_counted_by_reason():
    source = LongCaptions(record(i, frames=15 if i == 3 else 2) for i in range(40))
    options = {"epochs": 2, "row_text": 30, "skip_misfits": True, "skip_long_captions": True}
    with loader(source, **options) as batches:
        found = Counter(clip[0] for batch in batches for clip in contents(batch))
        stats, state = batches.stats, json.loads(json.dumps(batches.state()))
    assert found == {index: 2 for index in range(40) if index % 10 and index != 3}
    # of 40 records, twice: 4 have a long caption only, 4 more have one beside a short one, and 1 is of 60 tokens
    assert stats.left_out == {"clip too long": 2, "caption too long": 8, "long captions": 16}
    assert str(stats) == ("epoch 2.00, 70 clips, left out: 2 clip too long, 8 caption too long, 16 long captions")
    with loader(source, **options) as again:
        again.restore(state)
        assert again.stats.left_out == stats.left_out
    with loader(source, **options | {"skip_misfits": False}) as strict, pytest.raises(UserError) as error:
        collections.deque(strict, maxlen=0)
    assert "tokens and a row holds" in str(error.value)
    assert "skip_misfits" in str(error.value)


def test_unreadable_records_are_part_of_what_is_said():
    with loader(Rotten(records(), bad={3}), epochs=1, **WIDE) as batches:
        collections.deque(batches, maxlen=0)
        assert str(batches.stats) == "epoch 1.00, 39 clips, left out: 1 unreadable"


def test_a_source_of_which_nothing_fits_ends_with_a_reason():
    source = LongCaptions(record(i, frames=20) for i in range(5))
    expected = "no clip of 5 fits a row: the last, clip .*, has 80 tokens and a row holds 48"
    with (
        make_loader(source, tokenize=tokenize, **ROW, skip_misfits=True) as batches,
        pytest.raises(UserError, match=expected),
    ):
        next(batches)
