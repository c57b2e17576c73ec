"""`sora-jax train`: train a model, or go on with a run that was stopped."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sora_jax.config import Config

HELP = "train a model, or go on with a run that was stopped"
OVERRIDES = True  # takes --config.a.b=value
CLUSTER = True
EXAMPLES = """
    sora-jax train --config world --workdir runs/world
    sora-jax train --config world --workdir runs/world --config.train.steps=20000
    sora-jax train --config world --workdir runs/world --dry-run
    sora-jax train --config world --workdir runs/world --supervise 10
    sora-jax train --config world --workdir runs/world --profile 20:5
    sora-jax train --config my_config.py --workdir gs://bucket/run --config.train.mesh.fsdp=4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="NAME|PATH", help="a config's name or .py file")
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="folder or URL of the run; made, or gone on with"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="the same as --config.train.steps=N")
    parser.add_argument(
        "--force", action="store_true", help="go on although the workdir was made by another config or data"
    )
    parser.add_argument(
        "--profile",
        metavar="START:STEPS",
        help="trace so many steps from that one on (counted from 1) into DIR/profile, for xprof",
    )
    parser.add_argument("--json", action="store_true", help="print how it ended as one JSON document on stdout")
    parser.add_argument(
        "--supervise",
        type=int,
        metavar="N",
        help="start the run again when it dies, up to N times in a row without a new checkpoint in between",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the config with every value, the mesh, parameters, memory and the first batch's shapes; "
        "train and write nothing",
    )


def dtype_of(args: argparse.Namespace) -> str:
    return _config(args).train.dtype


def _config(args: argparse.Namespace) -> Config:
    from sora_jax.config import load_config

    overrides = [*args.overrides, *([] if args.steps is None else [f"train.steps={args.steps}"])]
    return load_config(args.config, overrides)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from sora_jax.training.profiler import parse_profile

    config = _config(args)
    profile = parse_profile(args.profile, config.train.steps) if args.profile is not None else None
    if args.dry_run:
        import jax

        from sora_jax.bench.dry_run import dry_run, table

        found = dry_run(config, args.workdir, force=args.force)
        if not args.json and jax.process_index() == 0:
            print(table(args.config, found))
        return dataclasses.asdict(found)
    from sora_jax.training.loop import train

    summary = train(config, args.workdir, force=args.force, profile=profile)
    return summary._asdict()
