"""The study of docs/study.md: its runs are ones that can be made, at equal compute, and its fit finds what is there."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex

import numpy as np
import pytest
import study
import study_fit
import study_page
import study_runs
from study_runs import PREDICTED, PREPARED, RUNS, SCALE

from sora_jax.cli import take_overrides
from sora_jax.commands import encode, train
from sora_jax.commands import eval as eval_command
from sora_jax.config import load_config
from sora_jax.errors import UserError

BY_NAME = {run.name: run for run in RUNS}
TRAINED = [run for run in RUNS if run.group != "sampling"]

# ------------------------------------------------------------------------------------------------------------ the runs


def test_every_run_has_a_name_of_its_own_and_what_it_needs_is_made():
    assert len(BY_NAME) == len(RUNS)
    assert not set(BY_NAME) & {run.group for run in RUNS}
    assert {name for run in RUNS for name in run.needs} == set(PREPARED)
    for run in RUNS:  # what a run reads under WORK/made is made before it
        read = {word.partition("{work}/made/")[2] for word in run.flags.split() if "{work}" in word}
        assert read <= set(run.needs), run.name


def test_every_training_is_a_config_and_changes_something():
    configs = [load_config("study", run.flags.split()) for run in TRAINED]
    assert len(set(configs)) == len(TRAINED)
    assert configs[0] == load_config("study")
    for run, config in zip(TRAINED, configs, strict=True):
        assert config.transformer.text_dim == config.text_encoder.d_model
        if run.width:
            assert config.transformer.dim == run.width
            assert (config.transformer.ffn_dim, config.transformer.head_dim) == (4 * run.width, 32)
    with pytest.raises(UserError, match="optimizer"):
        load_config("study", ["optimiser.name=adamw"])


def test_what_is_made_before_and_ways_to_sample_are_commands_that_parse():
    for command in PREPARED.values():
        name, *words = shlex.split(command.format(work="W"))
        parser = argparse.ArgumentParser()
        (train if name == "train" else encode).add_arguments(parser)
        words, overrides = take_overrides(words)
        args = parser.parse_args(words)
        if name == "train":
            load_config(args.config, overrides)
    parser = argparse.ArgumentParser()
    eval_command.add_arguments(parser)
    asked = {tuple(sorted(vars(parser.parse_args(run.flags.split())).items())) for run in RUNS if not run.needs}
    assert len(asked) == sum(run.group == "sampling" for run in RUNS)


def test_runs_are_chosen_by_name_and_by_group():
    assert [run.name for run in study.chosen(["levels", "base"])][:2] == ["base", "shift-1"]
    assert {run.group for run in study.chosen(["levels"])} == {"levels"}
    assert [run.name for run in study.chosen(["scale-64"])] == ["scale-64"]
    assert len(study.chosen([])) == len(RUNS)
    with pytest.raises(SystemExit, match="scale-65"):
        study.chosen(["scale-65"])


# ------------------------------------------------------------------------------------------------------- equal compute


def forward_of_the_base(width: int, layers: int, feed_forward: int, rows: int) -> tuple[float, float]:
    """Operations of the transformer and of the text encoder, by hand: rows of 80 tokens, 96 of text, 5 levels."""
    N, L, G, D, channels, text_dim = 80, 96, 5, width, 32, 128
    kernels = 2 * N * (6 * D * D + 2 * D * feed_forward) + 2 * L * 2 * D * D  # text is keys and values
    scores = 2 * 2 * N * N * D + 2 * 2 * N * L * D
    spreading = 6 * 2 * N * G * D  # six rows of modulation
    borders = 2 * N * D * 2 * channels + 2 * L * (text_dim * D + D * D) + 2 * 2 * N * G * D
    levels = 2 * G * (256 * D + D * D + 6 * D * D)
    text = 3 * (2 * L * (4 * 128 * 128 + 3 * 128 * 256) + 2 * 2 * L * L * 128)
    return float(rows * (layers * (kernels + scores + spreading) + borders + levels)), float(rows * text)


@pytest.mark.parametrize(
    ("name", "sizes"), [("base", (96, 4, 384)), pytest.param("scale-64", (64, 4, 256), marks=pytest.mark.slow)]
)
def test_operations_of_a_step_are_those_counted_by_hand(name, sizes):
    transformer, text = forward_of_the_base(*sizes, rows=12)
    assert study.operations(BY_NAME[name])["model"] == pytest.approx(3 * transformer + text, rel=0.01)


def test_a_cheaper_step_gives_more_steps():
    patches = BY_NAME["patch-2"]
    spent = study.steps_of(patches) * study.operations(patches)["executed"]
    assert spent == pytest.approx(2_880 * study.operations(BY_NAME["base"])["executed"], rel=0.01)
    assert study.steps_of(patches) > 2_880


@pytest.mark.runs
def test_every_change_has_the_compute_of_the_base():
    budget = 2_880 * study.operations(BY_NAME["base"])["executed"]
    for run in TRAINED:
        if not run.width:
            assert study.steps_of(run) * study.operations(run)["executed"] == pytest.approx(budget, rel=0.01), run.name


def test_steps_grow_with_the_width_and_settings_with_the_steps():
    assert [study.steps_of(BY_NAME[name]) for name in SCALE] == [1920, 2880, 3840, 4800, 5760, 6720]
    config = load_config("study", study.settings(BY_NAME["scale-64"]))
    assert (config.train.steps, config.optimizer.warmup_steps, config.train.validate_every) == (1920, 96, 480)
    assert config.train.ema == pytest.approx(1 - 10 / 1920, abs=1e-4)
    assert load_config("study", study.settings(BY_NAME["base"])) == load_config("study")
    # what a run changes has the last word
    kept = study_runs.Run("", "", "", "train.ema=0.5", width=128)
    assert load_config("study", study.settings(kept)).train.ema == 0.5


# ------------------------------------------------------------------------------------------------------------- the fit


COMPUTE = np.array([3e12, 1e13, 3e13, 9e13])


def test_a_plain_power_law_is_found():
    losses = 0.2 * (COMPUTE / 1e15) ** -0.15
    law = study_fit.plain_fit(COMPUTE, losses)
    assert law.form == "plain"
    assert (law.a, law.b, law.c, law.r2) == pytest.approx((0.2, 0.15, 0.0, 1.0), rel=1e-6)
    assert law.loss(2e14) == pytest.approx(0.2 * 0.2**-0.15, rel=1e-6)
    # and with a floor, which is looked for on a grid
    law = study_fit.saturating_fit(COMPUTE, losses)
    assert (law.a, law.b, law.r2) == pytest.approx((0.2, 0.15, 1.0), rel=1e-3)
    assert law.c == pytest.approx(0.0, abs=1e-3)
    assert law.loss(2e14) == pytest.approx(0.2 * 0.2**-0.15, rel=1e-4)


def test_a_floor_is_found():
    losses = 0.3 + 1e-4 * (COMPUTE / 1e15) ** -1.5
    assert study_fit.plain_fit(COMPUTE, losses).r2 < 0.98
    law = study_fit.saturating_fit(COMPUTE, losses)
    assert law.form == "saturating"
    assert (law.a, law.b, law.c) == pytest.approx((1e-4, 1.5, 0.3), rel=0.01)
    assert law.loss(2e14) == pytest.approx(0.3 + 1e-4 * 0.2**-1.5, rel=0.001)


def test_r2_is_the_share_of_the_spread_of_log_losses_that_is_explained():
    """A line of slope -1 over x = -1, 0, 1 with residuals e (1, -2, 1), which are orthogonal to every line."""
    x, e = np.array([-1.0, 0.0, 1.0]), 0.1
    law = study_fit.plain_fit(1e15 * np.exp(x), np.exp(-x + e * np.array([1.0, -2.0, 1.0])))
    assert law.b == pytest.approx(1.0)
    assert law.r2 == pytest.approx(2 / (2 + 6 * e**2))


def test_three_points_are_no_curve():
    with pytest.raises(ValueError, match="four runs"):
        study_fit.saturating_fit([1e12, 1e13, 1e14], [1.0, 0.5, 0.4])


# --------------------------------------------------------------------------------------------------- results and pages


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of results, empty; no process is started."""
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "PREDICTION", tmp_path / "prediction.json")
    monkeypatch.setattr(study, "sora_jax", lambda *command: pytest.fail(f"ran {command}"))
    return tmp_path


