"""The tables of docs/study.md and its pictures in docs/images, from the results of the runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import study_fit
from marked import between
from running import QUIET
from study_runs import BASE, BASE_WIDTH, PREDICTED, SCALE, Run

mpl.use("Agg")
import matplotlib.pyplot as plt

PAGE = Path(__file__).with_name("study.md")
IMAGES = Path(__file__).parent / "images"
ATTRIBUTES = ("background", "color", "shape", "count", "motion", "all")

Result = dict[str, Any]
Results = Mapping[str, Result]


def write(runs: Sequence[Run], results: Results, prediction: Result | None) -> None:
    """The page with its tables made anew, and the pictures for which there are results."""
    PAGE.write_text(page(runs, results, prediction))
    done = [run for run in _trainings(runs) if run.name in results and run.same_latents]
    if sum(run.group == "seeds" for run in done) > 1 and "base" in results:
        draw_changes(done, results)
    if sum(name in results for name in SCALE) > 1:
        draw_scaling(results, prediction)


def page(runs: Sequence[Run], results: Results, prediction: Result | None) -> str:
    """The page as it should be."""
    trained = _trainings(runs)
    sampled = [run for run in runs if run.group == "sampling"]
    curve = [run for name in SCALE for run in runs if run.name == name]
    curve += [run for run in runs if run.group == "rates"]
    tables = {
        "changes": [*losses_table(trained, results), "", *seeds_lines(trained, results)],
        "accuracy": accuracy_table([run for run in trained if run.judged], results),
        "scaling": [*scaling_table(curve, results), "", *fit_lines(results, prediction)],
        "sampling": accuracy_table(sampled, results),
    }
    text = PAGE.read_text()
    for name, lines in tables.items():
        text = between(text, name, "\n".join(lines), by="docs/study.py")
    return text


def _trainings(runs: Sequence[Run]) -> list[Run]:
    """The single changes: neither ways to sample nor points of the curve."""
    return [run for run in runs if run.group not in ("sampling", "scaling", "rates")]


# -------------------------------------------------------------------------------------------------------------- tables


def losses_table(runs: Sequence[Run], results: Results) -> list[str]:
    """Validation loss, its difference from the base's, and the loss at each of ten levels."""
    levels = [key for key in next(iter(_trained(results)), {"loss": {}})["loss"] if key != "loss"]
    heads = ["", "flags", "learn", "steps", "TFLOP (model)", "s", "loss", "- base", *(k[-3:] for k in levels)]
    base = results.get("base")

    def cells(run: Run, found: Result) -> list[str]:
        loss = found["loss"]
        compares = run.name != "base" and run.same_latents
        difference = f"{loss['loss'] - base['loss']['loss']:+.4f}" if base and compares else ""
        shown = [run.what, _flags(run), *_cost(found), f"{loss['loss']:.4f}", difference]
        return [*shown, *(f"{loss[key]:.3f}" for key in levels)]

    return _table(heads, runs, results, cells)


def seeds_lines(runs: Sequence[Run], results: Results) -> list[str]:
    """What differs between runs that differ in nothing but their seed, and where the picture is."""
    losses = [results[run.name]["loss"]["loss"] for run in runs if run.group == "seeds" and run.name in results]
    if len(losses) < 2:
        return []
    told = f"{len(losses)} seeds of the base lie {max(losses) - min(losses):.4f} apart."
    return [told, "", "![Loss of every change](images/study-changes.png)"]


def accuracy_table(runs: Sequence[Run], results: Results) -> list[str]:
    """Shares of held-out prompts in %, each with its 95 % Wilson interval."""
    heads = ["", "n", *("colour" if name == "color" else name for name in ATTRIBUTES)]

    def cells(run: Run, found: Result) -> list[str]:
        shares = found["accuracy"]
        return [run.what, str(shares["all"]["n"]), *(_percent(shares[name]) for name in ATTRIBUTES)]

    return _table(heads, runs, results, cells)


def scaling_table(runs: Sequence[Run], results: Results) -> list[str]:
    heads = ["", "learn", "steps", "TFLOP (model)", "s", "loss", "background", "colour"]

    def cells(run: Run, found: Result) -> list[str]:
        shares = found.get("accuracy")
        right = [_percent(shares[name]) if shares else "" for name in ATTRIBUTES[:2]]
        what = f"{BASE_WIDTH} wide: the base" if run.name == "base" else run.what
        return [what, *_cost(found), f"{found['loss']['loss']:.4f}", *right]

    return _table(heads, runs, results, cells)


def fit_lines(results: Results, prediction: Result | None) -> list[str]:
    """What was fitted, what it predicted, and what came."""
    if prediction is None:
        return [f"No fit yet: it waits for {', '.join(name for name in SCALE[:-1] if name not in results)}."]
    picture = ["", "![Loss against compute](images/study-scaling.png)"]
    law = _law(prediction)
    formula = f"L = {f'{law.c:.3f} + ' if law.c else ''}{law.a:.4f} C^-{law.b:.4f}"
    told = (
        f"Fitted to {len(prediction['from'])} widths on {prediction['date']}, before the next was run: {formula} (C in "
        f"PFLOP; {law.form} power), R² = {law.r2:.4f}. It predicts {prediction['predicted']:.4f} at "
        f"{prediction['compute'] / 1e12:.0f} TFLOP"
    )
    if PREDICTED not in results:
        return [told + "; that run is still to come.", *picture]
    came = results[PREDICTED]["loss"]["loss"]
    return [told + f"; {came:.4f} came, {100 * (prediction['predicted'] / came - 1):+.1f} % off.", *picture]


