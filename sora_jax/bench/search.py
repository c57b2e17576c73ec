"""`sora-jax plan --search`: the mesh and the remat policy of a step that fits, with few compilations.

Policies go from the least recomputation to the most. Under each, meshes that arithmetic gives a chance are compiled,
the fastest first (of those about as fast the smallest), until one fits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from sora_jax.bench.plan import HEADROOM, Plan, module_sizes, parameter_counts, plan_sampling, plan_training
from sora_jax.bench.reckon import Reckoned, meshes, reckon_sampling, reckon_training
from sora_jax.bench.targets import GIB, Target
from sora_jax.config import Config
from sora_jax.errors import UserError
from sora_jax.models.transformer import REMAT

# Least recomputation first. A policy that is not named here comes before the last: it is tried, at its own risk.
LEAST_FIRST = ("none", "dots", "offload", "full")
CHANCE = 1.5  # arithmetic may be wrong by so much: what it puts further over the memory is not compiled
ALIKE = 1.02  # times that differ by less are the same, as far as arithmetic knows
TRIES = 3  # compilations under one policy

Say = Callable[[str], None]


class Found(NamedTuple):
    """The plan that fits, or else the one that came closest; and what was tried, in order."""

    plan: Plan
    tried: list[dict[str, Any]]


def search_training(config: Config, target: Target, say: Say, *, again: bool = False) -> Found:
    """Over meshes and remat policies, for the rows of `config`."""
    if config.train.stage != "diffusion":
        raise UserError("--search is for the diffusion stage: an autoencoder's step has only --mesh to choose")
    count, learns, kept = _devices(target), *parameter_counts(config)
    tried: list[tuple[Plan, dict[str, Any]]] = []
    policies = sorted(REMAT, key=lambda name: LEAST_FIRST.index(name) if name in LEAST_FIRST else 2.5)
    for remat in policies:
        under = dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, remat=remat))
        candidates = [
            reckon_training(under, mesh, target.kind, learns, kept)
            for mesh in meshes(config, count, config.train.batch_size)
        ]

        def compile_(mesh: Mapping[str, int], config: Config = under) -> Plan:
            return plan_training(config, target, mesh, again=again)

        if plan := first_that_fits(candidates, target, compile_, tried, say, f"remat {remat}", remat == policies[-1]):
            return Found(plan, [line for _, line in tried])
    return _closest(tried)


def search_sampling(
    config: Config, target: Target, rows: int, say: Say, *, offload: bool = False, again: bool = False
) -> Found:
    """Over meshes, for `rows` videos at once."""
    count, sizes = _devices(target), module_sizes(config)
    held = sizes["transformer"] + (0 if offload else sizes["text_encoder"])
    tried: list[tuple[Plan, dict[str, Any]]] = []
    candidates = [
        reckon_sampling(config, mesh, target.kind, rows, held)
        for mesh in meshes(config, count, rows if rows > 1 else 2)
    ]

    def compile_(mesh: Mapping[str, int]) -> Plan:
        return plan_sampling(config, target, mesh, rows, offload=offload, again=again)

    if plan := first_that_fits(candidates, target, compile_, tried, say, "sampling", True):
        return Found(plan, [line for _, line in tried])
    return _closest(tried)


def first_that_fits(
    candidates: Iterable[Reckoned],
    target: Target,
    compile_: Callable[[Mapping[str, int]], Plan],
    tried: list[tuple[Plan, dict[str, Any]]],
    say: Say,
    what: str,
    last: bool,
) -> Plan | None:
    """Compiles up to `TRIES` of the candidates, and of the `last` ones at least the smallest."""
    budget = (1 - HEADROOM) * target.hbm_bytes
    ordered = list(candidates)
    fastest = min((one.seconds for one in ordered), default=0.0)
    ordered.sort(key=lambda one: (int(math.log(one.seconds / fastest, ALIKE)), one.peak_bytes))
    hopeful = [one for one in ordered if one.peak_bytes <= CHANCE * budget]
    if not hopeful and ordered:
        least = min(ordered, key=lambda one: one.peak_bytes)
        say(f"{what}: {len(ordered)} meshes, the smallest at {least.peak_bytes / GIB:.1f} GiB by arithmetic")
        hopeful = [least] if last and not tried else []
    ceiling = float("inf")  # a mesh that should need more than one that did not fit is not compiled
    tries = 0
    for one in hopeful:
        if one.peak_bytes >= ceiling or tries == TRIES:
            continue
        tries += 1
        plan = compile_(one.mesh)
        line = {
            "mesh": plan.mesh,
            "remat": plan.remat,
            "reckoned_bytes": int(one.peak_bytes),
            "peak_bytes": plan.peak_bytes_per_device,
            "method": plan.method,
            "fits": plan.fits,
            "seconds_at_best": max((plan.seconds_at_best or {"": 0.0}).values()),
        }
        tried.append((plan, line))
        mesh = ", ".join(f"{axis}={n}" for axis, n in plan.mesh.items())
        verdict = "fits" if plan.fits else "refused" if plan.method == "refused" else "does not fit"
        say(
            f"{what}: {mesh}: {verdict}, {plan.peak_bytes_per_device / GIB:.1f} GiB "
            f"({one.peak_bytes / GIB:.1f} by arithmetic)"
        )
        if plan.fits:
            return plan
        ceiling = min(ceiling, one.peak_bytes)
    return None


def _closest(tried: list[tuple[Plan, dict[str, Any]]]) -> Found:
    if not tried:
        raise UserError("no mesh of these devices divides the rows and the model's width: give --batch-size")
    return Found(min((plan for plan, _ in tried), key=lambda plan: plan.peak_bytes_per_device), [t for _, t in tried])


def _devices(target: Target) -> int:
    if target.devices is None or target.name == "local" or target.slices > 1:
        raise UserError("--search compiles for one grid of TPU chips: name a --topology")
    return len(target.devices)