def result(name: str, loss: float, executed: float = 1e10) -> dict[str, object]:
    levels = {f"loss_{level / 100:.2f}": loss for level in range(5, 100, 10)}
    share = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 100}
    return {
        "name": name,
        "steps": study.steps_of(BY_NAME[name]),
        "operations_a_step": {"model": executed, "executed": executed},
        "parameters": 1_000_000,
        "seconds": 12.0,
        "other_work": 0.0,
        "loss": {"loss": loss, **levels},
        "accuracy": dict.fromkeys(study_page.ATTRIBUTES, share),
    }


def test_the_widest_run_is_predicted_before_it_is_made_and_the_prediction_stays(kept, tmp_path):
    with pytest.raises(SystemExit, match="predicted before"):
        study.make(BY_NAME[PREDICTED], tmp_path)
    for name, executed in zip(SCALE[:-1], (1e10, 2e10, 3e10, 6e10, 9e10), strict=True):
        compute = study.steps_of(BY_NAME[name]) * executed
        (kept / f"{name}.json").write_text(json.dumps(result(name, 0.1 + 0.2 * (compute / 1e15) ** -0.15, executed)))
    widest = 6720 * study.operations(BY_NAME[PREDICTED])["executed"]
    predicted = study.predict()
    assert predicted is not None
    assert predicted["predicted"] == pytest.approx(0.1 + 0.2 * (widest / 1e15) ** -0.15, rel=1e-3)
    # another result for a point that it was made from moves nothing
    (kept / f"{SCALE[0]}.json").write_text(json.dumps(result(SCALE[0], 9.0)))
    assert study.predict() == predicted
    law = f"L = {predicted['c']:.3f} + {predicted['a']:.4f} C^-{predicted['b']:.4f}"
    assert law in study_page.fit_lines({}, predicted)[0]


