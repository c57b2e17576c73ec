"""Skills by level and mask: what each mode gives and at which levels, against masks, ramps and sets found by hand."""

from __future__ import annotations

import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import canvas
from sora_jax.diffusion.levels import MODES, Levels, LevelsConfig, ModeWeights, RowIndex, draw_levels, fixed_levels
from sora_jax.diffusion.masks import BLOCKS
from sora_jax.errors import UserError
from sora_jax.shapes import Stride
from sora_jax.tokens.packing import Clip, ShotSize, fill_rows

ROWS = 600
SIZE = (4, 6)  # tokens of a frame of the videos
TEXT = np.array([5, 6, 1], np.int32)


def clip(frames: int, size: tuple[int, int] = SIZE, shots: tuple[int, ...] = (), headless: bool = False) -> Clip:
    text = np.tile(TEXT, max(len(shots), 1))
    sizes = tuple(ShotSize(frames, len(TEXT)) for frames in shots)
    return Clip(np.zeros((frames, *size, 2), np.float32), text, sizes, headless)


# One row of everything: a video, an image, a cut clip of three shots, a window of four latents, and empty places.
CLIPS = [clip(3), clip(1, (2, 2)), clip(6, (2, 1), shots=(3, 1, 2)), clip(4, (1, 3), headless=True)]
VIDEO, IMAGE, CUT, WINDOW = range(1, 5)
TOKENS, GROUPS = 3 * 24 + 4 + 12 + 12 + 5, 3 + 1 + 6 + 4 + 2
ROW = fill_rows([[0, 1, 2, 3]], CLIPS, row_tokens=TOKENS, row_text=24, row_groups=GROUPS)


def index(rows: int = ROWS) -> RowIndex:
    return RowIndex(
        **{name: jnp.asarray(np.tile(ROW[name], (rows, *[1] * (ROW[name].ndim - 1)))) for name in RowIndex._fields}
    )


def draw(config: LevelsConfig, seed: int = 0, rows: int = ROWS) -> Levels:
    return jax.tree.map(np.asarray, jax.jit(draw_levels, static_argnums=1)(jax.random.key(seed), config, index(rows)))


def only(**weights: float) -> ModeWeights:
    return ModeWeights(**{**dict.fromkeys(MODES, 0.0), **weights})


def given_of(levels: Levels, segment: int) -> np.ndarray:
    """Which tokens of a clip are given: [rows, F, h, w]."""
    here = ROW["segment_ids"][0] == segment
    given = np.take_along_axis(levels.given, levels.level_ids, axis=1)[:, here]
    return given.reshape(-1, *CLIPS[segment - 1].latents.shape[:3])


def groups_of(values: np.ndarray, segment: int) -> np.ndarray:
    """Of each latent frame of a clip: [rows, F]."""
    return values[:, :GROUPS][:, ROW["group_segment"][0] == segment]


# ------------------------------------------------------------------------------------------------------ as it was


def test_modes_without_a_weight_change_no_draw():
    """The first six modes are drawn among themselves, by the first of six keys, and levels by the second."""
    weights = (0.5, 0.1, 0.2, 0.1, 0.05, 0.05)
    levels = draw(LevelsConfig(mean=0.2, std=1.5, shift=2.0, modes=ModeWeights(*weights)), seed=3)
    mode_key, level_key, *_ = jax.random.split(jax.random.key(3), 6)
    mode = np.asarray(jax.random.categorical(mode_key, jnp.log(jnp.array(weights)), shape=(ROWS, GROUPS)))
    normal = np.asarray(jax.random.normal(level_key, (ROWS, GROUPS)), np.float64)
    assert (groups_of(levels.mode, VIDEO) == mode[:, :1]).all(), "video v of a row has the v-th draw"
    odds = 2.0 * np.exp(0.2 + 1.5 * normal[:, :1])
    open_ = (groups_of(levels.mode, VIDEO) != MODES.index("per_frame")) & ~groups_of(levels.given, VIDEO)
    sigma = np.broadcast_to(odds / (1 + odds), open_.shape)
    np.testing.assert_allclose(groups_of(levels.sigma, VIDEO)[open_], sigma[open_], rtol=1e-5)
    assert levels.sigma.shape == (ROWS, GROUPS)
    assert (levels.level_ids == ROW["level_ids"]).all()


