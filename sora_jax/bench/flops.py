"""Floating-point operations of a program, counted from its jaxpr: products and convolutions, wherever they are.

Loops count as often as they turn, kernels as often as their grid has cells, and what `shard_map` gives to each device
as often as there are devices: the count is of the whole mesh. Where a program differs by platform, that of `platform`
is counted; of other branches the most expensive. Recomputation in the backward pass stands in a jaxpr and is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def program_flops(function: Callable[..., Any], *arguments: Any, platform: str = "tpu") -> float:
    """Of `function` at these arguments, which may be shapes; under `jax.set_mesh` where it is made for a mesh."""
    return count_flops(jax.make_jaxpr(function)(*arguments).jaxpr, platform)


def count_flops(jaxpr: Any, platform: str = "tpu") -> float:
    """Of a jaxpr. Raises `ValueError` for a loop whose turns are not known before it runs."""
    total = 0.0
    platforms: tuple[Any, ...] | None = None  # of the branches of the next `cond`
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            total += _dot(eqn)
        elif name == "conv_general_dilated":
            total += _convolution(eqn)
        elif name == "platform_index":
            platforms = params["platforms"]
        elif name == "cond":
            costs = [count_flops(branch.jaxpr, platform) for branch in params["branches"]]
            total += max(costs) if platforms is None else costs[_branch(platforms, platform)]
            platforms = None
        elif name == "scan":
            total += params["length"] * count_flops(params["jaxpr"].jaxpr, platform)
        elif name == "while":
            if count_flops(params["body_jaxpr"].jaxpr, platform):
                raise ValueError("a while loop with products in it: nobody knows how often it turns")
        elif name == "pallas_call":
            total += math.prod(params["grid_mapping"].grid) * count_flops(params["jaxpr"], platform)
        elif name == "shard_map":
            total += params["mesh"].size * count_flops(_inner(params["jaxpr"]), platform)
        elif name in ("custom_vjp_call", "custom_jvp_call"):
            total += count_flops(_inner(params.get("call_jaxpr") or params["fun_jaxpr"]), platform)
        else:
            total += sum(count_flops(inner, platform) for inner in _jaxprs(params))
    return total


def _branch(platforms: tuple[Any, ...], platform: str) -> int:
    """Which branch a platform takes; `platforms` has names for each, and None for all others."""
    for index, names in enumerate(platforms):
        if names is None or platform in names:
            return index
    raise ValueError(f"the program has no branch for {platform}")


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    summed = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    return 2.0 * summed * math.prod(eqn.outvars[0].aval.shape)


def _convolution(eqn: Any) -> float:
    kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
    out_features = kernel[numbers.rhs_spec[0]]
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / out_features


def _inner(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among the parameters of an equation."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            inner = _inner(one)
            if hasattr(inner, "eqns"):
                yield inner
