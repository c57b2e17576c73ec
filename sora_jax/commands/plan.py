"""`sora-jax plan`: does a step of training or sampling fit, before anyone pays for the machine?"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from sora_jax.commands.flags import parse_mesh
from sora_jax.errors import UserError

if TYPE_CHECKING:
    from sora_jax.bench.plan import Plan

HELP = "say whether a step fits a TPU grid or a device, and what would make it fit"
OVERRIDES = True  # takes --config.a.b=value
EXAMPLES = """
    sora-jax plan --config wan_1_3b --topology v5e-16 --batch-size 16
    sora-jax plan --config wan_14b --topology v5p-128 --mesh fsdp=8,sequence=8
    sora-jax plan --config wan_14b --topology v6e-256 --batch-size 32 --search
    sora-jax plan --config wan_14b --topology 2xv6e-256 --mesh dcn_data=2,fsdp=64,sequence=4
    sora-jax plan --config wan_5b --sample --topology v6e-64 --seconds 10 --batch-size 8 --mesh fsdp=8,sequence=8
    sora-jax plan --config wan_1_3b --sample --hbm 24
    sora-jax plan --model Wan-AI/Wan2.1-T2V-14B-Diffusers --sample --hbm 80 --offload
    sora-jax plan --config world --topology local --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("--config", metavar="NAME|PATH", help="a config's name or .py file")
    of.add_argument(
        "--model",
        metavar="MODEL",
        help="a model folder, a workdir, a shipped name or one on the hub, of which no weights are fetched: sampled "
        "as it says itself, or its transformer tuned as the config wan_1_3b does",
    )
    parser.add_argument("--sample", action="store_true", help="a guided solver step in place of a train step")
    parser.add_argument(
        "--offload", action="store_true", help="of sampling: text encoder and autoencoder wait on the host"
    )
    where = parser.add_argument_group("where")
    where.add_argument(
        "--topology",
        metavar="GRID",
        help="compile for this grid of TPU chips (v5p:4x4x4) or product (v5p-128), or slices of it (2xv5p-128), "
        "no TPU needed; or local: for here. "
        "A product's name counts chips (v5e, v6e) or cores, two a chip (v4, v5p, tpu7x): v5p-128 and tpu7x-128 are 64 "
        "chips, 64 JAX devices the one and 128 the other",
    )
    where.add_argument("--hbm", type=float, metavar="GIB", help="reckon for one device with so much memory")
    where.add_argument("--mesh", metavar="AXIS=N,...", help="say fsdp=16,sequence=4 (the config's)")
    where.add_argument(
        "--search",
        action="store_true",
        help="find the mesh, and in training the remat policy, that fit: least recomputation first, then least time; "
        "compiles a few candidates, minutes each for a large model",
    )
    where.add_argument("--again", action="store_true", help="compile even where the compiler's answer was kept")
    what = parser.add_argument_group("what")
    what.add_argument("--frames", type=int, metavar="N", help="of a video, 1 + 4k (the config's)")
    what.add_argument("--seconds", type=float, metavar="S")
    what.add_argument("--height", type=int, metavar="PIXELS")
    what.add_argument("--width", type=int, metavar="PIXELS")
    what.add_argument("--batch-size", type=int, metavar="N", help="videos a step, over all devices (the config's)")
    what.add_argument("--remat", metavar="POLICY", help="what the backward pass recomputes (the config's)")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from sora_jax import config as configs
    from sora_jax.bench.model_config import config_of_model
    from sora_jax.bench.plan import plan_sampling, plan_training, with_size
    from sora_jax.bench.programs import autoencoder_stride
    from sora_jax.bench.search import search_sampling, search_training
    from sora_jax.bench.targets import find_target
    from sora_jax.shapes import Extent, frames_for_seconds

    overrides = [*args.overrides, *([f"transformer.remat={args.remat}"] if args.remat else [])]
    name = args.model or args.config
    config = config_of_model(name, overrides) if args.model else configs.load_config(name, overrides)
    if config.train.stage == "text":
        raise UserError(f"{name} is of the stage text: the diffusion and autoencoder stages are planned")
    if args.sample and config.train.stage != "diffusion":
        raise UserError(f"{name} is of the stage {config.train.stage}, and --sample plans a diffusion model")
    if args.offload and not args.sample:
        raise UserError("--offload is of sampling: give it with --sample")
    for size in ("batch_size", "frames", "height", "width"):
        if (value := getattr(args, size)) is not None and value < 1:
            raise UserError(f"--{size.replace('_', '-')} must be at least 1, not {value}")
    mesh = parse_mesh(args.mesh) if args.mesh is not None else {}
    stride = autoencoder_stride(config)
    frames = args.frames
    if args.seconds is not None:
        if frames is not None:
            raise UserError("--frames and --seconds say the same thing; give one of them")
        frames = frames_for_seconds(args.seconds, config.data.fps, stride.time * config.transformer.patch.time)
        print(f"{args.seconds:g} s are {frames} frames at {config.data.fps:g} a second", file=sys.stderr)
    sizes = (frames, args.height, args.width)
    if any(size is not None for size in sizes) or args.batch_size is not None or args.sample:
        data = config.data
        asked = zip(sizes, (data.frames, data.height, data.width), strict=True)
        extent = Extent(*(planned if size is None else size for size, planned in asked))
        config = with_size(config, stride, extent, args.batch_size)
    target = find_target(args.topology, args.hbm)
    tried = None
    if args.search:
        if mesh or args.remat:
            raise UserError("--search finds --mesh and --remat itself; leave them out")
        rows = args.batch_size or 1
        options: dict[str, Any] = {"say": partial(print, flush=True), "again": args.again}
        found = (
            search_sampling(config, target, rows, offload=args.offload, **options)
            if args.sample
            else search_training(config, target, **options)
        )
        made, tried = found.plan, found.tried
    elif args.sample:
        made = plan_sampling(config, target, mesh, args.batch_size or 1, offload=args.offload, again=args.again)
    else:
        made = plan_training(config, target, mesh, again=args.again)
    loader = None if args.sample or config.train.stage != "diffusion" else loader_cost(config, made, args.again)
    if not args.json:
        print(table(name, made, loader))
    return dataclasses.asdict(made) | {"loader": loader} | ({"tried": tried} if tried else {})


