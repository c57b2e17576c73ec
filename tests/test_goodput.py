"""Where a run's time went, by a clock that the test moves: every second under one cause, over restarts too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sora_jax.training.goodput import Goodput
from sora_jax.training.watch import Clock


class Time:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


def begin(path: Path | None, time: Time, step: int, *, setup: float) -> tuple[Goodput, Clock]:
    """A process that gets ready for `setup` seconds and then begins its loop at `step`."""
    clock = Clock(time)
    goodput = Goodput(path, clock, step, now=time)
    time.now += setup
    goodput.begin()
    return goodput, clock


def spend(time: Time, clock: Clock, what: str, seconds: float, **options) -> None:
    with clock.spent_on(what, **options):
        time.now += seconds


def test_every_second_has_one_cause(time: Time, tmp_path: Path):
    goodput, clock = begin(tmp_path / "goodput.json", time, 0, setup=5.0)
    spend(time, clock, "data", 2.0)
    spend(time, clock, "compile", 10.0)
    for step in range(1, 5):
        time.now += 3.0
        goodput.took(step, skipped=step == 2)
    spend(time, clock, "data", 4.0, only_if=lambda: False)  # the devices were at work meanwhile
    assert goodput.record() == pytest.approx(12.0 / 33.0)  # 3 of 4 steps, of 16 s
    spend(time, clock, "checkpoint", 1.0)
    time.now += 0.5
    goodput.record(finished=True)
    seconds = {"start": 5, "data": 2, "compile": 10, "steps": 12, "skipped": 4, "checkpoint": 1, "other": 0.5}
    assert {name: s for name, s in goodput.seconds.items() if s} == pytest.approx(seconds)
    written = json.loads((tmp_path / "goodput.json").read_text())
    assert sum(written["seconds"].values()) == pytest.approx(34.5)
    assert written["recorded"] - written["started"] == pytest.approx(34.5)
    assert (
        goodput.line == "goodput 35% of 34.5 s; compile 29%, start 14%, skipped 12%, data 6%, checkpoint 3%, other 1%"
    )


def test_a_restart_counts_what_was_lost_and_what_is_done_again(time: Time, tmp_path: Path):
    path = tmp_path / "goodput.json"
    goodput, _ = begin(path, time, 0, setup=1.0)
    for step in range(1, 7):
        time.now += 2.0
        goodput.took(step, skipped=False)
    goodput.record()
    time.now += 3.0  # of a seventh step, and then it is killed
    time.now += 20.0  # until somebody starts it again
    goodput, _ = begin(path, time, 4, setup=2.0)
    for step in range(5, 9):  # 5 and 6 once more
        time.now += 2.0
        goodput.took(step, skipped=False)
    goodput.record()
    found = {name: s for name, s in goodput.seconds.items() if s}
    assert found == pytest.approx({"start": 1, "steps": 12 + 4, "redone": 4, "restart": 25})
    assert goodput.document()["restarts"] == 1
    assert goodput.document()["started"] == 1000.0
    assert "since the first start" in goodput.line


def test_a_run_that_had_ended_was_not_waiting(time: Time, tmp_path: Path):
    path = tmp_path / "goodput.json"
    goodput, _ = begin(path, time, 0, setup=1.0)
    time.now += 4.0
    goodput.took(1, skipped=False)
    goodput.record(finished=True)
    time.now += 100_000.0
    goodput, _ = begin(path, time, 1, setup=1.0)
    time.now += 4.0
    goodput.took(2, skipped=False)
    assert goodput.record() == pytest.approx(0.8)
    assert sum(goodput.seconds.values()) == pytest.approx(10.0)
    document = goodput.document()
    assert document["recorded"] - document["started"] == pytest.approx(10.0)


def test_an_account_that_cannot_be_read_begins_anew(time: Time, tmp_path: Path):
    path = tmp_path / "goodput.json"
    path.write_text('{"seconds": {"ste')
    goodput, _ = begin(path, time, 3, setup=1.0)
    time.now += 1.0
    goodput.took(4, skipped=False)
    assert goodput.record() == pytest.approx(0.5)
