"""`sora-jax doctor`: what is wrong with this machine, before a run finds out."""

from __future__ import annotations

import argparse
from typing import Any

from sora_jax.errors import UserError

HELP = "check devices, files, versions and caches, and say what to do; or try the whole machine out"
STARTS_JAX = False  # a backend that hangs must not take this command with it
EXAMPLES = """
    sora-jax doctor
    sora-jax doctor --platform tpu --devices 16 --workdir gs://bucket/runs
    sora-jax doctor --selftest --out report.json
"""
PLATFORMS = ("cpu", "gpu", "tpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    expected = parser.add_argument_group("what to expect")
    expected.add_argument("--devices", type=int, metavar="N", help="so many, over all processes of the run")
    expected.add_argument("--platform", choices=PLATFORMS, help="of the devices")
    expected.add_argument("--workdir", metavar="URL", help="a folder or bucket that can be written")
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="compute on the devices too: what must agree, does it, and how fast is it (ten minutes at most)",
    )
    parser.add_argument("--out", metavar="FILE", help="write the report to FILE (JSON), and beside it as text")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for JAX to start (120)")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    from sora_jax.doctor.checks import Check, all_checks
    from sora_jax.doctor.probe import SECONDS, probe
    from sora_jax.doctor.report import check_out

    if args.devices is not None and args.devices < 1:
        raise UserError(f"--devices must be at least 1, not {args.devices}")
    if args.timeout is not None and not args.timeout > 0:
        raise UserError(f"--timeout must be > 0 seconds, not {args.timeout:g}")
    if args.workdir is not None and not args.workdir:
        raise UserError('--workdir "" names no folder: give one, or a URL')
    if args.out is not None:
        check_out(args.out)
    probed = probe(args.timeout or SECONDS)
    # Of several processes the first speaks, unless JAX does not start and none knows which it is.
    chief = probed.found is None or probed.found["process"] == 0

    def say(line: str) -> None:
        if chief and not args.json:
            print(line, flush=True)

    def show(check: Check) -> None:
        say(check.line)

    checks = all_checks(probed, count=args.devices, platform=args.platform, workdir=args.workdir, say=show)
    document: dict[str, Any] = {"checks": [check._asdict() for check in checks], "found": probed.found}
    if args.selftest:
        from sora_jax.doctor.selftest import selftest

        if probed.found is None:
            raise UserError(f"--selftest needs devices, and JAX does not start ({probed.error})")
        if probed.found["processes"] > 1:
            raise UserError("--selftest runs in one process: start it on one host, outside the cluster")
        document |= selftest(probed.found["platform"], say)
    if chief and (args.out or args.selftest):
        from sora_jax.doctor.report import write_report

        say(f"report: {write_report(document, args.out or 'sora-jax-doctor.json')}")
    return document if chief else None


def exit_code(document: dict[str, Any] | None) -> int:
    """1 where a check or a row failed."""
    rows = [*document["checks"], *document.get("equality", ()), *document.get("speed", ())] if document else []
    return int(any(row["state"] == "failed" for row in rows))