# -------------------------------------------------------------------------------------------------------- spatial masks


def is_rectangle(mask: np.ndarray) -> bool:
    ys, xs = np.nonzero(mask)
    return len(ys) > 0 and mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].all()


@pytest.mark.parametrize("mode", ["inside", "outside"])
def test_of_each_frame_a_rectangle_or_the_rest_is_given(mode: str):
    levels = draw(LevelsConfig(modes=only(**{mode: 1.0})))
    for segment in (VIDEO, IMAGE, CUT):
        given = given_of(levels, segment)
        assert (given == given[:, :1]).all(), "the mask is the same in all frames"
        rectangle = given[:, 0] if mode == "outside" else ~given[:, 0]
        nothing = ~given.any(axis=(1, 2, 3))
        assert all(is_rectangle(mask) for mask in rectangle[~nothing])
        assert not given.all(axis=(1, 2, 3)).any(), "something is left to make"
        # Sides are uniform over what there is room for: one rectangle in h w is the whole frame, which gives nothing.
        h, w = given.shape[2:]
        assert abs(nothing.mean() - 1 / (h * w)) < 4 * np.sqrt(1 / (h * w) / ROWS)
    sides = Counter(
        int(mask.any(axis=1).sum()) for mask in (given_of(levels, VIDEO)[:, 0] ^ (mode == "inside")) if mask.any()
    )
    assert set(sides) == {1, 2, 3, 4}


