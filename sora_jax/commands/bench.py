"""`sora-jax bench`: how long the parts take on this machine."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

from sora_jax.errors import UserError, nearest

HELP = "measure how long the parts take on this machine"
EXAMPLES = """
    sora-jax bench
    sora-jax bench world-train-step loader --json
    sora-jax bench first-video-cold first-video-warm
    sora-jax bench loader --config wan_14b
"""

# name: what one unit of it is
ROWS = {
    "first-video-cold": "the whole sample command, nothing compiled before",
    "first-video-warm": "the whole sample command, with the compile cache that a first one left",
    "world-sampler-step": "a guided solver step of one video",
    "world-train-step": "a train step of the config world, a full batch of rows",
    "train-loop": "a step of a run of the config world with all that a run does; reference: that step alone",
    "autoencoder-decode": "17 frames of 64x64 from their latents",
    "loader": "a clip through the packed loader: planned, read from the latent cache, put into its row; one core",
    "world-render": "a clip of the world, 17 frames of 64x64 and its captions, one core",
    "world-2-render": "the same of the second world, the mix of the config world_2",
    "wan-transformer-forward": "4 layers of the 1.3B width over 4,680 tokens, float32",
    "wan-train-step": "the same, with gradients and AdamW",
    "wan-encode": "17 frames of 128x128 through the 2.1 autoencoder at base width 32, float32",
    "wan-decode": "and back",
    "umt5": "512 tokens through 4 layers of UMT5 at width 1024, float32",
    "wan-load": "to load a folder of Wan 2.1 1.3B and UMT5-XXL, random: 15 GB of disk, 20 of memory; only when named",
}
NAMED_ONLY = ("wan-load",)
# Those that the reference is timed at, too, where it is installed (extra parity).
REFERENCED = ("wan-transformer-forward", "wan-train-step", "wan-encode", "wan-decode", "umt5")
BARE = {"train-loop": ("sora_jax.bench.train_loop", "bare-loop")}  # rows whose reference is a row of ours
ROUNDS = 2  # of ours and the reference's in turn
RATES = {"loader": "clips/s", "world-render": "clips/s", "world-2-render": "clips/s", "world-train-step": "steps/s"}
ONE_CORE = ("loader", "world-render", "world-2-render")

# Runs one row in a process of its own and prints its seconds last: module, row, whether on one core, and what the row
# takes. Freed memory is kept, as in every run of the command line, and for the reference too.
CHILD = """
import importlib, os, sys
from sora_jax.runtime import keep_memory
keep_memory()
if sys.argv[3] and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core
print(importlib.import_module(sys.argv[1]).ROWS[sys.argv[2]](*sys.argv[4:]))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    listing = "; ".join(f"{name}: {what}" for name, what in ROWS.items())
    parser.add_argument("row", nargs="*", metavar="ROW", help=f"what to measure (everything). {listing}")
    parser.add_argument("--model", default="world", metavar="MODEL", help="what is sampled (world)")
    parser.add_argument("--config", default="world", metavar="NAME|PATH", help="whose clips the loader reads (world)")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def run(args: argparse.Namespace) -> dict[str, Any]:
    for name in args.row:
        if name not in ROWS:
            raise UserError(f'unknown row "{name}"; {nearest(name, ROWS)}')
    from sora_jax.weights.shipped import find_model

    find_model(args.model)  # says at once that there is none
    arguments = {"loader": loader_arguments(args.config)}
    rows = []
    for name in args.row or (name for name in ROWS if name not in NAMED_ONLY):
        # A row has a reference where something else that does the same work is timed beside it.
        reference = BARE[name][1] if name in BARE else reference_name() if name in REFERENCED else None
        if reference:
            (seconds, peak), theirs = alternate(name, args.model)
        else:
            (seconds, peak), theirs = measure(name, args.model, arguments.get(name, ())), None
        rows.append(
            {
                "name": name,
                "seconds": seconds,
                "reference": reference,
                "reference_seconds": theirs,
                "peak_bytes": peak,
            }
        )
        if not args.json:
            rate = f"{1 / seconds:10.1f} {RATES[name]}" if name in RATES else ""
            if theirs is not None:
                rate = f"{theirs / seconds:10.2f} x the reference"
            print(f"{name:24} {seconds:10.4f} s {peak / 2**20:8.0f} MiB {rate:28} {ROWS[name]}", flush=True)
    return {"rows": rows}


def loader_arguments(name: str) -> list[str]:
    """What the row `loader` takes for the clips of the config `name`."""
    from sora_jax.bench.programs import autoencoder_stride
    from sora_jax.bench.rows import loader_sizes
    from sora_jax.config import load_config

    config = load_config(name)
    return [loader_sizes(config, autoencoder_stride(config))]


def reference_name() -> str | None:
    """The packages that are timed beside ours, with their versions; None where they are not installed."""
    found = []
    for package in ("diffusers", "transformers", "torch"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            return None
    return ", ".join(found)


def alternate(name: str, model: str) -> tuple[Cost, float]:
    """Ours and the reference's, in processes of their own in turn: medians of both, so that a busy spell of the machine
    falls on both."""
    ours, theirs = [], []
    for _ in range(ROUNDS):
        ours.append(measure(name, model))
        module, row = BARE.get(name, ("sora_jax.bench.reference", name))
        out, _ = _child([sys.executable, "-c", CHILD, module, row, "", model])
        theirs.append(float(out.split()[-1]))
    seconds = statistics.median(cost.seconds for cost in ours)
    return Cost(seconds, max(cost.peak_bytes for cost in ours)), statistics.median(theirs)


class Cost(NamedTuple):
    """Wall time, and the most memory that the process held on the host (with the CPU as device: all of it)."""

    seconds: float
    peak_bytes: int


def measure(name: str, model: str, arguments: Sequence[str] = ()) -> Cost:
    """Of a row; `arguments` are what it takes beside the model."""
    if not name.startswith("first-video"):
        module = BARE[name][0] if name in BARE else "sora_jax.bench.rows"
        if name in (*REFERENCED, *NAMED_ONLY):
            module = "sora_jax.bench.wan_rows"
        one_core = "one core" if name in ONE_CORE else ""
        out, cost = _child([sys.executable, "-c", CHILD, module, name, one_core, model, *arguments])
        return Cost(float(out.split()[-1]), cost.peak_bytes)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sora_jax", "sample", "a red ball bounces on a blue floor", "--model", model]
        command += ["--force", "--out", os.path.join(folder, "video.mp4")]
        cache = {"JAX_COMPILATION_CACHE_DIR": os.path.join(folder, "compiled")}
        cost = _child(command, environment=cache)[1]
        if name == "first-video-warm":
            cost = _child(command, environment=cache)[1]
        return cost


def _child(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[str, Cost]:
    """Run a command to its end: what it printed, and what it cost. Raises `UserError` with its last line on failure."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, **(environment or {})})
        try:
            # wait4 and not wait: it tells what this one child used.
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            lines = err.read().strip().splitlines()
            raise UserError(f"a measurement failed: {lines[-1] if lines else process.returncode}")
        scale = 1 if sys.platform == "darwin" else 1024
        return out.read(), Cost(seconds, usage.ru_maxrss * scale)
