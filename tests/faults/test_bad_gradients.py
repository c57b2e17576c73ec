"""Gradients that are NaN, infinite or a spike are skipped and said; too many in a row end the run, and the last good
checkpoint is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from counting_run import Counting, Run

from sora_jax.errors import UserError

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("quick_training")]
CONSTANT = ("optimizer.schedule=constant", "train.steps=120", "train.log_every=1")
SPIKE = 1e4  # times the batch; the gradient grows with its square


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_skipped_said_and_counted(run: Run, value: float):
    run(batches=Counting(poison=range(2, 4), poisoned=value))
    assert [line for line in run.said if "skipped (" in line] == [
        "step 3: gradients are not finite; skipped (1 in a row)",
        "step 4: gradients are not finite; skipped (2 in a row)",
    ]
    assert [line["loss"] is None for line in run.lines] == [False, False, True, True, False, False]


def test_a_run_of_bad_gradients_ends_it_with_the_last_good_checkpoint_kept(run: Run):
    batches = Counting(poison=range(3, 100))
    with pytest.raises(UserError, match="stopped at step 6: gradients were not finite for 3 steps in a row"):
        run("train.steps=50", "train.max_skipped=3", "train.checkpoint_every=2", batches=batches)
    assert max(run.steps) <= 4
    assert batches.closed
    assert np.isfinite(run.losses[3])


def test_a_spike_is_skipped_as_if_it_had_not_been(run: Run, tmp_path: Path):
    """The losses after it are those of a run that skipped it for being NaN."""
    run(*CONSTANT, batches=Counting(poison=[111], poisoned=SPIKE))
    (line,) = [line for line in run.said if "skipped (" in line]
    assert line.startswith("step 112: gradients are a spike (norm ")
    assert line.endswith("); skipped (1 in a row)")
    assert run.losses[112] > 1e3 * run.losses[111]
    nan = Run(tmp_path / "nan")
    nan(*CONSTANT, batches=Counting(poison=[111]))
    assert [run.losses[step] for step in range(113, 121)] == [nan.losses[step] for step in range(113, 121)]


def test_without_the_guard_a_spike_is_taken(run: Run, tmp_path: Path):
    """So the test above shows what the guard does."""
    run(*CONSTANT, "optimizer.spike_sigmas=0.0", batches=Counting(poison=[111], poisoned=SPIKE))
    assert not [line for line in run.said if "skipped (" in line]
    nan = Run(tmp_path / "nan")
    nan(*CONSTANT, batches=Counting(poison=[111]))
    assert run.losses[113] != nan.losses[113]


def test_ordinary_norms_of_any_scale_are_no_spikes(run: Run):
    """They vary a hundredfold from batch to batch here."""
    run(*CONSTANT, batches=Counting(poison=range(0, 200, 7), poisoned=10.0))
    norms = [line["grad_norm"] for line in run.lines]
    assert max(norms) > 20 * np.median(norms)
    assert not [line for line in run.said if "skipped (" in line]


def test_spikes_without_end_end_the_run(run: Run):
    with pytest.raises(UserError, match=r"^stopped at step 115: gradients were a spike \(norm .*spike_sigmas$"):
        run(
            *CONSTANT,
            "train.max_skipped=4",
            "train.checkpoint_every=50",
            batches=Counting(poison=range(111, 200), poisoned=SPIKE),
        )
    assert run.steps == [50, 100]


def test_statistics_of_norms_go_on_where_they_were(run: Run, tmp_path: Path):
    """A run that is interrupted before the spike skips it like one that is not."""
    run("train.steps=105", "optimizer.schedule=constant")
    run(*CONSTANT, batches=Counting(poison=[111], poisoned=SPIKE))
    assert any(line.startswith("step 112: gradients are a spike") for line in run.said)
