"""`sora-jax devices`: what JAX runs on here, and what it leaves idle."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

HELP = "say what JAX runs on here, and what it leaves idle"
EXAMPLES = """
    sora-jax devices
    sora-jax devices --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from sora_jax.runtime import describe_devices, enable_compile_cache

    document = dataclasses.asdict(describe_devices())
    document["idle"] = list(document["idle"])
    document["compile_cache"] = enable_compile_cache()
    if not args.json:
        for key, value in document.items():
            print(f"{key:14} {', '.join(value) or 'none' if isinstance(value, list) else value}")
    return document
