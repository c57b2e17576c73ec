"""The path, its target, its loss and the draw of levels, against closed forms and statistics."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import flow
from sora_jax.diffusion.levels import MODES, LevelsConfig, ModeWeights, RowIndex, draw_levels
from sora_jax.errors import UserError

RNG = np.random.default_rng(0)
CLEAN, NOISE = RNG.normal(size=(2, 3, 5, 4)).astype(np.float32)


def test_path_is_exact_at_both_ends_and_its_slope_is_the_target():
    for level, end in ((0.0, CLEAN), (1.0, NOISE)):
        np.testing.assert_array_equal(flow.mix(*map(jnp.asarray, (CLEAN, NOISE)), jnp.full((3, 5), level)), end)
    low, high = (flow.mix(*map(jnp.asarray, (CLEAN, NOISE)), jnp.full((3, 5), s)) for s in (0.25, 0.75))
    target = flow.velocity_target(*map(jnp.asarray, (CLEAN, NOISE)))
    np.testing.assert_allclose((high - low) / 0.5, target, atol=1e-6)


def test_loss_counts_only_what_is_counted():
    counted = RNG.random((3, 5)) < 0.5
    predicted = RNG.normal(size=(3, 5, 4)).astype(np.float32)
    expected = ((predicted - CLEAN) ** 2)[counted].mean()
    loss = flow.flow_loss(jnp.asarray(predicted), jnp.asarray(CLEAN), jnp.asarray(counted))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert flow.flow_loss(jnp.asarray(predicted), jnp.asarray(CLEAN), jnp.zeros((3, 5), bool)) == 0


@pytest.mark.parametrize("groups", [1, 4])
def test_spread_is_a_gather_to_the_bit(groups):
    table = RNG.normal(size=(3, groups, 7)).astype(np.float32)
    ids = RNG.integers(0, groups, (3, 5))
    out = flow.spread(jnp.asarray(table), jnp.asarray(ids))
    np.testing.assert_array_equal(out, np.take_along_axis(table, ids[..., None], axis=1))


def test_shift_keeps_the_ends_and_moves_log_snr_by_its_log():
    sigma = np.linspace(0.01, 0.99, 50)
    moved = flow.shift_level(sigma, 3.0)
    assert (flow.shift_level(np.array([0.0, 1.0]), 3.0) == [0.0, 1.0]).all()
    np.testing.assert_allclose(np.log((1 - moved) / moved), np.log((1 - sigma) / sigma) - np.log(3.0), rtol=1e-9)


# ------------------------------------------------------------------------------------------------ levels

ROWS, FRAMES = 4000, 5  # each row: a video of 5 frames, an image, an unused group; 16 tokens a frame


def draw(config, seed=0):
    segment = np.tile([1] * FRAMES + [2, 0], (ROWS, 1))
    frame = np.tile([*range(FRAMES), 0, 0], (ROWS, 1))
    count = np.tile([FRAMES] * FRAMES + [1, 0], (ROWS, 1))
    segment_ids = np.tile(np.repeat([1, 2, 0], [16 * FRAMES, 16, 4]), (ROWS, 1))
    level_ids = np.tile(np.repeat([*range(FRAMES + 1), 0], [16] * (FRAMES + 1) + [4]), (ROWS, 1))
    index = RowIndex(
        positions=np.zeros((*segment_ids.shape, 3), np.int32),  # what is drawn here does not depend on places
        segment_ids=segment_ids,
        prompt_ids=segment_ids,
        level_ids=level_ids,
        group_segment=segment,
        group_frame=frame,
        group_count=count,
    )
    return jax.tree.map(np.asarray, draw_levels(jax.random.key(seed), config, jax.tree.map(jnp.asarray, index)))


def test_density_is_logit_normal_with_the_resolution_shift():
    levels = draw(LevelsConfig(mean=0.3, std=1.2, shift=2.0, shift_tokens=64, modes=ModeWeights(1, 0, 0, 0, 0, 0)))
    for group, tokens in ((0, 80), (FRAMES, 16)):
        logits = np.log(levels.sigma[:, group] / (1 - levels.sigma[:, group]))
        # Shifting by s adds log s to the logit of sigma.
        expected = 0.3 + np.log(2.0 * np.sqrt(tokens / 64))
        assert abs(logits.mean() - expected) < 4 * 1.2 / np.sqrt(ROWS)
        assert abs(logits.std() - 1.2) < 4 * 1.2 / np.sqrt(2 * ROWS)
    assert abs(np.mean(levels.sigma[:, FRAMES] < 1 / (1 + np.exp(-0.3 - np.log(2.0 * 0.5)))) - 0.5) < 0.04  # the median


def test_between_two_levels_the_density_is_the_part_of_it_that_lies_there():
    whole = {"mean": 0.3, "std": 1.2, "shift": 3.0, "shift_tokens": 64, "modes": ModeWeights(1, 0, 0, 0, 0, 0)}
    rng = np.random.default_rng(0)
    for low, high in ((0.875, 1.0), (0.0, 0.875), (0.3, 0.4)):
        levels = draw(LevelsConfig(**whole, low=low, high=high))
        for group, tokens in ((0, 80), (FRAMES, 16)):
            sigma = levels.sigma[:, group]
            assert low <= sigma.min() < sigma.max() <= high
            odds = 3.0 * np.sqrt(tokens / 64) * np.exp(rng.normal(0.3, 1.2, 1_000_000))
            expected = odds / (1 + odds)
            expected = expected[(expected >= low) & (expected <= high)]
            for quantile in (0.1, 0.5, 0.9):
                share = np.mean(sigma < np.quantile(expected, quantile))
                assert abs(share - quantile) < 4 * np.sqrt(quantile * (1 - quantile) / ROWS)
        assert (levels.sigma[:, -1] == 0).all(), "unused groups have level 0"


def test_modes_come_in_proportion_and_give_what_they_say():
    weights = ModeWeights(uniform=2, per_frame=1, first=1, last=1, both=1, random=2)
    levels = draw(LevelsConfig(modes=weights))
    video, image = slice(0, FRAMES), FRAMES
    mode = levels.mode[:, 0]
    assert (levels.mode[:, video] == mode[:, None]).all()
    shares = np.bincount(mode, minlength=len(MODES)) / ROWS
    np.testing.assert_allclose(shares, np.array([2, 1, 1, 1, 1, 2, *[0] * (len(MODES) - 6)]) / 8, atol=0.03)

    given, sigma = levels.given[:, video], levels.sigma[:, video]
    expected = {
        "uniform": [False] * 5,
        "per_frame": [False] * 5,
        "first": [True] + [False] * 4,
        "last": [False] * 4 + [True],
        "both": [True] + [False] * 3 + [True],
    }
    for name, pattern in expected.items():
        assert (given[mode == MODES.index(name)] == pattern).all(), name
    random = given[mode == MODES.index("random")]
    assert not random.all(axis=1).any()  # something is always left to make
    assert len(np.unique(random, axis=0)) == 2**FRAMES - 1  # every other pattern occurs

    assert (sigma[given] == 0).all()
    assert ((sigma[~given] > 0) & (sigma[~given] < 1)).all()
    per_frame = sigma[mode == MODES.index("per_frame")]
    assert (np.ptp(per_frame, axis=1) > 0).all()
    one_level = sigma[mode == MODES.index("uniform")]
    assert (np.ptp(one_level, axis=1) == 0).all()

    assert not levels.given[:, image].any(), "an image has nothing to be given"
    assert (levels.sigma[:, image] > 0).all()
    assert (levels.sigma[:, -1] == 0).all(), "unused groups have level 0"


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match="weights"):
        LevelsConfig(modes=ModeWeights(0, 0, 0, 0, 0, 0))
    with pytest.raises(UserError, match="shift"):
        LevelsConfig(shift=0.0)
    for low, high in ((0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (0.9, 0.1)):
        with pytest.raises(UserError, match="0 <= low < high <= 1"):
            LevelsConfig(low=low, high=high)


def test_loss_of_each_band_of_levels_is_the_mean_over_its_tokens():
    rng = np.random.default_rng(3)
    error, sigma = rng.uniform(size=(3, 50)).astype(np.float32), rng.uniform(0.0, 0.8, (3, 50)).astype(np.float32)
    sigma[0, :3] = [0.0, 0.5, 0.25]  # on the edges: a band begins with its own
    counted = rng.random((3, 50)) < 0.7
    edges = [0.0, 0.25, 0.5, 0.8, 0.9, 1.0]  # and nothing above 0.8
    means, tokens = flow.loss_by_level(jnp.asarray(error), jnp.asarray(counted), jnp.asarray(sigma), edges)
    for k, (low, high) in enumerate(itertools.pairwise(edges)):
        inside = counted & (sigma >= low) & (sigma < high)
        assert tokens[k] == inside.sum()
        np.testing.assert_allclose(means[k], error[inside].mean() if inside.any() else np.nan, rtol=1e-6)
    assert np.isnan(means[3:]).all()
    whole = flow.mean_of_counted(jnp.asarray(error), jnp.asarray(counted))
    np.testing.assert_allclose(np.nansum(means * tokens) / tokens.sum(), whole, rtol=1e-6)


def test_a_token_that_is_not_counted_spoils_no_band():
    error = jnp.asarray([[1.0, jnp.inf, jnp.nan]])
    means, _ = flow.loss_by_level(
        error, jnp.asarray([[True, False, False]]), jnp.asarray([[0.2, 0.2, 0.7]]), [0, 0.5, 1]
    )
    assert means[0] == 1
