"""Makes the tables of docs/plans.md: every row is the report of one `sora-jax plan`, compiled here (no TPU is needed).

    python docs/plans.py                  # all plans, an hour on two cores; what was compiled before is not again
    python docs/plans.py wan_14b          # those whose flags have this in them; the others keep their reports
    python docs/plans.py --tables         # the tables alone, from the reports that there are

The reports are kept in docs/runs/plans.json. Needs the extra `tpu`. Nobody edits figures by hand: change a plan here,
and run it.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from marked import between

PAGE = Path(__file__).with_name("plans.md")
REPORTS = Path(__file__).parent / "runs" / "plans.json"  # flags: what `sora-jax plan FLAGS --json` said
GIB = 2**30
# what is shown, and the flags of its plan
PLANS = (
    ("1.3B, 480p, 81 frames", "--config wan_1_3b --topology v5e-16 --batch-size 16 --mesh fsdp=16"),
    ("1.3B, 480p, 81 frames", "--config wan_1_3b --topology v6e-64 --batch-size 64 --mesh fsdp=64"),
    ("5B, 704p, 121 frames", "--config wan_5b --topology v5e-256 --batch-size 64 --mesh fsdp=64,sequence=4"),
    ("5B, 704p, 121 frames", "--config wan_5b --topology v6e-256 --batch-size 128 --mesh fsdp=128,sequence=2"),
    (
        "5B, 704p, 10 s, a sampler's step",
        "--config wan_5b --sample --topology v6e-64 --seconds 10 --batch-size 8 --mesh fsdp=8,sequence=8",
    ),
    (
        "5B, 704p, 60 s, a sampler's step",
        "--config wan_5b --sample --topology v6e-64 --seconds 60 --batch-size 8 --mesh fsdp=8,sequence=8",
    ),
    ("14B, 720p, 81 frames", "--config wan_14b --topology v5p-128 --batch-size 8 --mesh fsdp=8,sequence=8"),
    ("14B, 720p, 81 frames", "--config wan_14b --topology v6e-256 --batch-size 32 --mesh fsdp=32,sequence=8"),
    ("14B, 720p, 81 frames", "--config wan_14b --topology tpu7x-128 --batch-size 32 --mesh fsdp=32,sequence=4"),
    ("14B, 720p, 20 s", "--config wan_14b_20s --topology v5p-256"),
    ("14B, 720p, 60 s", "--config wan_14b_60s --topology v5p-512"),
)
# the stages of the recipe for footage of one's own; how many steps each has is the config's to say
STAGES = (
    ("autoencoder", "--config footage_autoencoder --topology v6e-64"),
    ("images", "--config footage_images --topology v6e-64"),
    ("short videos", "--config footage_short --topology v6e-64"),
    ("long videos", "--config footage_long --topology v6e-64"),
)
DAY = 86_400


Report = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="?", default="", help="part of the flags of the plans to make (all)")
    parser.add_argument("--tables", action="store_true", help="compile nothing")
    args = parser.parse_args()
    wanted = [flags for _, flags in (*PLANS, *STAGES)]
    reports: dict[str, Report] = json.loads(REPORTS.read_text()) if REPORTS.exists() else {}
    for flags in wanted:
        if args.which in flags and not args.tables:
            reports[flags] = report(flags)
            kept = {flags: reports[flags] for flags in wanted if flags in reports}
            REPORTS.write_text(json.dumps(kept, indent=1) + "\n")
    page = PAGE.read_text()
    for name, plans, table in (("plans", PLANS, plans_table), ("stages", STAGES, stages_table)):
        page = between(page, name, "\n".join([*table(reports), "", *commands(plans)]), by="docs/plans.py")
    PAGE.write_text(page)


def plans_table(reports: dict[str, Report]) -> list[str]:
    lines = [
        "| | on | mesh | rows a step | remat | peak, of a device's memory | arguments | collectives, GiB a device | "
        "PFLOP a step (executed) | no step faster than | at 40 / 50 / 60 % of the peak | chip-hours for 1,000 steps, "
        "40 % | clips/s, 50 % |",
        "| --- " * 13 + "|",
    ]
    for name, flags in PLANS:
        if flags in reports:
            lines.append(row(name, _value(flags, "--topology"), reports[flags]))
        else:
            lines.append(f"| {name} | {_value(flags, '--topology')}: not compiled yet |" + " |" * 11)
    return lines


def row(name: str, product: str, made: Report) -> str:
    at, sampling = made["at_mfu"], made["program"] == "sampler step"
    mesh = ", ".join(f"{axis} {n}" for axis, n in made["mesh"].items())
    shared = made["devices"] // (made["mesh"].get("data", 1) * made["mesh"].get("fsdp", 1))
    rows = made["rows"] * shared // made["devices"]
    chips = f"{made['chips']} chips" + (f", {made['devices']} devices" if made["devices"] != made["chips"] else "")
    collectives = sum(kind["bytes"] for kind in made["collectives"].values())
    slowest = max(made["seconds_at_best"], key=made["seconds_at_best"].get)
    seconds = " / ".join(
        f"{at[share]['seconds_per_step']:.3g}" if at[share]["reachable"] else "—" for share in ("40%", "50%", "60%")
    )
    cells = [
        f"{name}: {made['parameters']:,} parameters, {made['tokens'] // made['rows']:,} tokens a row",
        f"{product}: {chips}",
        mesh,
        f"{made['rows']}: {rows} on each " + (f"{shared} devices" if shared > 1 else "device"),
        made["remat"] or "",
        f"{made['peak_bytes_per_device'] / GIB:.1f} of {made['hbm_bytes_per_device'] / GIB:.0f} GiB, "
        + ("fits" if made["fits"] else "does not fit"),
        f"{made['argument_bytes_per_device'] / GIB:.2f} GiB",
        f"{collectives / GIB:.1f}",
        f"{made['flops_per_step'] / 1e15:,.1f} ({made['executed_flops_per_step'] / 1e15:,.1f})",
        f"{made['seconds_at_best'][slowest]:.3g} s ({slowest})",
        f"{seconds} s",
        f"{at['40%']['chip_hours_per_1000_steps']:,.0f}",
        "" if sampling else f"{at['50%']['videos_per_second']:.3g}",
    ]
    return "| " + " | ".join(cells) + " |"


def stages_table(reports: dict[str, Report]) -> list[str]:
    from sora_jax.config import load_config

    lines = [
        "| stage | config | parameters | rows a step | peak, of a device's memory | s a step, 40 % | steps | "
        "days, 40 % | chip-hours, 40 % |",
        "| --- " * 9 + "|",
    ]
    hours = days = 0.0
    for name, flags in STAGES:
        config = _value(flags, "--config")
        if flags not in reports:
            lines.append(f"| {name} | [{config}](../configs/{config}.py) | not compiled yet |" + " |" * 6)
            continue
        made = reports[flags]
        steps, at = load_config(config).train.steps, made["at_mfu"]["40%"]
        spent = at["chip_hours_per_1000_steps"] * steps / 1000
        hours, days = hours + spent, days + at["seconds_per_step"] * steps / DAY
        lines.append(
            f"| {name} | [{config}](../configs/{config}.py) | {made['parameters']:,} | {made['rows']} | "
            f"{made['peak_bytes_per_device'] / GIB:.1f} of {made['hbm_bytes_per_device'] / GIB:.0f} GiB, "
            f"{'fits' if made['fits'] else 'does not fit'} | {at['seconds_per_step']:.3g} | {steps:,} | "
            f"{at['seconds_per_step'] * steps / DAY:.2g} | {spent:,.0f} |"
        )
    if all(flags in reports for _, flags in STAGES):
        lines.append(f"| all | | | | | | | {days:.2g} | {hours:,.0f} |")
    return lines


def report(flags: str) -> Report:
    """What `sora-jax plan FLAGS` says, in a process of its own: a compilation leaves gigabytes behind."""
    sys.stderr.write(f"sora-jax plan {flags}\n")
    command = [sys.executable, "-m", "sora_jax", "plan", *shlex.split(flags), "--json"]
    made = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    made.pop("loader")  # of this machine
    return made | {"compiled_on": made["compiled_on"] or dt.date.today().isoformat()}


def commands(plans: tuple[tuple[str, str], ...]) -> list[str]:
    return [f"    sora-jax plan {flags}" for _, flags in plans]


def _value(flags: str, flag: str) -> str:
    words = shlex.split(flags)
    return words[words.index(flag) + 1]


if __name__ == "__main__":
    main()
