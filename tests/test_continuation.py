"""Continuations of first frames: masks and scores in closed form, baselines that know nothing, the truth itself."""

from __future__ import annotations

import numpy as np
import pytest

from sora_jax.data.world import Mix, WorldSource
from sora_jax.errors import UserError
from sora_jax.evaluation.continuation import SCORES, Neighbours, cases, evaluate_continuation, motion_mask, scores

FRAMES = 17
N, SIZE = 8, 32


def bar(left: int) -> np.ndarray:
    """Black; from the second frame on there is a white bar of 16 columns."""
    clip = np.zeros((FRAMES, 64, 64, 3), np.uint8)
    clip[1:, :, left : left + 16] = 255
    return clip


def test_masks_follow_what_changes_and_forget_it():
    """The background takes in .3 of the difference a frame, so .7^t of it is left: of 255 levels more than 10 up to the
    ninth frame; at the bar's edges, where the window sees 3/4 and 1/4 of it, up to the eighth and the fifth.
    """
    mask = motion_mask(bar(20))
    expected = np.zeros((FRAMES, 64), np.bool_)
    expected[1:10, 21:35] = True
    expected[1:9, [20, 35]] = True
    expected[1:6, [19, 36]] = True
    np.testing.assert_array_equal(mask, np.broadcast_to(expected[:, None], mask.shape))


def test_scores_of_two_bars():
    """Bars of 16 columns, 8 apart: of masks of 18, 16 and 14 columns 10, 8 and 6 are common."""
    found = scores(bar(20), bar(28))
    assert found["spatial_iou"] == pytest.approx(10 / 26)
    assert found["spatiotemporal_iou"] == pytest.approx((5 * 10 / 26 + 3 * 8 / 24 + 1 * 6 / 22 + 7 * 1) / 16)
    column = np.array([5, 8, *[9] * 14, 8, 5])
    first, second = np.pad(column, (0, 8)), np.pad(column, (8, 0))
    assert found["weighted_spatial_iou"] == pytest.approx(
        np.minimum(first, second).sum() / np.maximum(first, second).sum()
    )
    assert found["mse"] == pytest.approx(16 / 64)


def test_the_given_frame_does_not_count():
    made = bar(20)
    made[0] = 0
    assert scores(made, bar(20)) == {"spatial_iou": 1, "spatiotemporal_iou": 1, "weighted_spatial_iou": 1, "mse": 0}


def test_noise_is_no_motion():
    rng = np.random.default_rng(0)
    clip = np.clip(rng.normal(128, 4, (FRAMES, 64, 64, 3)), 0, 255).astype(np.uint8)
    assert motion_mask(clip).mean() < 0.01


# ---- the suite ----


def truth(wrong=lambda clip: clip, **asked: object):
    """A perfect model: it knows how every held-out first frame goes on. `wrong` spoils what it makes."""
    source = WorldSource(7, 4 * N + 20, "heldout", 9, SIZE, SIZE, **asked)
    known = {item["frames"][0].tobytes(): item["frames"] for item in source.batch(range(len(source)))}

    def go_on(prompts: list[str], firsts: np.ndarray, seeds: list[int]) -> np.ndarray:
        return np.stack([wrong(known[first.tobytes()]) for first in firsts])

    return go_on


def evaluated(go_on, **asked: object) -> dict[str, dict[str, float]]:
    report = evaluate_continuation(go_on, N, 7, batch_size=5, frames=9, height=SIZE, width=SIZE, neighbours=60, **asked)
    assert (report["suite"], report["n"]) == ("continuation", N)
    return report["metrics"]


def test_the_truth_scores_one_and_beats_both_baselines():
    calls = []
    metrics = evaluated(truth(), there_and_back=lambda clip: clip, progress=lambda done, n: calls.append((done, n)))
    assert calls == [(5, N), (N, N)]
    for score in SCORES:
        best = 0.0 if score == "mse" else 1.0
        for who in ("model", "autoencoder"):
            assert metrics[f"{who}.{score}"] == {"value": best, "low": best, "high": best, "n": N}
        for baseline in ("copy", "neighbour"):
            assert abs(metrics[f"{baseline}.{score}"]["value"] - best) > 0.001
        assert metrics[f"lead.{score}"]["low"] > 0


def test_a_still_moves_nowhere_and_leads_nothing():
    metrics = evaluated(truth(lambda clip: np.repeat(clip[:1], len(clip), axis=0)))
    assert metrics["model.spatial_iou"]["value"] == metrics["copy.spatial_iou"]["value"] == 0
    assert metrics["model.mse"] == metrics["copy.mse"]
    assert all(metrics[f"lead.{score}"]["value"] <= 0 for score in SCORES)
    assert "autoencoder.mse" not in metrics


def test_a_clip_that_is_late_is_right_in_where_and_wrong_in_when():
    metrics = evaluated(truth(lambda clip: clip[[0, 0, *range(len(clip) - 2)]]))
    assert 0.4 < metrics["model.spatial_iou"]["value"] < 1
    assert metrics["model.spatiotemporal_iou"]["value"] < metrics["model.spatial_iou"]["value"] - 0.1


def test_the_nearest_neighbour_of_a_training_clip_is_itself():
    source = WorldSource(3, 40, "train", 5, SIZE, SIZE)
    pool = Neighbours(source, at_once=16)
    for index in (0, 17, 39):
        np.testing.assert_array_equal(pool.nearest(source[index]["frames"][0]), source[index]["frames"])


def test_cases_move_and_say_which_way():
    source = WorldSource(7, 30, "heldout", 9, SIZE, SIZE)
    found = list(cases(source, 10))
    assert all(motion_mask(case.frames).any() for case in found)
    captions = [item["captions"] for item in source.batch(range(30))]
    assert {case.prompt for case in found} <= {dense for _, dense in captions}
    assert {case.prompt for case in cases(source, 10, fits=lambda text: False)} <= {short for short, _ in captions}


def test_a_world_at_rest_has_no_continuations():
    still = dict.fromkeys(("pair", "collision", "occluder", "pan"), 0.0)
    still |= dict.fromkeys(("slide", "bounce", "fall", "orbit", "grow", "shrink", "enter", "exit"), 0.0)
    with pytest.raises(UserError, match="something moves in only 0 of 6 clips"):
        list(cases(WorldSource(0, 6, "all", 9, SIZE, SIZE, Mix(**still)), 2))
    with pytest.raises(UserError, match="an image has no continuation"):
        evaluate_continuation(truth(), 2, frames=1)
