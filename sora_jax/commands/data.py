"""`sora-jax data`: what training would make of a data set."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from sora_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from sora_jax.training.data_report import DataReport

HELP = "report on a data set: how full rows are, how even steps, what is left out and why"
OVERRIDES = True  # takes --config.a.b=value
EXAMPLES = """
    sora-jax data report latents/world
    sora-jax data report latents/mine --config wan_1_3b --shards 8
    sora-jax data report latents/mine --config.data.row_tokens=160 --config.data.row_text=320
    sora-jax data report my_videos --config my_config.py      # before it is encoded
    sora-jax data report latents/mine --read --json           # reads every record: finds bit rot
"""
ACTIONS = ("report",)
SHAPES = 12  # lines of the histogram


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", metavar="report", help="plan an epoch as train would, and say what came of it")
    parser.add_argument("source", metavar="CACHE|FOLDER", help="a latent cache (several: a,b), or a folder of videos")
    parser.add_argument("--config", default="world", metavar="NAME|PATH", help="whose rows, seed and shares (world)")
    parser.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="devices that share the rows of a step (data x fsdp), for the imbalance; by default each row has its own",
    )
    parser.add_argument("--read", action="store_true", help="read every record of a cache, and count the corrupt ones")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.action not in ACTIONS:
        raise UserError(f'unknown action "{args.action}": {nearest(args.action, ACTIONS)}')
    if args.shards is not None and args.shards < 1:
        raise UserError(f"--shards must be >= 1, not {args.shards}")
    from sora_jax import config as configs
    from sora_jax.training.data_report import data_report

    config = configs.load_config(args.config, args.overrides)
    report = data_report(args.source, config, shards=args.shards, read=args.read)
    if not args.json:
        print(_text(report))
    return dataclasses.asdict(report)


def _advice(report: DataReport) -> list[str]:
    """What keeps rows from being full of tokens."""
    for name, fill, places in (
        ("row_text", report.fill_text, report.row[1]),
        ("groups", report.fill_groups, report.row[2]),
    ):
        wanted = round(places * fill / report.fill_tokens)
        if fill > 0.9 and wanted > 1.1 * places:
            return [f"            data.{name} is what fills rows first: about {wanted:,} would let tokens fill them"]
    return []


def _text(report: DataReport) -> str:
    tokens, text, groups = report.row
    lines = [
        f"{report.source}: {report.clips:,} clips an epoch",
        f"rows        {report.rows} of {tokens:,} tokens, {text:,} text places and {groups} groups, {report.packing}",
        f"epoch       {report.steps_per_epoch:,.1f} steps of {report.clips_per_step:,.1f} clips"
        + (f", {report.programs} shapes of batches" if report.programs > 1 else ""),
        f"fill        tokens {report.fill_tokens:.1%}, text {report.fill_text:.1%}, groups {report.fill_groups:.1%}",
        f"imbalance   {report.imbalance_mean:.1%} of a step's mean cost over {report.shards} devices, at most "
        f"{report.imbalance_max:.1%}",
        *_advice(report),
        "left out    nothing" if not report.left_out else "left out",
    ]
    for reason, count in report.left_out.items():
        ends = "; ends the run unless data.skip_misfits" if reason in report.ends_the_run else ""
        some = report.examples.get(reason, [])
        lines.append(f"  {count:>9,.0f} {reason}{ends}" + "".join(f"\n            {name}" for name in some[:3]))
    lines.append("latents     frames x height x width")
    most = max(report.shapes.values())
    for shape, count in list(report.shapes.items())[:SHAPES]:
        lines.append(f"  {count:>9,} {shape:12} {'#' * max(round(40 * count / most), 1)}")
    if len(report.shapes) > SHAPES:
        rest = list(report.shapes.values())[SHAPES:]
        lines.append(f"  {sum(rest):>9,} in {len(rest)} other shapes")
    return "\n".join(lines).rstrip()
