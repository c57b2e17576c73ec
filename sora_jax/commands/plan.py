"""`sora-jax plan`: does a step of training or sampling fit, before anyone pays for the machine?"""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from sora_jax.commands.flags import parse_mesh
from sora_jax.errors import UserError

if TYPE_CHECKING:
    from sora_jax.bench.plan import Plan

HELP = "say whether a step fits a TPU grid or a device, and what would make it fit"
OVERRIDES = True  # takes --config.a.b=value
EXAMPLES = """
    sora-jax plan --config wan_1_3b --topology v5e-16 --batch-size 16
    sora-jax plan --config wan_14b --topology v5p:4x4x4 --mesh fsdp=16,sequence=4
    sora-jax plan --config wan_14b --topology 2xv6e-256 --mesh dcn_data=2,fsdp=64,sequence=4
    sora-jax plan --config wan_1_3b --sample --hbm 24
    sora-jax plan --config world --topology local --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="NAME|PATH", help="a config's name or .py file")
    parser.add_argument("--sample", action="store_true", help="a guided solver step in place of a train step")
    parser.add_argument("--offload", action="store_true", help="of sampling: the text encoder waits on the host")
    where = parser.add_argument_group("where")
    where.add_argument(
        "--topology",
        metavar="GRID",
        help="compile for this grid of TPU chips (v5p:4x4x4) or product (v5p-128), or slices of it (2xv5p-128), no TPU "
        "needed; or local: for here",
    )
    where.add_argument("--hbm", type=float, metavar="GIB", help="reckon for one device with so much memory")
    where.add_argument("--mesh", metavar="AXIS=N,...", help="say fsdp=16,sequence=4 (fsdp takes all devices)")
    what = parser.add_argument_group("what")
    what.add_argument("--frames", type=int, metavar="N", help="of a video, 1 + 4k (the config's)")
    what.add_argument("--seconds", type=float, metavar="S")
    what.add_argument("--height", type=int, metavar="PIXELS")
    what.add_argument("--width", type=int, metavar="PIXELS")
    what.add_argument("--batch-size", type=int, metavar="N", help="videos a step, over all devices (the config's)")
    what.add_argument(
        "--remat", metavar="POLICY", help="what the backward pass recomputes: none, dots, full or offload"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from sora_jax import config as configs
    from sora_jax.bench.plan import find_target, plan_sampling, plan_training, with_size
    from sora_jax.shapes import Extent, frames_for_seconds

    overrides = [*args.overrides, *([f"transformer.remat={args.remat}"] if args.remat else [])]
    config = configs.load_config(args.config, overrides)
    if config.train.stage != "diffusion":
        raise UserError(f"{args.config} is of the stage {config.train.stage}: only the diffusion stage is planned")
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {args.batch_size}")
    mesh = parse_mesh(args.mesh) if args.mesh else {}
    stride = _stride(config)
    frames = args.frames
    if args.seconds is not None:
        if frames is not None:
            raise UserError("--frames and --seconds say the same thing; give one of them")
        frames = frames_for_seconds(args.seconds, config.data.fps, stride.time * config.transformer.patch.time)
    sizes = (frames, args.height, args.width)
    if any(size is not None for size in sizes) or args.batch_size is not None or args.sample:
        data = config.data
        extent = Extent(frames or data.frames, args.height or data.height, args.width or data.width)
        config = with_size(config, stride, extent, args.batch_size)
    target = find_target(args.topology, args.hbm)
    made = (
        plan_sampling(config, target, mesh, args.batch_size or 1, offload=args.offload)
        if args.sample
        else plan_training(config, target, mesh)
    )
    if not args.json:
        print(table(args.config, made))
    return dataclasses.asdict(made)


def _stride(config: Any) -> Any:
    """Of the autoencoder that the config names, where it is at hand; else of the one it describes."""
    from etils import epath

    from sora_jax.weights.component import read_config
    from sora_jax.weights.shipped import shipped_models
    from sora_jax.weights.wan import AUTOENCODER

    folder = epath.Path(shipped_models().get(config.data.autoencoder, config.data.autoencoder)) / AUTOENCODER.folder
    described = read_config(folder / "config.json", AUTOENCODER) if (folder / "config.json").exists() else None
    return (described or config.autoencoder).stride


def table(name: str, made: Plan) -> str:
    """What people read: where the bytes are, and whether they fit."""
    gib = 2**30
    mesh = ", ".join(f"{axis}={n}" for axis, n in made.mesh.items()) or "one device"
    how = {
        "compiled": f"compiled in {made.compile_seconds} s",
        "reckoned": "reckoned, not compiled",
        "refused": "refused by the compiler: over the device's memory",
    }[made.method]
    n = made.parameters
    size = f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"
    peak, memory = made.peak_bytes_per_device / gib, made.hbm_bytes_per_device / gib
    lines = [
        f"{name}: {made.program} · {size} parameters · {made.rows} videos, {made.tokens:,} tokens",
        f"{made.target} · {made.devices} device{'s' * (made.devices > 1)} · {mesh} · {how}",
        "",
        *(f"  {part:18} {held / gib:9.3f} GiB" for part, held in made.parts.items() if held),
        f"  {'peak':18} {peak:9.3f} GiB of {memory:.4g} on each device",
        "",
        f"  {made.flops_per_step / 1e12:,.1f} TFLOP a step, executed {made.executed_flops_per_step / 1e12:,.1f}",
    ]
    for kind, found in (made.collectives or {}).items():
        lines.append(f"  {found['count']:5} x {kind:18} {found['bytes'] / gib:9.3f} GiB on each device")
    if made.seconds_at_best:
        best = ", ".join(f"{what} {seconds:.3g} s" for what, seconds in made.seconds_at_best.items())
        lines += ["", f"  no step is faster than the slowest of: {best}", "  by arithmetic, not measured:"]
    for share, found_at in (made.at_mfu or {}).items():
        lines.append(
            f"    at {share} of the peak: {found_at['seconds_per_step']:.3g} s a step, "
            f"{found_at['videos_per_second']:.3g} videos/s, {found_at['tokens_per_day'] / 1e9:,.3g} G tokens a day, "
            f"{found_at['chip_hours_per_1000_steps']:,.0f} chip-hours for 1,000 steps"
        )
    lines += ["", "  fits" if made.fits else "  does not fit; what would help:"]
    lines += [f"    {advice}" for advice in made.advice]
    return "\n".join(lines)
