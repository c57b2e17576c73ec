"""Makes the tables and pictures of docs/study.md: single changes to a small run at equal compute, and a scaling curve.

    python docs/study.py                              # all that has not been run; goes on where it was stopped
    python docs/study.py base optimizer scale-64      # these runs, and these groups of runs
    python docs/study.py --list                       # the runs, and which of them are done
    python docs/study.py --tables                     # the page and the pictures alone, from the results that there are

A result is a file docs/runs/study/NAME.json, with the log of its losses beside it; what has one is not run again.
Latents, checkpoints and the models that some runs begin from lie under --work. Every training is `sora-jax train` in a
process of its own, which goes on from its last checkpoint, and what it learned is judged by `sora-jax eval`. Nobody
edits figures by hand: change a run in study_runs.py, remove its result, and run it. Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import study_fit
import study_page
from running import OtherWork, machine, named, rounded, sora_jax
from study_runs import BASE, BASE_STEPS, BASE_WIDTH, MODEL, PREDICTED, PREPARED, RUNS, SCALE, Run

RESULTS = Path(__file__).parent / "runs" / "study"
PREDICTION = RESULTS / "prediction.json"  # of the widest run, made before it
JUDGED = "--n 100"  # held-out prompts
JUDGED_AT = "--steps 15"  # of a model that was trained here


# ----------------------------------------------------------------------------------------------------------- one by one


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="*", help="names and groups of runs (all)")
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/study"), help="latents and checkpoints (outputs/study)"
    )
    parser.add_argument("--list", action="store_true", help="name the runs, run nothing")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    args = parser.parse_args(arguments)
    runs = chosen(args.which)
    if args.list:
        for run in runs:
            done = "done" if result_of(run.name) else ""
            sys.stdout.write(f"{done:4}  {run.name:16} {run.group:12} {run.what}\n")
        return
    if not args.tables:
        for run in runs:
            if not result_of(run.name):
                make(run, args.work)
                study_page.write(RUNS, results(), predict())
    study_page.write(RUNS, results(), predict())


def chosen(which: Sequence[str]) -> list[Run]:
    """The runs with these names or of these groups, in the order of RUNS; all, where nothing is named."""
    return named(RUNS, which)


def make(run: Run, work: Path) -> None:
    """Runs it, and keeps what came of it."""
    if run.name == PREDICTED and predict() is None:
        raise SystemExit(f"{PREDICTED} is predicted before it is run: first run {', '.join(SCALE[:-1])}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in run.needs:
        prepare(name, work)
    made: dict[str, Any] = {"name": run.name, "config": BASE, "flags": run.flags}
    if run.group == "sampling":
        other, began = OtherWork(), time.monotonic()
        made |= judged(MODEL, run.flags)
        made |= {"config": MODEL, "seconds": round(time.monotonic() - began, 1), "other_work": other.share()}
    else:
        made |= trained(run, work)
        if run.judged:
            made |= judged(str(work / run.name), JUDGED_AT)
    made |= machine()
    (RESULTS / f"{run.name}.json").write_text(json.dumps(made, indent=1) + "\n")


def prepare(name: str, work: Path) -> None:
    """One of PREPARED; a file says that it is whole."""
    done = work / "made" / f"{name}.done"
    if not done.exists():
        sora_jax(*PREPARED[name].format(work=work).split())
        done.write_text(PREPARED[name] + "\n")


def trained(run: Run, work: Path) -> dict[str, Any]:
    """Trains, and says what it cost and what loss it came to; the log of losses is kept beside the result."""
    workdir, steps = work / run.name, steps_of(run)
    account, beside = workdir / "goodput.json", workdir / "other_work.json"

    def finished() -> bool:
        return account.exists() and json.loads(account.read_text())["finished"]

    if not finished() or not beside.exists():
        other = OtherWork()
        words = [f"data.latents={work / 'made' / 'latents'}", *settings(run)]
        told = [f"--config.{word.format(work=work)}" for word in words]
        sora_jax("train", "--config", BASE, "--workdir", str(workdir), *told)
        if not finished():  # told to stop, it saves and leaves as one that is done does
            raise SystemExit(f"{run.name} was stopped before its last step; the same command goes on from there")
        beside.write_text(json.dumps(other.share()))  # of the last leg
    log = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    lines = [rounded({key: value for key, value in line.items() if _kept(key)}) for line in log]
    (RESULTS / f"{run.name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checked = [line for line in lines if "validation_loss" in line]
    return {
        "steps": steps,
        "operations_a_step": operations(run),
        "parameters": parameters_of(run),
        "seconds": round(json.loads(account.read_text())["seconds"]["steps"], 1),  # the steps alone
        "other_work": json.loads(beside.read_text()),
        "loss": {key.removeprefix("validation_"): value for key, value in checked[-1].items() if "validation" in key},
        "course": [[line["step"], line["validation_loss"]] for line in checked],
    }


def judged(model: str, flags: str) -> dict[str, Any]:
    """Held-out prompts: shares that are right, with their Wilson intervals."""
    command = ["eval", "--model", model, *JUDGED.split(), *flags.split(), "--json"]
    metrics = json.loads(sora_jax(*command))["metrics"]
    return {"accuracy": {name: rounded(metric) for name, metric in metrics.items()}}


# -------------------------------------------------------------------------------------------------------- equal compute


def settings(run: Run) -> list[str]:
    """The overrides of a run: what depends on its number of steps, then its own flags."""
    steps = steps_of(run)
    of_steps = {
        "train.steps": steps,
        "optimizer.warmup_steps": max(steps // 20, 1),
        "train.ema": round(1 - 10 / steps, 4),
        "train.validate_every": max(steps // 4, 1),
    }
    return [f"{key}={value}" for key, value in of_steps.items()] + run.flags.split()


def steps_of(run: Run) -> int:
    """A point of the scaling curve has steps in proportion to its width; any other run as many as are the operations of
    the base."""
    if run.width:
        return BASE_STEPS * run.width // BASE_WIDTH
    return round(BASE_STEPS * operations(RUNS[0])["executed"] / operations(run)["executed"])


@functools.cache
def operations(run: Run) -> dict[str, float]:
    """Of one step on a CPU, counted from jaxprs: `model`, forward and twice that again for what learns; `executed`, the
    whole program with its optimizer. The number of steps moves neither."""
    from sora_jax.bench.compute import training_flops

    model, executed = training_flops(*_program(run), platform="cpu")
    return {"model": model, "executed": executed}


def parameters_of(run: Run) -> int:
    """That learn."""
    from sora_jax.training.optimizer import count_parameters

    return count_parameters(_program(run)[1].state.params)


@functools.cache
def _program(run: Run) -> tuple[Any, Any]:
    import jax

    from sora_jax.bench.programs import training_program
    from sora_jax.config import load_config
    from sora_jax.runtime import compute_dtype
    from sora_jax.sharding import make_mesh

    config, devices = load_config(BASE, run.flags.split()), jax.devices("cpu")[:1]
    dtype = compute_dtype(config.train.dtype, devices)
    return config, training_program(config, make_mesh({"data": 1}, devices), dtype)


def compute_of(result: dict[str, Any]) -> float:
    """Operations of a whole training."""
    return float(result["steps"] * result["operations_a_step"]["executed"])


# ----------------------------------------------------------------------------------------------------- what is kept


def result_of(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def results() -> dict[str, dict[str, Any]]:
    return {run.name: found for run in RUNS if (found := result_of(run.name))}


def predict() -> dict[str, Any] | None:
    """What the narrower runs say of the widest, kept from before it was run; None until they are all there."""
    if PREDICTION.exists():
        return dict(json.loads(PREDICTION.read_text()))
    points = [result_of(name) for name in SCALE[:-1]]
    if None in points or result_of(PREDICTED):
        return None
    widest = next(run for run in RUNS if run.name == PREDICTED)
    compute = steps_of(widest) * operations(widest)["executed"]
    fit = study_fit.saturating_fit([compute_of(p) for p in points if p], [p["loss"]["loss"] for p in points if p])
    made = fit._asdict() | {
        "of": PREDICTED,
        "from": list(SCALE[:-1]),
        "compute": compute,
        "predicted": fit.loss(compute),
        "date": dt.date.today().isoformat(),
    }
    PREDICTION.write_text(json.dumps(made, indent=1) + "\n")
    return made


def _kept(key: str) -> bool:
    return key in ("step", "loss") or (key.startswith("validation_loss") and not key.endswith("_tokens"))


if __name__ == "__main__":
    main()
