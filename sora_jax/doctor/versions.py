"""The versions that a machine has, and those that the suite has passed on."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Mapping
from importlib import metadata

# The oldest and newest that the suite has passed on, besides the lower bounds of pyproject.toml: constraints.txt for
# Python 3.11, and on 3.12 the newest JAX there was.
TESTED: Mapping[str, tuple[str, str]] = {
    "python": ("3.11", "3.12"),
    "jax": ("0.10.2", "0.12"),
    "flax": ("0.12.8", "0.12.8"),
    "optax": ("0.2.8", "0.2.8"),
    "orbax-checkpoint": ("0.12.8", "0.12.8"),
    "grain": ("0.2.18", "0.2.18"),
    "numpy": ("2.4.6", "2.4.6"),
}
REPORTED = (*(name for name in TESTED if name != "python"), "jaxlib", "libtpu")
# What all processes of one run must have alike.
SHARED = ("python", "jax", "jaxlib", "libtpu", "sora_jax")


def versions() -> dict[str, str]:
    """Of Python, this package and what it stands on, by name; what is not installed is left out."""
    from sora_jax import __version__

    found = {"python": platform.python_version(), "sora_jax": __version__}
    for name in REPORTED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def too_old(found: Mapping[str, str]) -> list[str]:
    """Requirements of this package, and of JAX for its own parts, that are not met: "jax 0.9.0 is not >=0.10"."""
    faults = []
    for package in ("sora-jax", "jax"):
        try:
            requirements = metadata.requires(package) or []
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            continue
        for requirement in requirements:
            text, _, marker = requirement.partition(";")
            # JAX pins the TPU compiler in an extra; of other extras nothing is asked.
            if marker and not (text.startswith("libtpu") and "tpu" in marker):
                continue
            match = re.match(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?\s*(.*)", text.strip())
            if match is None or (name := match[1].replace("_", "-")) not in found:
                continue
            if not _meets(found[name], match[2]):
                faults.append(f"{name} {found[name]} is not {match[2].strip()}")
    return faults


def untested(found: Mapping[str, str]) -> list[str]:
    """What is newer than the suite has passed on: "flax 0.13.0 (tested up to 0.12.8)"."""
    return [
        f"{name} {found[name]} (tested up to {newest})"
        for name, (_, newest) in TESTED.items()
        if name in found and _numbers(found[name])[: len(_numbers(newest))] > _numbers(newest)
    ]


def differing(hosts: Iterable[Mapping[str, str]]) -> list[str]:
    """Of what processes must have alike, what they have not: "jax is 0.10.2 on 3 and 0.10.1 on 1 processes"."""
    hosts = list(hosts)
    faults = []
    for name in SHARED:
        counts: dict[str, int] = {}
        for host in hosts:
            counts[host.get(name, "missing")] = counts.get(host.get(name, "missing"), 0) + 1
        if len(counts) > 1:
            faults.append(f"{name} is {' and '.join(f'{v} on {n}' for v, n in counts.items())} processes")
    return faults


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(n) for n in match[0].split(".")) if match else ()


def _meets(version: str, specifier: str) -> bool:
    """Whether a version fits ">=0.10,<1" and the like; the operators that requirements of ours and of JAX use."""
    here = _numbers(version)
    for clause in filter(None, (part.strip() for part in specifier.split(","))):
        match = re.fullmatch(r"(>=|<=|==|!=|<|>|~=)\s*([\w.*]+)", clause)
        if match is None:
            continue
        wanted = _numbers(match[2])
        length = max(len(here), len(wanted))
        ours, theirs = ((*n, *(0,) * (length - len(n))) for n in (here, wanted))
        if match[2].endswith(".*"):
            ours, theirs = here[: len(wanted)], wanted
        if not {
            ">=": ours >= theirs,
            "<=": ours <= theirs,
            "==": ours == theirs,
            "!=": ours != theirs,
            "<": ours < theirs,
            ">": ours > theirs,
            "~=": ours >= theirs and here[: len(wanted) - 1] == wanted[:-1],
        }[match[1]]:
            return False
    return True