def test_blocks_are_given_by_chance():
    levels = draw(LevelsConfig(modes=only(blocks=1.0)))
    given = given_of(levels, VIDEO)
    assert (given == given[:, :1]).all()
    assert not given.all(axis=(1, 2, 3)).any()
    h, w = SIZE
    cuts = list(itertools.product(range(1, min(h, BLOCKS) + 1), range(1, min(w, BLOCKS) + 1)))

    def is_made_of(mask: np.ndarray, down: int, across: int) -> bool:
        """Whether the mask is even within each block of a grid of so many."""
        block = (np.arange(h) * down // h)[:, None] * across + (np.arange(w) * across // w)[None]
        return all(len(set(mask[block == number])) == 1 for number in range(down * across))

    assert all(any(is_made_of(mask, *cut) for cut in cuts) for mask in given[:, 0])
    assert sum(not is_made_of(mask, 2, 2) for mask in given[:, 0]) > ROWS / 4, "and not of large ones alone"
    # A share is uniform in [0, 1], so of n blocks all are given in one draw of n + 1, which then gives nothing.
    expected = np.mean([1 / 2 - 1 / (down * across + 1) for down, across in cuts])
    assert abs(given.mean() - expected) < 4 * 0.35 / np.sqrt(ROWS)


def test_what_a_mask_gives_is_of_one_more_group_whose_level_is_0():
    weights = only(uniform=1.0, first=1.0, inside=1.0, outside=1.0, blocks=1.0)
    levels = draw(LevelsConfig(modes=weights))
    assert levels.sigma.shape == levels.given.shape == (ROWS, GROUPS + 1)
    assert (levels.sigma[:, -1] == 0).all()
    assert levels.given[:, -1].all()
    moved = levels.level_ids != ROW["level_ids"]
    assert (levels.level_ids[moved] == GROUPS).all()
    assert not moved[:, ROW["segment_ids"][0] == 0].any()
    of_token = np.take_along_axis(levels.mode, np.tile(ROW["level_ids"], (ROWS, 1)), axis=1)
    spatial = np.isin(of_token, [MODES.index(name) for name in ("inside", "outside", "blocks")])
    assert moved.any()
    assert not (moved & ~spatial).any()
    # Whole frames that are given keep their own group, whose level is 0 as well; what is made has one level.
    sigma, given = (np.take_along_axis(x, levels.level_ids, axis=1) for x in (levels.sigma, levels.given))
    assert (sigma[given] == 0).all()
    for segment in (VIDEO, IMAGE, CUT):
        here = ROW["segment_ids"][0] == segment
        for row in range(ROWS):
            assert len(set(sigma[row, here & ~given[row]])) == 1
    first = groups_of(levels.mode, VIDEO)[:, 0] == MODES.index("first")
    assert (groups_of(levels.given, VIDEO)[first] == [True, False, False]).all()


def test_a_row_of_training_is_the_row_of_the_canvas():
    """A masked clip as a canvas has the arrays that training saw, to the last index."""
    stride, patch = Stride(4, 8, 8), Stride(1, 1, 1)
    row = fill_rows([[0]], CLIPS[:1], row_tokens=72, row_text=3, row_groups=3)
    rows = RowIndex(**{name: jnp.asarray(row[name]) for name in RowIndex._fields})
    found = 0
    for seed, mode in itertools.product(range(8), ("inside", "outside", "blocks")):
        config = LevelsConfig(modes=only(**{mode: 1.0}))
        drawn = jax.jit(draw_levels, static_argnums=1)(jax.random.key(seed), config, rows)
        level_ids, given = np.asarray(drawn.level_ids[0]), np.asarray(drawn.given[0])
        mask = given[level_ids].reshape(3, *SIZE)[0]
        if not mask.any():
            continue
        found += 1
        made = np.repeat(np.repeat(~mask, 8, axis=0), 8, axis=1)
        layout = canvas.lay_out(canvas.inpaint("a", np.zeros((9, 32, 48, 3), np.uint8), made), stride, patch)
        np.testing.assert_array_equal(layout.positions, row["positions"][0])
        np.testing.assert_array_equal(layout.prompt_ids, row["prompt_ids"][0])
        np.testing.assert_array_equal(layout.level_ids, level_ids)
        np.testing.assert_array_equal(layout.given_groups, given)
        np.testing.assert_array_equal(layout.given, given[level_ids])
    assert found > 12


def test_a_mask_that_a_canvas_cannot_have_is_refused():
    video = np.zeros((9, 32, 48, 3), np.uint8)
    stride, patch = Stride(4, 8, 8), Stride(1, 2, 2)
    made = np.zeros((32, 48), bool)
    made[16:, :16] = True
    layout = canvas.lay_out(canvas.inpaint("a", video, made), stride, patch)
    assert layout.given.reshape(3, 2, 3)[:, 1, 0].tolist() == [False] * 3
    assert layout.given.sum() == 15
    assert layout.level_ids.reshape(3, 2, 3)[:, 1, 0].tolist() == [0, 1, 2]
    made[16:, :17] = True
    with pytest.raises(UserError, match="cuts through tokens of 16x16 pixels: .* multiples of 16 across and 16 down"):
        canvas.lay_out(canvas.inpaint("a", video, made), stride, patch)
    with pytest.raises(UserError, match="nothing is left to make"):
        canvas.lay_out(canvas.inpaint("a", video, np.zeros((32, 48), bool)), stride, patch)
    with pytest.raises(UserError, match="a mask of 64x32, not by 9 frames and a mask of 48x32"):
        canvas.lay_out(canvas.Canvas((canvas.Span(9, "a", video, made),), 32, 64), stride, patch)
    with pytest.raises(UserError, match="all 13 frames and a mask of 48x32, not by 9 frames"):
        canvas.lay_out(canvas.Canvas((canvas.Span(13, "a", video, made),), 32, 48), stride, patch)


# ------------------------------------------------------------------------------------------------------- rolling, shots


def test_rolling_levels_rise_by_one_frame_s_share_from_frame_to_frame():
    levels = draw(LevelsConfig(shift=3.0, modes=only(rolling=1.0)))
    along = levels.sigma / (3.0 - 2.0 * levels.sigma)  # the shift undone
    window = groups_of(along, WINDOW)
    np.testing.assert_allclose(np.diff(window, axis=1), 1 / 4, atol=1e-5)
    assert (window[:, 0] >= 0).all()
    assert (window[:, 0] < 1 / 4).all()
    assert abs(window[:, 0].mean() - 1 / 8) < 4 * (1 / 4) / np.sqrt(12 * ROWS), "anywhere in its frame's share"
    # A film that begins: frames wait at noise until the ramp has come in.
    video = groups_of(along, VIDEO)
    np.testing.assert_allclose(video, np.minimum(video[:, :1] + np.arange(3) / 3, 1.0), atol=1e-5)
    assert 0.45 < video[:, 0].mean() < 0.55
    assert not levels.given.any()
    assert (groups_of(levels.mode, IMAGE) == MODES.index("uniform")).all()
    assert (groups_of(levels.sigma, CUT)[:, -1] > groups_of(levels.sigma, CUT)[:, 0] - 1e-6).all()


def test_a_window_is_always_rolling():
    levels = draw(LevelsConfig(low=0.2, high=0.9, modes=only(uniform=0.9, first=0.05, rolling=0.05)))
    assert (groups_of(levels.mode, WINDOW) == MODES.index("rolling")).all()
    window = groups_of(levels.sigma, WINDOW)
    np.testing.assert_allclose(np.diff(window, axis=1), 0.7 / 4, atol=1e-5)
    assert window.min() >= 0.2
    assert 0.02 < np.mean(groups_of(levels.mode, VIDEO)[:, 0] == MODES.index("rolling")) < 0.09


def test_whole_shots_are_given_never_none_and_never_all():
    levels = draw(LevelsConfig(modes=only(shots=1.0)))
    given = groups_of(levels.given, CUT)
    of_shot = given[:, [0, 3, 4]]
    np.testing.assert_array_equal(given, np.repeat(of_shot, [3, 1, 2], axis=1))
    seen = Counter(map(tuple, of_shot.tolist()))
    assert set(seen) == {p for p in itertools.product((False, True), repeat=3) if 0 < sum(p) < 3}
    assert min(seen.values()) > ROWS / 20
    sigma = groups_of(levels.sigma, CUT)
    assert all(len(set(row[~mask])) == 1 for row, mask in zip(sigma, given, strict=True))
    for segment in (VIDEO, IMAGE):
        assert (groups_of(levels.mode, segment) == MODES.index("uniform")).all(), "a clip of one shot"


# ---------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("mode", MODES[1:])
def test_levels_of_validation_stand_still(mode: str):
    config = LevelsConfig(low=0.1, high=0.9, modes=only(uniform=1.0, rolling=1.0))
    parts = (np.arange(10) + 0.5) / 10
    rows = index(8)
    at = jax.jit(lambda part: fixed_levels(jax.random.key(1), config, rows, mode, part))
    draws = [jax.tree.map(np.asarray, at(part)) for part in parts]
    segment = CUT if mode == "shots" else WINDOW if mode == "rolling" else VIDEO
    for draw_, part in zip(draws, parts, strict=True):
        assert (groups_of(draw_.mode, segment) == MODES.index(mode)).all()
        assert (groups_of(draw_.mode, WINDOW) == MODES.index("rolling")).all()
        np.testing.assert_array_equal(draw_.given, draws[0].given)
        np.testing.assert_array_equal(draw_.level_ids, draws[0].level_ids)
        sigma = groups_of(draw_.sigma, segment)[~groups_of(draw_.given, segment)]
        if mode == "rolling":
            np.testing.assert_allclose(
                sigma.reshape(8, 4), np.tile(0.1 + 0.8 * (np.arange(4) + part) / 4, (8, 1)), atol=1e-6
            )
        elif mode != "per_frame":
            np.testing.assert_allclose(sigma, 0.1 + 0.8 * part, atol=1e-6)
    if mode == "per_frame":  # every frame goes through all ten bands, each in an order of its own
        bands = np.stack([np.floor((groups_of(d.sigma, VIDEO) - 0.1) / 0.08 + 1e-4) for d in draws])
        assert (np.sort(bands, axis=0) == np.arange(10)[:, None, None]).all()
        assert len(set(bands[0].ravel())) > 4


def test_modes_of_weight_0_are_not_trained():
    assert LevelsConfig().trained_modes == MODES[:6]
    assert LevelsConfig(modes=only(uniform=1.0, blocks=0.1)).trained_modes == ("uniform", "blocks")
