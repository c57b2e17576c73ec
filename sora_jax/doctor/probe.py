"""What JAX finds on this machine and, in a run of several processes, on the others: asked in a process of its own.

A backend that hangs or aborts (a TPU that another process holds, a driver that does not answer) takes that process with
it and not the one that asks. Run as `python -m sora_jax.doctor.probe SECONDS`, it prints one line of JSON.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import socket
import subprocess
import sys
import time
from typing import Any, NamedTuple

SECONDS = 120.0  # for a backend to start and for the processes of a run to meet
_BYTES = 1024  # of what a process tells the others about itself


class Probe(NamedTuple):
    """`found` is None where JAX did not start; `error` then says why."""

    seconds: float
    found: dict[str, Any] | None
    error: str = ""


def probe(limit: float = SECONDS) -> Probe:
    """Start JAX in a child and say what it found, after `limit` seconds at the latest."""
    began = time.monotonic()
    command = [sys.executable, "-m", "sora_jax.doctor.probe", str(limit)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        child.kill()
        err = _rest_of(child)
        where = _where(err)
        return Probe(limit, None, f"no answer in {limit:g} s" + (f"; it hangs in {where}" if where else ""))
    seconds = time.monotonic() - began
    lines = out.strip().splitlines()
    if child.returncode == 0 and lines:
        return Probe(seconds, json.loads(lines[-1]))
    return Probe(seconds, None, _reason(err) or f"it ended with code {child.returncode}")


def _rest_of(child: subprocess.Popen[str]) -> str:
    """What a killed child had printed; one that the system does not let go of is left behind."""
    try:
        return child.communicate(timeout=5)[1]
    except subprocess.TimeoutExpired:
        return ""


def _where(errors: str) -> str:
    """The innermost functions of the main thread that `faulthandler` printed, nearest first."""
    stack = errors.rpartition("most recent call first")[2].partition("Thread 0x")[0]
    names = re.findall(r'File "([^"]+)", line \d+ in (\w+)', stack)
    return " < ".join(f"{name} ({os.path.basename(path)})" for path, name in names[:3])


def _reason(errors: str) -> str:
    """The last line of a traceback, or of what there is."""
    lines = [line.strip() for line in errors.strip().splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|UserError)\b", line)]
    return (raised or lines or [""])[-1][:300]


# ---------------------------------------------------------------------------------------------------------- the child


def find() -> dict[str, Any]:
    """What JAX finds here; in the first of several processes also what it found in the others."""
    from sora_jax.cluster import join_cluster

    cluster = join_cluster()
    import jax

    from sora_jax.doctor.versions import SHARED, versions

    devices, local = jax.devices(), jax.local_devices()
    float(jax.numpy.ones((8, 8)).sum())  # a device that is listed may still refuse to compute
    mine = {name: text for name, text in versions().items() if name in SHARED}
    mine |= {"host": socket.gethostname()[:100], "devices": str(len(local))}
    stats = local[0].memory_stats() or {}
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "local_count": len(local),
        "process": jax.process_index(),
        "processes": jax.process_count(),
        "cluster": cluster.name if cluster else "",
        "hosts": _from_all(mine) if jax.process_count() > 1 else [mine],
        "memory_limit": stats.get("bytes_limit"),
        "memory_in_use": stats.get("bytes_in_use"),
    }


def _from_all(mine: dict[str, str]) -> list[dict[str, str]]:
    """What each process says, in their order: an all-gather of bytes, which shows that they reach each other."""
    import numpy as np
    from jax.experimental import multihost_utils

    text = json.dumps(mine).encode()[:_BYTES].ljust(_BYTES)
    gathered = multihost_utils.process_allgather(np.frombuffer(text, np.uint8))
    return [json.loads(bytes(row)) for row in np.asarray(gathered).astype(np.uint8)]


if __name__ == "__main__":
    limit = float(sys.argv[1])
    # Where it hangs is printed before the parent ends it.
    faulthandler.dump_traceback_later(max(limit - 1.0, 0.5 * limit))
    document = find()
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(document), flush=True)  # noqa: T201
