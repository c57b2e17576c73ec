"""`sora-jax verify-model`: is a checkpoint whole, and are its numbers a model's?"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from sora_jax.errors import UserError

HELP = "read a checkpoint through: shapes, parameter counts, numbers that cannot be"
EXAMPLES = """
    sora-jax verify-model models/Wan2.1-T2V-1.3B-Diffusers
    sora-jax verify-model world --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a shipped name, a hub name, or a model folder or URL")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from sora_jax.weights.shipped import find_model
    from sora_jax.weights.verify import verify_folder

    def progress(component: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{component}: {done} of {total} tensors", end="\n" if done == total else "", file=sys.stderr)

    verdicts = verify_folder(find_model(args.model), progress)
    for one in verdicts:
        if args.json:
            continue
        count = f"{one.parameters:,} parameters"
        if one.published is not None:
            count += " as published" if one.published == one.parameters else f", and {one.published:,} were published"
        print(f"{one.component:14} {one.tensors} tensors, {count}, {'/'.join(one.dtypes)}")
        print(f"{'':14} largest {one.largest:.4g}, deviation {one.deviation:.4g}, sha256 {one.sha256[:16]}...")
        for strange in one.strange:
            print(f"{'':14} {strange.name} {strange.why}")
    wrong = [f"{one.component}: {strange.name} {strange.why}" for one in verdicts for strange in one.strange]
    if wrong:
        raise UserError(f"{args.model} has {len(wrong)} tensors that cannot be a trained model's: {wrong[0]}")
    return {"model": args.model, "components": [dataclasses.asdict(one) for one in verdicts]}
