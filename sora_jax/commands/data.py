"""`sora-jax data`: what training would make of a data set, and what the world looks like."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from sora_jax.commands.flags import parse_shots
from sora_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from sora_jax.training.data_report import DataReport

HELP = "report on a data set (how full rows are, what is left out and why), or preview the world on a contact sheet"
OVERRIDES = True  # takes --config.a.b=value
EXAMPLES = """
    sora-jax data report latents/world
    sora-jax data report latents/mine --config wan_1_3b --shards 8
    sora-jax data report latents/mine --config.data.row_tokens=160 --config.data.row_text=320
    sora-jax data report my_videos --config my_config.py      # before it is encoded
    sora-jax data report latents/mine --read --json           # reads every record: finds bit rot
    sora-jax data preview world --sheet world.png --n 8
    sora-jax data preview world --config world_2 --sheet cuts.png --shots 9,9 --height 96 --width 144
    sora-jax data preview world --sheet floating.png --config.data.mix.floating=100
"""
ACTIONS = ("report", "preview")
REPORT_ONLY = ("shards", "read")
PREVIEW_ONLY = ("sheet", "seed", "n", "split", "frames", "height", "width", "shots", "columns")
MOST = 100  # clips, or frames across, of a sheet
SHAPES = 12  # lines of the histogram


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        metavar="report|preview",
        help="report: plan an epoch as train would, and say what came of it; preview: draw clips with their captions",
    )
    parser.add_argument(
        "source",
        metavar="CACHE|FOLDER|world",
        help="to report on: a latent cache (several: a,b), or a folder of videos; to preview: world",
    )
    parser.add_argument("--config", default="world", metavar="NAME|PATH", help="whose rows, seed and mix (world)")
    parser.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="devices that share the rows of a step (data x fsdp), for the imbalance; by default each row has its own",
    )
    parser.add_argument("--read", action="store_true", help="read every record of a cache, and count the corrupt ones")
    sheet = parser.add_argument_group("preview")
    sheet.add_argument("--sheet", metavar="OUT.png", help="the picture to write")
    sheet.add_argument("--seed", type=int, help="which clips (of the config)")
    sheet.add_argument("--n", type=int, help="how many of them (8)")
    sheet.add_argument("--split", help="train, heldout (combinations that training never shows) or all (train)")
    sheet.add_argument("--frames", type=int, help="1 for images (of the config)")
    sheet.add_argument("--height", type=int, help="pixels (of the config)")
    sheet.add_argument("--width", type=int, help="pixels (of the config)")
    sheet.add_argument("--shots", metavar="T,T,...", help="frames of each of several shots with cuts between them")
    sheet.add_argument("--columns", type=int, help="frames shown of a clip (9)")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.action not in ACTIONS:
        raise UserError(f'unknown action "{args.action}": {nearest(args.action, ACTIONS)}')
    for name in PREVIEW_ONLY if args.action == "report" else REPORT_ONLY:
        if getattr(args, name) not in (None, False):
            raise UserError(f"--{name} is not for data {args.action}: leave it out")
    if args.action == "preview":
        return preview(args)
    if args.shards is not None and args.shards < 1:
        raise UserError(f"--shards must be >= 1, not {args.shards}")
    from sora_jax import config as configs
    from sora_jax.training.data_report import data_report

    config = configs.load_config(args.config, args.overrides)
    report = data_report(args.source, config, shards=args.shards, read=args.read)
    if not args.json:
        print(_text(report))
    return dataclasses.asdict(report)


def preview(args: argparse.Namespace) -> dict[str, Any]:
    """Draws clips of the world as training would see them."""
    if args.source != "world":
        raise UserError(
            f'only the world can be previewed, not "{args.source}": sora-jax data preview world --sheet ...'
        )
    if not args.sheet or not args.sheet.endswith(".png"):
        raise UserError(f"preview needs --sheet OUT.png, not {args.sheet or 'nothing'}")
    from sora_jax.sheet import COLUMNS, Strip, contact_sheet

    n, columns = 8 if args.n is None else args.n, COLUMNS if args.columns is None else args.columns
    for name, value in (("n", n), ("columns", columns)):
        if not 1 <= value <= MOST:
            raise UserError(f"--{name} must be in 1 to {MOST}, not {value}")
    import numpy as np

    from sora_jax import config as configs
    from sora_jax.data.world import WorldSource
    from sora_jax.media import check_writable, write_media
    from sora_jax.record import ALGORITHMIC, Record

    check_writable(args.sheet, frames=1)
    data = configs.load_config(args.config, args.overrides).data

    def given(name: str) -> Any:
        value = getattr(args, name)
        return getattr(data, name) if value is None else value

    size = {name: given(name) for name in ("frames", "height", "width")}
    shots = parse_shots(args.shots) if args.shots else None
    if args.shots and args.frames is not None:
        raise UserError("--shots says how many frames there are: leave --frames out")
    seed, split = given("seed"), args.split or "train"
    lengths = shots or (size["frames"],)
    source = WorldSource(seed, n, split, **size, mix=data.mix, shots=shots)
    strips = []
    for item in source.batch(range(n)):
        ends = np.cumsum([length for length, _ in item["shots"]])
        parts = np.split(item["frames"], ends[:-1])
        captions = [short for _, (short, _) in item["shots"]]
        strips.append(Strip(list(zip(parts, captions, strict=True))))
    length = "+".join(map(str, lengths))
    what = "images" if lengths == (1,) else f"{length} frames"
    title = f"{args.config}   seed {seed}   {split}   {what} of {size['height']}x{size['width']}"
    picture = contact_sheet(strips, title=title, columns=columns)
    record = Record("", seed, "the procedural world", digital_source_type=ALGORITHMIC, **size)
    write_media(picture[None], args.sheet, record)
    if not args.json:
        print(args.sheet)
    return {"sheet": args.sheet, "clips": n, "height": picture.shape[0], "width": picture.shape[1]}


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
