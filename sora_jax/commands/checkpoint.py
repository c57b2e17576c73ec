"""`sora-jax checkpoint`: what a run has saved, and whether it is still what was written."""

from __future__ import annotations

import argparse
from typing import Any

from sora_jax.errors import UserError, nearest

HELP = "list a run's checkpoints, or check every byte of them"
EXAMPLES = """
    sora-jax checkpoint ls runs/world
    sora-jax checkpoint verify gs://bucket/run --json
"""
ACTIONS = ("ls", "verify")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        metavar="ls|verify",
        help="list them (step, size, when, by which code, on which data), or hold each file against its SHA-256",
    )
    parser.add_argument("workdir", metavar="WORKDIR", help="folder or URL of a run")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.action not in ACTIONS:
        raise UserError(f'unknown action "{args.action}": {nearest(args.action, ACTIONS)}')
    from sora_jax.training.checkpoint import Checkpoints
    from sora_jax.training.notes import code_in_short, data_in_short
    from sora_jax.training.pretrained import workdir_of

    checkpoints = Checkpoints(workdir_of(args.workdir) / "checkpoints", read_only=True)
    found: list[dict[str, Any]] = []
    try:
        for step in checkpoints.steps():
            entry: dict[str, Any] = {"step": step, "bytes": checkpoints.size(step)}
            line = f"{step:>10} {entry['bytes'] / 1e6:>10.1f} MB"
            if args.action == "verify":
                entry["fault"] = checkpoints.fault(step) or None
                line += f"   {entry['fault'] or 'good'}"
            else:
                try:
                    notes = checkpoints.notes(step)
                except (OSError, ValueError, KeyError):
                    notes = {}  # `verify` says what is wrong with them
                entry |= {name: notes.get(name) for name in ("saved", "code", "data")}
                code, data = code_in_short(notes), data_in_short(notes)
                line += f"   {notes.get('saved') or '-':<25}   {code or '-':<28}   {data or '-'}"
            found.append(entry)
            if not args.json:
                print(line.rstrip(), flush=True)
    finally:
        checkpoints.close()
    damaged = [entry["step"] for entry in found if entry.get("fault")]
    if damaged:
        raise UserError(
            f"{len(damaged)} of {len(found)} checkpoints in {args.workdir} are damaged "
            f"({', '.join(map(str, damaged))}); training goes on from the newest good one"
        )
    return {"workdir": args.workdir, "checkpoints": found}