def test_what_has_a_result_is_not_run_again(kept, monkeypatch):
    pages = []
    monkeypatch.setattr(study_page, "write", lambda *what: pages.append(what))
    (kept / "base.json").write_text(json.dumps(result("base", 0.5)))
    study.main(["base", "--work", str(kept)])
    assert [set(results) for _, results, _ in pages] == [{"base"}]


def test_a_training_that_was_told_to_stop_has_no_result(kept, tmp_path, monkeypatch):
    """It leaves with exit code 0, after as many validations as it came to."""
    work = tmp_path / "work"

    def stopped(*command: str) -> str:
        workdir = work / "seed-1"
        workdir.mkdir(parents=True)
        (workdir / "goodput.json").write_text(json.dumps({"finished": False, "seconds": {"steps": 3.0}}))
        (workdir / "metrics.jsonl").write_text(json.dumps({"step": 720, "validation_loss": 0.6}) + "\n")
        return ""

    monkeypatch.setattr(study, "sora_jax", stopped)
    with pytest.raises(SystemExit, match="seed-1 was stopped before its last step; the same command goes on"):
        study.make(dataclasses.replace(BY_NAME["seed-1"], needs=()), work)
    assert not list(kept.glob("seed-1*"))


def test_the_table_says_what_a_change_gained():
    results = {"base": result("base", 0.5), "shift-1": result("shift-1", 0.4567)}
    lines = study_page.losses_table([BY_NAME["base"], BY_NAME["shift-1"], BY_NAME["shift-4"]], results)
    assert "| 0.4567 | -0.0433 | 0.457 |" in lines[3]
    assert "not run yet" in lines[4]
    assert len({line.count("|") for line in lines}) == 1
    assert "| 100 | 50 (25 to 75) |" in study_page.accuracy_table([BY_NAME["base"]], results)[2]


def test_the_page_is_what_the_results_make():
    prediction = json.loads(study.PREDICTION.read_text()) if study.PREDICTION.exists() else None
    made = study_page.page(RUNS, study.results(), prediction)
    assert study_page.PAGE.read_text() == made, "study.md was edited by hand: run docs/study.py --tables"