def loader_cost(config: Any, made: Plan, again: bool) -> dict[str, float] | None:
    """What the loader has to give at 50 % of the peak, and what `sora-jax bench loader` measures of one core here, for
    these clips; kept from an earlier plan where there was one."""
    if made.at_mfu is None:
        return None
    from sora_jax.bench.memo import remembered
    from sora_jax.bench.programs import autoencoder_stride
    from sora_jax.bench.rows import loader_sizes
    from sora_jax.commands.bench import measure
    from sora_jax.runtime import cpu_fingerprint

    sizes = loader_sizes(config, autoencoder_stride(config))
    found, _ = remembered(
        ["loader 1", cpu_fingerprint(), sizes],
        lambda: {"seconds": measure("loader", "", [sizes]).seconds},
        again=again,
    )
    needed = made.at_mfu["50%"]["videos_per_second"]
    return {
        "clips_per_second": needed,
        "clips_per_second_of_a_core_here": 1 / found["seconds"],
        "cores": needed * found["seconds"],
    }


def table(name: str, made: Plan, loader: dict[str, float] | None = None) -> str:
    """What people read: where the bytes are, and whether they fit."""
    gib = 2**30
    mesh = ", ".join(f"{axis}={n}" for axis, n in made.mesh.items()) or "one device"
    mesh += f", remat {made.remat}" if made.remat else ""
    kept = f" on {made.compiled_on}, kept since (--again compiles anew)" if made.compiled_on else ""
    how = {
        "compiled": f"compiled in {made.compile_seconds} s{kept}",
        "reckoned": "reckoned, not compiled",
        "refused": f"refused by the compiler{kept}: over the device's memory",
    }[made.method]
    n = made.parameters
    size = f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"
    tokens = "latents" if made.program == "autoencoder step" else "tokens"
    chips = f" on {made.chips} chips" if made.chips != made.devices else ""
    peak, memory = made.peak_bytes_per_device / gib, made.hbm_bytes_per_device / gib
    lines = [
        f"{name}: {made.program} · {size} parameters · {made.rows} videos, {made.tokens:,} {tokens}",
        f"{made.target} · {made.devices} device{'s' * (made.devices > 1)}{chips} · {mesh} · {how}",
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
        slowest = max(made.seconds_at_best, key=lambda what: made.seconds_at_best[what])  # type: ignore[index]
        lines += ["", "  arithmetic from the vendor's figures, nothing was timed:"]
        lines.append(f"    no step is faster than the slowest of: {best}")
    for share, found_at in (made.at_mfu or {}).items():
        lines.append(
            f"    at {share} of the peak: {found_at['seconds_per_step']:.3g} s a step, "
            f"{found_at['videos_per_second']:.3g} videos/s, {found_at['tokens_per_day'] / 1e9:,.3g} G {tokens} a day, "
            f"{found_at['chip_hours_per_1000_steps']:,.0f} chip-hours for 1,000 steps"
            + ("" if found_at["reachable"] else f" (out of reach: {slowest} alone take longer)")
        )
    if loader:
        lines.append(
            f"  the loader must give {loader['clips_per_second']:.3g} clips/s at 50%; a core here gives "
            f"{loader['clips_per_second_of_a_core_here']:.3g} (measured): {loader['cores']:.2g} cores"
        )
    lines += ["", "  fits" if made.fits else "  does not fit; what would help:"]
    lines += [f"    {advice}" for advice in made.advice]
    return "\n".join(lines)
