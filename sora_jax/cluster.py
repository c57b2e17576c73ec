"""Several processes that are one run: found in the environment, and joined before JAX looks at its devices.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID      said outright (launch/local.sh, Kubernetes)
    SLURM_NTASKS > 1, in a step of srun                             Slurm
    OMPI_COMM_WORLD_SIZE > 1                                        Open MPI
    TPU_WORKER_HOSTNAMES with several names, MEGASCALE_NUM_SLICES   TPU slices of several hosts on GKE, or several
    the instance's metadata, on a machine with TPU chips            a TPU slice of several hosts on Compute Engine

Only the last asks the network: the machine's own metadata server, and only where TPU chips are plugged in.
"""

from __future__ import annotations

import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sora_jax.errors import UserError
from sora_jax.runtime import tpu_chips

COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
HEARTBEAT_SECONDS = 30  # a process that is silent for so long is taken for dead, and the others end (JAX: 100)
CONNECT_SECONDS = 300
_ENDPOINTS = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints"


class Cluster(NamedTuple):
    """How the processes of a run were found. What is None JAX finds out by itself."""

    name: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def ask_metadata() -> str:
    """The workers of this TPU slice as Compute Engine lists them, separated by commas; empty where nobody answers."""
    request = urllib.request.Request(_ENDPOINTS, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return str(answer.read().decode())
    except (OSError, urllib.error.URLError):
        return ""


def find_cluster(
    environment: Mapping[str, str] | None = None, root: Path = Path("/"), metadata: Callable[[], str] = ask_metadata
) -> Cluster | None:
    """The cluster that this process is one of; None for a run of one process.

    Raises `UserError` where only some of the variables that say it outright are set, or make no sense.
    """
    env = os.environ if environment is None else environment
    said = [name for name in (COUNT, INDEX) if env.get(name)]
    if said:
        missing = [name for name in (COORDINATOR, COUNT, INDEX) if not env.get(name)]
        if missing:
            raise UserError(f"{said[0]} is set and {missing[0]} is not: set all of {COORDINATOR}, {COUNT}, {INDEX}")
        count, index = (_whole(name, env[name]) for name in (COUNT, INDEX))
        if not 0 <= index < count:
            raise UserError(f"{INDEX}={index} of {COUNT}={count} cannot be: processes count from 0")
        return Cluster("environment", env[COORDINATOR], count, index) if count > 1 else None
    if "SLURM_STEP_NODELIST" in env and _whole("SLURM_NTASKS", env.get("SLURM_NTASKS", "1")) > 1:
        return Cluster("Slurm")
    if _whole("OMPI_COMM_WORLD_SIZE", env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return Cluster("Open MPI")
    if not tpu_chips(root) or env.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return None
    if "," in env.get("TPU_WORKER_HOSTNAMES", "") or _whole("slices", env.get("MEGASCALE_NUM_SLICES", "1")) > 1:
        return Cluster("TPU slice on Kubernetes")
    if not env.get("TPU_WORKER_HOSTNAMES") and "," in metadata():
        return Cluster("TPU slice")
    return None


def join_cluster() -> Cluster | None:
    """Join the others where there are others; must come before anything that asks JAX for its devices.

    Raises `UserError` when nobody answers at the coordinator's address for CONNECT_SECONDS.
    """
    found = find_cluster()
    if found is None:
        return None
    if found.coordinator and found.process:
        _wait_for(found.coordinator)
    import jax

    said: dict[str, Any] = {
        "coordinator_address": found.coordinator,
        "num_processes": found.processes,
        "process_id": found.process,
    }
    try:
        jax.distributed.initialize(
            **said, initialization_timeout=CONNECT_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        where = f" at {found.coordinator}" if found.coordinator else ""
        raise UserError(
            f"the processes of this run ({found.name}) did not come together{where}: {str(error).splitlines()[0]}"
        ) from error
    return found


def _wait_for(address: str) -> None:
    """Until somebody listens there: JAX's own client aborts the process when nobody does."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"{COORDINATOR}={address} is not HOST:PORT")
    end = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"nobody answers at {address}, the coordinator of this run, for {CONNECT_SECONDS} s ({error}): is "
                    "process 0 running, and may this machine reach it?"
                ) from error
            time.sleep(0.5)


def _whole(name: str, text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"{name}={text} is not a whole number")
    return int(text)