def _cost(found: Result) -> list[str]:
    """What learns, steps, compute and time. A time is marked where the cores had other work as well."""
    count, steps = found["operations_a_step"], found["steps"]
    beside = found["other_work"] is None or found["other_work"] > QUIET
    return [
        f"{found['parameters'] / 1e6:.2f} M",
        f"{steps:,}",
        f"{steps * count['executed'] / 1e12:.1f} ({steps * count['model'] / 1e12:.1f})",
        f"{found['seconds']:.0f}{'*' if beside else ''}",
    ]


def _flags(run: Run) -> str:
    return f"`{run.flags.strip()}`" if run.flags else f"[{BASE}](../configs/{BASE}.py)"


def _table(
    heads: Sequence[str], runs: Sequence[Run], results: Results, cells: Callable[[Run, Result], list[str]]
) -> list[str]:
    """A row for each run, and a mark for those that have no result yet."""
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for run in runs:
        if run.name in results:
            lines.append("| " + " | ".join(cells(run, results[run.name])) + " |")
        else:
            lines.append(f"| {run.what} | not run yet" + " |" * (len(heads) - 1))
    return lines


def _percent(share: Result) -> str:
    return f"{100 * share['value']:.0f} ({100 * share['low']:.0f} to {100 * share['high']:.0f})"


def _trained(results: Results) -> list[Result]:
    return [found for found in results.values() if "loss" in found]


def _law(prediction: Result) -> study_fit.PowerLaw:
    return study_fit.PowerLaw(**{name: prediction[name] for name in study_fit.PowerLaw._fields})


# ------------------------------------------------------------------------------------------------------------ pictures


def draw_changes(runs: Sequence[Run], results: Results) -> None:
    """The loss of each change, best first, beside the base's; the band is what seeds alone do."""
    order = sorted(runs, key=lambda run: results[run.name]["loss"]["loss"], reverse=True)
    seeds = [results[run.name]["loss"]["loss"] for run in runs if run.group == "seeds"]
    figure, axis = plt.subplots(figsize=(7.5, 0.24 * len(order) + 0.9))
    if len(seeds) > 1:
        axis.axvspan(min(seeds), max(seeds), color="C0", alpha=0.15, lw=0, label=f"the base, {len(seeds)} seeds")
    axis.axvline(results["base"]["loss"]["loss"], color="C0", lw=1, label="the base")
    for place, run in enumerate(order):
        axis.plot(results[run.name]["loss"]["loss"], place, "o", ms=5, color="C0" if run.group == "seeds" else "C1")
    axis.set_yticks(range(len(order)), [run.what for run in order], fontsize=8)
    axis.set(xlabel="validation loss, mean of ten levels")
    axis.grid(alpha=0.2)
    axis.legend(fontsize=8, loc="lower left")  # the worst are at the lower right
    _save(figure, "study-changes.png")


def draw_scaling(results: Results, prediction: Result | None) -> None:
    """Loss over compute: the runs as they went, where they ended, and the power law through all ends but the last."""
    figure, axis = plt.subplots(figsize=(7, 4))
    ends = []
    for number, name in enumerate(name for name in SCALE if name in results):
        found, color = results[name], plt.get_cmap("viridis")(number / len(SCALE))
        step = found["operations_a_step"]["executed"] / 1e12
        ends.append(found["steps"] * step)
        label = f"{found['parameters'] / 1e6:.2f} M parameters" + (", predicted" if name == PREDICTED else "")
        axis.plot(ends[-1], found["loss"]["loss"], "*" if name == PREDICTED else "o", ms=9, color=color, label=label)
        steps, losses = zip(*found["course"], strict=True)
        axis.plot(step * np.array(steps), losses, "-", lw=1, color=color, alpha=0.5)
    if prediction:
        law = _law(prediction)
        along = np.geomspace(0.8 * min(ends), 1.2 * prediction["compute"] / 1e12, 100)
        label = f"{law.form} power, R² = {law.r2:.4f}"
        axis.plot(along, [law.loss(1e12 * at) for at in along], "--", color="0.3", lw=1, label=label)
        axis.plot(prediction["compute"] / 1e12, prediction["predicted"], "x", color="0.3", ms=8, label="prediction")
    axis.set(xscale="log", yscale="log", xlabel="TFLOP of the training", ylabel="validation loss, mean of ten levels")
    for scale, labelled in ((axis.xaxis, (1, 2, 5)), (axis.yaxis, range(1, 10))):
        scale.set_major_locator(mpl.ticker.LogLocator(subs=labelled))
        scale.set_major_formatter("{x:g}")
        scale.set_minor_formatter(mpl.ticker.NullFormatter())
    axis.tick_params(which="both", length=3)
    axis.grid(alpha=0.2, which="both")
    axis.legend(fontsize=8)
    _save(figure, "study-scaling.png")


def _save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(IMAGES / name, dpi=110)
    plt.close(figure)
